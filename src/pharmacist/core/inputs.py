"""Check that the inputs of a run do not lie in its output folder, which overwriting empties."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import read_json
from pharmacist.core.naming import flag


def check_outside(root: Path, options: Any, *, within: str = "") -> None:
    """Refuses options that name something in a folder, or a model that rests on something in it, by a ConfigError.

    The folder, `root`, need not exist. Every text in `options`, a dataclass, that is the path of something counts
    (also within ``NAME:PATH`` and ``FOLDER:SPLIT``), so that no command has to say what it reads, but those of the
    options in ``NOT_PATHS``, which are names also where the output folder is called so. `within` is the option of
    which these are the parts, such as ``evaluate.``.
    """
    folder = os.path.realpath(root)
    if not os.path.isdir(folder):
        return
    # In a method's options a text that equals the path of the folder is rather a name, unless a model lies there.
    names = ("adapter", "model", "config.json", "adapter_config.json")
    inner = any(os.path.exists(os.path.join(folder, name)) for name in names)
    hints = get_type_hints(type(options))
    not_paths = frozenset().union(*(vars(base).get("NOT_PATHS", ()) for base in type(options).__mro__))
    for field in fields(options):
        value = getattr(options, field.name)
        itself = field.name not in not_paths and (inner or not isinstance(value, Mapping))
        for name, text in _texts(field.name, value) if get_origin(hints[field.name]) is not Literal else ():
            parts = {text, text.rpartition(":")[0], text.partition(":")[2]} - {""}
            for path in filter(os.path.exists, map(os.path.expanduser, parts)):
                if _is_in(path, folder, itself=itself):
                    refuse(f"{flag(within + name)} {text}", root)
                for base in _base_models(path):
                    if _is_in(base, folder, itself=True):
                        refuse(f"{flag(within + name)} {text}: its base model {base}", root)


def refuse(what: str, root: Path) -> None:
    """Raises the ConfigError for an input that lies in the output folder."""
    raise ConfigError(
        f"{what}: lies in the output folder {root}, which --overwrite empties; move it, or choose another --output-dir"
    )


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether a path, or what it links to, is a folder or lies in it."""
    return os.path.exists(path) and _is_in(str(path), os.path.realpath(folder), itself=True)


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The texts in an option, each with the name of the option within it."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "name":  # of a method
                yield from _texts(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(name, inner)


def _is_in(path: str, folder: str, itself: bool) -> bool:
    parent, name = os.path.split(os.path.abspath(path))
    # A link in the folder would be deleted, although its target would not.
    found = (os.path.realpath(path), os.path.join(os.path.realpath(parent), name))
    return any((itself and one == folder) or one.startswith(os.path.join(folder, "")) for one in found)


def _base_models(path: str, *seen: str) -> Iterator[str]:
    """The local base models of the adapter in a folder: its own, that of an adapter which is its base, and so on."""
    for folder in (os.path.join(path, "adapter"), path):
        try:
            base = read_json(os.path.join(folder, "adapter_config.json"))["base_model_name_or_path"]
        except (DataError, OSError, KeyError, TypeError):  # the loader says what is wrong with it
            continue
        if isinstance(base, str) and base.startswith(".") and not os.path.isdir(base):
            base = os.path.normpath(os.path.join(os.path.realpath(folder), base))  # it starts at the adapter's folder
        if isinstance(base, str) and os.path.isdir(base) and base not in seen:
            yield base
            yield from _base_models(base, path, *seen)
        return
