"""Hidden states of rows, kept in files, so that the same rows are read without the model the next time."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pharmacist.core.files import atomic_path
from pharmacist.data.arrays import FloatArray
from pharmacist.data.normalise import text_key
from pharmacist.nn.batching import Sequences
from pharmacist.nn.models import LoadedModel
from pharmacist.nn.passes import run_pass
from pharmacist.readers.states import hidden_states
from pharmacist.readers.views import Texts


@dataclass(frozen=True)
class ModelReader:
    """A model that reads rows, and the files in which their hidden states are kept.

    Attributes:
        key: Of everything else that states depend on: the model, its number format, its prompt template, the longest
            row in tokens. Files with another key are not used.
        folder: States go to ``folder/NAME.safetensors``, finished chunks to ``folder/NAME/``.
        earlier: Further folders with such files, of runs before.
        encode: Rows and their name -> rows in tokens.
        model: Loads the model when it is needed.
    """

    key: str
    folder: Path
    earlier: Sequence[Path]
    encode: Callable[[Any, str], Sequences]
    model: Callable[[], LoadedModel]


def row_keys(prompts: list[str], completions: list[str]) -> npt.NDArray[np.uint64]:
    """64-bit hash of each row's text, shape [rows]."""
    texts = map("{}\0{}".format, prompts, completions)
    return np.array([text_key(text) for text in texts], dtype=np.uint64)


def read_texts(rows: Any, name: str, reader: ModelReader | None) -> tuple[Texts, int]:
    """Rows (a dataset) as `Texts`, with hidden states from a file that holds all of them, else from the model.

    Without a `reader` there are no hidden states. Also returns how many tokens the model read.
    """
    prompts, completions = rows["prompt"][:], rows["completion"][:]
    if reader is None:
        return Texts(prompts, completions), 0
    keys = row_keys(prompts, completions)
    path = reader.folder / f"{name}.safetensors"
    for folder in (reader.folder, *reader.earlier):
        file = folder / path.name
        kept = _kept(file, keys, reader.key)
        if kept is not None:
            if file != path:  # what lies in the output folder is replaced in the end
                with atomic_path(path) as temporary:
                    shutil.copyfile(file, temporary)
            return Texts(prompts, completions, *kept), 0
    encoded = reader.encode(rows, name)
    loaded = reader.model()
    measure, what = hidden_states(loaded.model), f"reading the {name}"
    found = run_pass(loaded.model, encoded, measure, work=reader.folder / name, description=what)
    tokens = int(encoded.lengths[np.unique(encoded.content_keys, return_index=True)[1]].sum())
    with atomic_path(path) as temporary:
        save_file({"keys": keys, **found}, temporary, metadata={"key": reader.key})
    return Texts(prompts, completions, found["states"], found["statistics"].astype(np.float64)), tokens


def _kept(path: Path, keys: npt.NDArray[np.uint64], key: str) -> tuple[npt.NDArray[Any], FloatArray] | None:
    """States and statistics of the rows with these keys; None where not all of them were kept."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            arrays = {name: file.get_tensor(name) for name in ("keys", "states", "statistics")}
    except SafetensorError:
        return None  # damaged: the model reads the rows
    order = np.argsort(arrays["keys"], kind="stable")
    where = np.searchsorted(arrays["keys"], keys, sorter=order).clip(max=len(order) - 1)
    if not len(order) or (arrays["keys"][order[where]] != keys).any():
        return None
    rows = order[where]
    return arrays["states"][rows], arrays["statistics"][rows].astype(np.float64)
