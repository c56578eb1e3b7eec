"""Model names: Hub ids, and folders with whole weights or with an adapter that names its base model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pharmacist.core.errors import CompatibilityError, DataError, one_line
from pharmacist.core.files import check_ordinary, read_json
from pharmacist.core.manifest import read_manifest
from pharmacist.data.templates import FILE_NAME as TEMPLATE_FILE


_WITHOUT_WEIGHTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"}
_WITHOUT_WEIGHTS |= {"CPT", "CARTRIDGE"}
"""Kinds of adapters that change no weights, so that they cannot be merged."""
_LONG = 200
"""Characters that no Hub id has, and that the name of a file may exceed."""


@dataclass(frozen=True)
class ModelSource:
    """The plain base model of a model, or one of the adapters on it.

    Attributes:
        name: Hub id or folder.
        named_by: Folder of the adapter whose base model it is; None of the last one.
    """

    name: str
    named_by: Path | None = None

    @property
    def adapter(self) -> Path | None:
        """Folder of the adapter; None of the plain base model."""
        return adapter_folder(Path(self.name))

    @property
    def weights(self) -> str:
        """The Hub id, or the folder of whole weights, for transformers to load."""
        return str(weights_folder(Path(self.name))) if Path(self.name).is_dir() else self.name

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """A block whose errors about this model name the file and the key that lead to it."""
        try:
            yield
        except DataError as error:
            if self.named_by is None or not str(error).startswith(f"{self.name}: "):
                raise
            what = str(error).partition(";")[0]
            raise DataError(f"{_key(self.named_by)} names {what}; set it to where the base model is now") from error


def lineage(name: str) -> list[ModelSource]:
    """The plain base model that a name leads to, and the adapters on it, the outermost last.

    Raises:
        DataError: One of them cannot be a model, or an adapter is its own base.
        CompatibilityError: An adapter that changes no weights.
    """
    found: list[ModelSource] = []
    while True:
        source = ModelSource(name, found[-1].adapter if found else None)
        with source.blamed():
            _check_name(name)
        adapter = source.adapter
        if adapter is None:
            return [source, *reversed(found)]
        if source.named_by and adapter.resolve() in {one.adapter.resolve() for one in found if one.adapter}:
            raise DataError(
                f"{_key(source.named_by)} names {name}, the adapter itself; set it to the model that it was trained on"
            )
        found.append(source)
        name = base_name(adapter)


def adapter_folder(folder: Path) -> Path | None:
    """The folder, or its subfolder ``adapter``, if it holds a PEFT adapter; else None."""
    found = (at for at in (folder / "adapter", folder) if (at / "adapter_config.json").is_file())
    return next(found, None)


def weights_folder(folder: Path) -> Path:
    """The subfolder ``model`` if it holds whole weights, else the folder."""
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def is_output(folder: Path) -> bool:
    """Whether whole weights were written by an earlier stage, so that they move with its output folder."""
    weights = weights_folder(folder).resolve()
    parents = list(weights.parents)[:3]  # RUN/model, RUN/snapshots/step-N/model
    return (weights / TEMPLATE_FILE).is_file() and any((parent / "manifest.json").is_file() for parent in parents)


def base_name(adapter: Path) -> str:
    """The base model that an adapter's configuration names; a relative path may start at the adapter's folder.

    Raises:
        DataError: The configuration is damaged, or names none.
        CompatibilityError: An adapter that changes no weights.
    """
    path = adapter / "adapter_config.json"
    try:
        config = read_json(path)
    except (OSError, DataError) as error:
        reason = one_line(error.__cause__ or error)
        raise DataError(f"{path}: is damaged ({reason}); save the adapter again") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise DataError(f"{path}: names no kind of adapter (peft_type); save the adapter again")
    if kind in _WITHOUT_WEIGHTS:
        raise CompatibilityError(
            f"{path}: this kind of adapter ({kind.lower().replace('_', ' ')}) has no weights that could be merged "
            "into its base model; give a LoRA adapter or a whole model"
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise DataError(f"{path}: names no base model; set base_model_name_or_path to the one it was trained on")
    relative = base.startswith(".") and not Path(base).is_dir() and (adapter / base).is_dir()
    return str((adapter / base).resolve()) if relative else base


def _key(adapter: Path) -> str:
    return f"{adapter}/adapter_config.json: base_model_name_or_path"


def _check_name(name: str) -> None:
    """Refuses what can be neither a Hub id nor a folder of weights or of an adapter, before anything is read."""
    folder = Path(name)
    exists = os.path.isdir(folder)
    check_ordinary(folder, name)
    if os.path.isfile(folder):
        raise DataError(f"{name}: is a file; a model folder or a Hub id is needed")
    if not name:
        raise DataError("the name of a model is empty; a model folder or a Hub id is needed")
    if not exists and (name.startswith((".", "/", "~")) or name.count("/") > 1 or len(name) > _LONG):
        raise DataError(f"{name}: no such folder; a model folder or a Hub id is needed")
    if exists and adapter_folder(folder) is None:
        for pattern, what in (("config.json", "config.json"), ("*.safetensors", "safetensors weights")):
            if not any(weights_folder(folder).glob(pattern)):
                raise DataError(_no_model(folder, name, what))


def _no_model(folder: Path, name: str, lacking: str) -> str:
    """Why a folder holds no model: that of a run may not be finished, or of a command that writes none."""
    if not (folder / "manifest.json").is_file():
        return f"{name}: a model folder without {lacking}; save it with model.save_pretrained"
    run = read_manifest(folder)
    if run.status == "started":
        return f"{name}: its run of '{run.stage}' is not finished; run the same command again to resume it"
    return f"{name}: a run of '{run.stage}' without a model; give the folder of an align, attack or repair"
