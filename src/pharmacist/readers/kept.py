"""What a model showed of every row, kept in files: another look at the same rows needs no model."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from pharmacist.core.files import atomic_path
from pharmacist.nn.passes import run_pass
from pharmacist.readers.states import hidden_states
from pharmacist.readers.views import FloatArray, Texts


if TYPE_CHECKING:
    from pharmacist.data.tokenize import Encoded
    from pharmacist.nn.models import LoadedModel


@dataclass(frozen=True)
class ModelReader:
    """The model that reads rows, and where what it showed is kept.

    What another model (by its fingerprint) showed is not used. What is read now goes to ``folder/NAME.safetensors``,
    finished chunks to ``folder/NAME/``; `earlier` names files that may hold some rows; the model is loaded when used.
    """

    fingerprint: str
    folder: Path
    earlier: Callable[[str], Iterable[Path]]
    encode: Callable[[Any, str], "Encoded"]
    model: Callable[[], "LoadedModel"]


def row_keys(prompts: list[str], completions: list[str]) -> npt.NDArray[np.uint64]:
    """64-bit hash of each row's text, shape [rows]."""
    texts = map("{}\0{}".format, prompts, completions)
    keys = [xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts]
    return np.array(keys, dtype=np.uint64)


def read_texts(rows: Any, name: str, reader: ModelReader | None) -> tuple[Texts, int]:
    """Rows (a dataset) as readers see them, from what was kept of them where all of them are there, else by the model.

    Without a `reader` no hidden states are read. Also returns how many tokens the model read.
    """
    prompts, completions = list(rows["prompt"]), list(rows["completion"])
    if reader is None:
        return Texts(prompts, completions), 0
    keys = row_keys(prompts, completions)
    path = reader.folder / f"{name}.safetensors"
    for file in (path, *reader.earlier(name)):
        kept = _kept(file, keys, reader.fingerprint)
        if kept is not None:
            if file != path:  # what lies in the output folder is written anew in the end
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as temporary:
                    shutil.copyfile(file, temporary)
            return Texts(prompts, completions, *kept), 0
    encoded = reader.encode(rows, name)
    loaded = reader.model()
    measure, what = hidden_states(loaded.model), f"reading the {name}"
    found = run_pass(loaded.model, encoded, measure, work=reader.folder / name, description=what)
    tokens = int(encoded.lengths[np.unique(encoded.content_keys, return_index=True)[1]].sum())
    with atomic_path(path) as temporary:
        save_file({"keys": keys, **found}, temporary, metadata={"model": reader.fingerprint})
    return Texts(prompts, completions, found["states"], found["statistics"].astype(np.float64)), tokens


def _kept(path: Path, keys: npt.NDArray[np.uint64], fingerprint: str) -> tuple[npt.NDArray[Any], FloatArray] | None:
    """States and statistics of the rows with these keys; None where not all of them were kept."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("model") != fingerprint:
                return None
        arrays = load_file(path)
    except SafetensorError:
        return None  # damaged: read again
    order = np.argsort(arrays["keys"], kind="stable")
    where = np.searchsorted(arrays["keys"], keys, sorter=order).clip(max=len(order) - 1)
    if not len(order) or (arrays["keys"][order[where]] != keys).any():
        return None
    rows = order[where]
    return arrays["states"][rows], arrays["statistics"][rows].astype(np.float64)
