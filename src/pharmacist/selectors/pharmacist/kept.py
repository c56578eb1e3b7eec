"""What the model showed of every row, kept with the results: a second ranking of the same pool needs no model."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import atomic_path, read_json
from pharmacist.nn.models import model_fingerprint
from pharmacist.nn.passes import run_pass
from pharmacist.nn.reading import tokens_per_batch
from pharmacist.selectors.pharmacist.readers import Texts
from pharmacist.selectors.pharmacist.states import hidden_states


if TYPE_CHECKING:
    from pharmacist.selectors.base import SelectionContext


FORMAT = 3
"""Version of what a saved selector holds."""
KEPT = "states"
"""Subfolder of a saved selector."""


def row_keys(prompts: list[str], completions: list[str]) -> npt.NDArray[np.uint64]:
    """64-bit hash of each row's text, shape [rows]."""
    return np.array(
        [
            xxhash.xxh3_64_intdigest(f"{prompt}\0{completion}".encode("utf-8", "surrogatepass"))
            for prompt, completion in zip(prompts, completions, strict=True)
        ],
        dtype=np.uint64,
    )


def read_texts(context: "SelectionContext", rows: Any, name: str, *, with_model: bool) -> tuple[Texts, int]:
    """Rows as readers see them, from what was kept of them where all of them are there, else by the model.

    Args:
        context: Its run's ``selector/states`` and `SelectionContext.resume_from` are looked into.
        rows: A dataset with ``prompt`` and ``completion``.
        name: Of the file.
        with_model: Read hidden states too.

    Returns:
        The rows, and how many tokens the model read for them.
    """
    prompts, completions = list(rows["prompt"]), list(rows["completion"])
    if not with_model:
        return Texts(prompts, completions), 0
    keys = row_keys(prompts, completions)
    fingerprint = model_fingerprint(str(context.model_name))
    folders = [context.run.work("states"), context.run.path("selector", KEPT)]
    if context.resume_from is not None:
        folders += [context.resume_from / KEPT, context.resume_from / "selector" / KEPT]
    path = context.run.work("states") / f"{name}.safetensors"
    for folder in folders:
        kept = _kept(folder / path.name, keys, fingerprint)
        if kept is not None:
            if folder != path.parent:  # what lies in the output folder is written anew in the end
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as temporary:
                    shutil.copyfile(folder / path.name, temporary)
            return Texts(prompts, completions, *kept), 0
    encoded = context.encode(rows, name)
    measure = hidden_states(context.model.model)
    found = run_pass(
        encoded,
        measure,
        work=context.run.work("states", name),
        device=context.model.device,
        tokens_per_batch=tokens_per_batch(context.model.model, context.model.device),
        description=f"reading the {name}",
    )
    tokens = int(encoded.lengths[np.unique(encoded.content_keys, return_index=True)[1]].sum())
    with atomic_path(path) as temporary:
        save_file({"keys": keys, **found}, temporary, metadata={"model": fingerprint})
    return Texts(prompts, completions, found["states"], found["statistics"].astype(np.float64)), tokens


def _kept(
    path: Path, keys: npt.NDArray[np.uint64], fingerprint: str
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]] | None:
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


def read_saved(folder: Path, model: str | None) -> tuple[Path, dict[str, Any]]:
    """Where a saved selector lies, and its ``selector.json``; only for the model that it reads with."""
    folder = folder / "selector" if (folder / "selector" / "selector.json").is_file() else folder
    path = folder / "selector.json"
    if not path.is_file():
        raise DataError(f"{folder}: no selector.json; --resume-selector needs the folder of an earlier curate")
    saved: dict[str, Any] = read_json(path)
    if saved.get("selector") != "pharmacist" or saved.get("format") != FORMAT:
        raise DataError(f"{path}: not written by this version of the selector 'pharmacist'; train it again")
    if saved["model"]:
        if model is None:
            raise ConfigError("the saved selector reads with a model; give --model")
        if model_fingerprint(model) != saved["model"]:
            raise DataError(f"{path}: was trained on another model than {model}; give that one")
    return folder, saved
