"""What a ranking keeps with its results: the selector itself, and what the model showed of every row."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import read_json
from pharmacist.nn.models import model_fingerprint
from pharmacist.readers import kept
from pharmacist.readers.views import Texts


if TYPE_CHECKING:
    from pharmacist.selectors.base import SelectionContext


FORMAT = 3
"""Version of what a saved selector holds."""
KEPT = "states"
"""Subfolder of a saved selector."""


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
    if not with_model:
        return kept.read_texts(rows, name, None)
    folders = [context.run.path("selector", KEPT)]
    if context.resume_from is not None:
        folders += [context.resume_from / KEPT, context.resume_from / "selector" / KEPT]
    reader = kept.ModelReader(
        fingerprint=model_fingerprint(str(context.model_name)),
        folder=context.run.work("states"),
        earlier=lambda name: [folder / f"{name}.safetensors" for folder in folders],
        encode=context.encode,
        model=lambda: context.model,
    )
    return kept.read_texts(rows, name, reader)


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
