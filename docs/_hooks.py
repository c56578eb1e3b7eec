"""Writes what the docs must not restate: tables of commands, options and methods, from the code that declares them.

A line ``{{ options curate }}`` in a page becomes the table of that command's options, ``{{ methods curate }}`` the
methods that it knows with their own options, ``{{ train align }}`` its training defaults, ``{{ commands }}`` the table
of commands, ``{{ layers }}`` that of the packages with what they may import, from the test of it.
"""

import dataclasses
import inspect
import re
import runpy
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pharmacist.cli.main import COMMANDS
from pharmacist.core.config import docs_of, method_fields, offered, registry_of
from pharmacist.core.naming import flag
from pharmacist.core.rundir import RunOptions
from pharmacist.core.typed import parts_of


COMMON = [field.name for field in dataclasses.fields(RunOptions)]
REQUIRED = "required"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.split()) for cell in line) + " |" for line in lines)


def _escaped(text: object) -> str:
    return str(text).replace("|", "\\|")


def _code(text: object) -> str:
    return f"`{_escaped(text)}`"


def _kind(hint: Any, dotted: bool) -> str:
    """Values in words of the command line; nothing for a switch, which a dotted option is not."""
    if hint is bool:
        return "`true` `false`" if dotted else ""
    kinds: list[Any] = []
    for part in parts_of(hint):
        if part is not NoneType:
            named = inspect.formatannotation(part).replace("typing.", "")
            kinds += get_args(part) if get_origin(part) is Literal else [named]
    return " ".join(map(_code, kinds))


def _default(field: "dataclasses.Field[Any]", dotted: bool) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        value = value.get("name", "") if "registry" in field.metadata else value
    else:
        value = field.default
    if value is dataclasses.MISSING:
        return REQUIRED
    if isinstance(value, bool):
        return _code(str(value).lower()) if dotted or value else ""
    return "" if value is None or value in ("", {}, []) else _code(value)


def _options(options: type[Any], prefix: str = "", leave_out: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Rows of a table: a field that is a dataclass itself gives one row per option of its own."""
    hints, docs, rows = get_type_hints(options), docs_of(options), []
    for field in dataclasses.fields(options):
        if field.name in leave_out:
            continue
        if dataclasses.is_dataclass(hints[field.name]):
            rows += _options(hints[field.name], f"{prefix}{field.name}.")
            continue
        option, kind = flag(prefix + field.name), _kind(hints[field.name], bool(prefix))
        if "registry" in field.metadata:
            kind = " ".join(map(_code, offered(field)))
        elif get_origin(hints[field.name]) is dict:
            option, kind = f"{option}.NAME", ""
        rows.append((_code(option), kind, _default(field, bool(prefix)), _escaped(docs.get(field.name, ""))))
    return rows


HEAD = ("option", "values", "default", "meaning")


def options_of(name: str) -> type[Any]:
    """The options dataclass of a command."""
    return COMMANDS[name].options


def commands() -> str:
    """The table of commands."""
    rows = [
        (f"[`{name}`](../how-to/{command.page or name}.md)", command.summary) for name, command in COMMANDS.items()
    ]
    return _table(("command", "does"), rows)


def options(name: str) -> str:
    """The table of a command's own options; those that all commands share are at `common`."""
    own = options_of(name)
    shared = tuple(COMMON) if issubclass(own, RunOptions) else ()
    return _table(HEAD, _options(own, leave_out=shared))


def common() -> str:
    """The table of the options that every run has."""
    return _table(HEAD, _options(RunOptions))


def methods(name: str) -> str:
    """One section per method that a command can be told to use, with the method's own options."""
    parts = []
    for option, field in method_fields(options_of(name)).items():
        registry = registry_of(field)
        for method in offered(field):
            found = registry.get(method)
            about = inspect.getdoc(found) or ""
            if about.startswith("See the module"):
                about = inspect.getdoc(inspect.getmodule(found)) or ""
            about, rows = about.split("\n\n")[0], _options(registry.config_type(method), f"{option}.")
            parts += [f"### `{flag(option)} {method}`", about, _table(HEAD, rows) if rows else "It has no options."]
    return "\n\n".join(parts)


def train(name: str) -> str:
    """The table of a training command's own defaults for ``train.``."""
    defaults = options_of(name).TRAIN_DEFAULTS
    return _table(("option", "default"), [(_code(f"--train.{key}"), _code(value)) for key, value in defaults.items()])


def layers() -> str:
    """The table of packages and what each may import."""
    may_import = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "test_layers.py"))["MAY_IMPORT"]
    rows = [(_code(package), ", ".join(map(_code, sorted(others)))) for package, others in may_import.items()]
    return _table(("package", "may import, besides itself"), rows)


TABLES = {
    "commands": commands,
    "options": options,
    "common": common,
    "methods": methods,
    "train": train,
    "layers": layers,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page."""
    return re.sub(
        r"^\{\{ (\w+)(?: (\w+))? \}\}$",
        lambda found: TABLES[found[1]](*([found[2]] if found[2] else [])),
        markdown,
        flags=re.M,
    )
