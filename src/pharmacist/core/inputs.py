"""What a run reads must not lie in the folder that it writes, and that overwriting empties."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import read_json
from pharmacist.core.typed import flag


def check_outside(root: Path, options: Any, *, within: str = "") -> None:
    """Refuses options that name something in a folder, or a model that rests on something in it, by a ConfigError.

    Args:
        root: The output folder; it need not exist.
        options: A dataclass. Every text in it that is the path of something counts (also within ``NAME:PATH`` and
            ``FOLDER:SPLIT``), so that no command has to say what it reads, but those of the options in ``NO_PLACES``,
            which are names also where the output folder is called so.
        within: Option of which these are the parts, such as ``evaluate.``.
    """
    folder = os.path.realpath(root)
    if not os.path.isdir(folder):
        return
    # Among a method's options a text that is the folder's own path is more often a name, unless a model lies there.
    names = ("adapter", "model", "config.json", "adapter_config.json")
    inner = any(os.path.exists(os.path.join(folder, name)) for name in names)
    for name, text, itself in _texts(options, inner):
        for place in _places(text):
            if _is_in(place, folder, itself=itself):
                refuse(f"{flag(within + name)} {text}", root)
            for base in _bases(place):
                if _is_in(base, folder, itself=True):
                    refuse(f"{flag(within + name)} {text}: its base model {base}", root)


def refuse(what: str, root: Path) -> None:
    """Says that an input lies in the output folder, by a ConfigError."""
    raise ConfigError(
        f"{what}: lies in the output folder {root}, where results go and which --overwrite empties; move it, or "
        "choose another --output-dir"
    )


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether a path, or what it links to, is a folder or lies in it."""
    return os.path.exists(path) and _is_in(str(path), os.path.realpath(folder), itself=True)


def _texts(options: Any, inner: bool) -> Iterator[tuple[str, str, bool]]:
    """Names and texts of options, and whether the text may be the output folder itself; `inner` for mappings."""
    hints = get_type_hints(type(options))
    names = frozenset().union(*(vars(base).get("NO_PLACES", ()) for base in type(options).__mro__))
    for field in fields(options):
        name, value = field.name, getattr(options, field.name)
        if get_origin(hints[name]) is not Literal:
            itself = name not in names and (inner or not isinstance(value, Mapping))
            yield from ((where, text, itself) for where, text in _nested(name, value))


def _nested(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "name":  # of a method
                yield from _nested(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _nested(name, inner)


def _places(text: str) -> list[str]:
    parts = {text, text.rpartition(":")[0], text.partition(":")[2]}
    paths = (os.path.expanduser(part) for part in parts if part)
    return [path for path in paths if os.path.exists(path)]


def _is_in(path: str, folder: str, itself: bool) -> bool:
    parent, name = os.path.split(os.path.abspath(path))
    # A link in the folder would go, even though what it points to would stay.
    found = (os.path.realpath(path), os.path.join(os.path.realpath(parent), name))
    return any((itself and one == folder) or one.startswith(os.path.join(folder, "")) for one in found)


def _bases(place: str) -> Iterator[str]:
    """What an adapter in a folder rests on, and what that does."""
    seen: set[str] = set()
    while place not in seen:
        seen.add(place)
        for folder in (os.path.join(place, "adapter"), place):
            try:
                base = read_json(os.path.join(folder, "adapter_config.json"))["base_model_name_or_path"]
            except (DataError, OSError, KeyError, TypeError):  # the loader says what is wrong with it
                continue
            if isinstance(base, str) and os.path.isdir(base):
                yield base
                place = base
            break
