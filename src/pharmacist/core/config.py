"""Joins our options dataclasses to YAML and the command line through jsonargparse.

Every option is declared once, as a typed dataclass field with a docstring below it. Three kinds of field:
plain ones become ``--name-with-hyphens``; a field that is itself a dataclass, or a plain ``dict``, becomes dotted
options (``--lora.r 8``, ``--train.max_steps 20``); a `method` field names a registered method, whose own options
follow as ``--selector.gamma 0.5``. The field with the metadata ``first`` takes the first word where that is no option.
"""

import argparse
import copy
import dataclasses
import difflib
import inspect
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import check_ordinary
from pharmacist.core.inputs import flag as flag
from pharmacist.core.inputs import is_inside, refuse
from pharmacist.core.registry import Registry


T = TypeVar("T")

set_parsing_settings(docstring_parse_attribute_docstrings=True)

_LARGEST = 2**63 - 1


def method(default: str, registry: str, *, short: tuple[str, ...] = ()) -> Any:
    """A field that holds a method and its options as ``{"name": ..., **options}``.

    Args:
        default: The method used where none is named.
        registry: ``"module:NAME"`` of its `Registry`, imported only when needed.
        short: Options of its methods that may be given without the field's name in front.
    """
    metadata = {"registry": registry, "default": default, "short": short}
    return dataclasses.field(default_factory=lambda: {"name": default}, metadata=metadata)


def _registry(field: "dataclasses.Field[Any]") -> Registry[Any]:
    module, _, attribute = field.metadata["registry"].partition(":")
    registry: Registry[Any] = getattr(import_module(module), attribute)
    return registry


def _docs(options: type[Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed(options.__mro__):
        if dataclasses.is_dataclass(base):
            found |= {p.arg_name: p.description or "" for p in parse_from_object(base).params}
    return found


def _methods(options: type[Any]) -> dict[str, "dataclasses.Field[Any]"]:
    return {field.name: field for field in dataclasses.fields(options) if "registry" in field.metadata}


def _short(methods: Mapping[str, "dataclasses.Field[Any]"]) -> dict[str, tuple[str, str]]:
    """Short names -> field and option."""
    return {name: (field, name) for field, of in methods.items() for name in of.metadata["short"]}


def _described(hint: Any) -> str:
    """A type as messages name it."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in {Union, UnionType}:
        return " or ".join(_described(kind) for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) in {list, tuple}:
        return "a list, written [a, b]"
    if get_origin(hint) is dict:
        return "keys and values, written {a: b}"
    known = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return known.get(hint, "of another type")


def _nearest(name: str, known: Iterable[str], prog: str) -> str:
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean '{match[0]}'?" if match else f"see {prog} --help"


class _Parser(ArgumentParser):
    """Raises one-line `ConfigError`s instead of printing usage and exiting."""

    hints: Mapping[str, Any]
    """Option (dotted, with underscores) -> its type."""
    several: frozenset[str]
    """Options that take several words."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ConfigError(self.one_line(message))

    def format_help(self, *formatter: Any) -> str:
        """The help, with methods as they are chosen: ``--selector NAME``."""
        text: str = super().format_help(*formatter)
        return re.sub(r"(--[\w-]+)\.name NAME( {2})?", lambda it: f"{it[1]} NAME{' ' * 7 if it[2] else ''}", text)

    def one_line(self, message: str) -> str:
        """What is wrong, in our words."""
        message = " ".join(message.split())
        if match := re.search(r"[Uu]nrecognized arguments: ([^\s=]+)", message):
            if not match[1].startswith("-"):
                return f"'{match[1]}' belongs to no option; quote values that hold spaces"
            known = [flag(name).lstrip("-") for name in self.hints]
            return f"unknown option '{match[1]}'; " + _nearest(match[1].lstrip("-"), known, self.prog).replace(
                "did you mean '", "did you mean '--"
            )
        if match := re.search(r"arguments are required: (.*)", message):
            missing = " and ".join(flag(name) for name in match[1].split(", "))
            return f"{missing} must be given; see {self.prog} --help"
        if match := re.search(r"argument (--\S+): expected one argument", message):
            return f"{flag(match[1].lstrip('-').removesuffix('.name'))} needs a value"
        if match := re.search(r"key \"([\w.]+)\":.* value: (.*)", message):
            return f"{flag(match[1])} {_cut(match[2])}: must be {_described(self.hints.get(match[1]))}"
        return message


class _Formatter(DefaultHelpFormatter):
    """Breaks no file name in two: examples are there to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(
            " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )


def _parser(options: type[Any], chosen: Mapping[str, str], prog: str, description: str, example: str) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=f"example: {example}",
        exit_on_error=False,
        add_help=True,
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with the same keys; options on the line win")
    hints, docs = get_type_hints(options), _docs(options)
    known: dict[str, Any] = {"config": str}
    for field in dataclasses.fields(options):
        doc = docs.get(field.name)
        own = None
        if field.name in chosen:
            names = ", ".join(_registry(field).names())
            own = _registry(field).config_type(chosen[field.name])
            parser.add_argument(f"--{field.name}.name", default=chosen[field.name], help=f"{doc} One of: {names}.")
            known |= {field.name: str, f"{field.name}.name": str}
        elif dataclasses.is_dataclass(hints[field.name]):
            own = hints[field.name]
        elif hints[field.name] is bool:
            parser.add_argument(flag(field.name), action=ActionYesNo(no_prefix="no-"), default=field.default, help=doc)
            known[field.name] = bool
        else:
            factory = field.default_factory
            default = factory() if factory is not dataclasses.MISSING else field.default
            required = default is dataclasses.MISSING
            several = {"nargs": field.metadata["nargs"], "action": "extend"} if "nargs" in field.metadata else {}
            parser.add_argument(
                flag(field.name),
                type=str if several else hints[field.name],
                help=doc,
                required=required,
                default=None if required else default,
                **several,
            )
            known[field.name] = hints[field.name]
        if own is not None:
            parser.add_class_arguments(own, field.name, help=doc)
            inner = dict(_inner_hints(own, field.name))
            groups = {field.name} | {name for name, hint in inner.items() if dataclasses.is_dataclass(hint)}
            known |= {name: hint for name, hint in inner.items() if name not in groups}
            for action in parser._actions:
                if action.dest in groups:  # jsonargparse's own way to give a group as a file; `--config` does that
                    action.help = argparse.SUPPRESS
    parser.hints = known
    parser.several = frozenset(field.name for field in dataclasses.fields(options) if "nargs" in field.metadata)
    return parser


def _inner_hints(options: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted names of the fields of a dataclass, those of dataclasses within it too, and their types."""
    for name, hint in get_type_hints(options).items():
        yield f"{prefix}.{name}", hint
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _inner_hints(hint, f"{prefix}.{name}")


@cache
def _kept_parser(options: type[Any], chosen: tuple[tuple[str, str], ...], prog: str, example: str) -> _Parser:
    # Making one takes a tenth of a second, and a grid is read with hundreds.
    return _parser(options, dict(chosen), prog, inspect.getdoc(options) or "", example)


def _read_yaml(path: str) -> dict[str, Any]:
    check_ordinary(path, f"--config {path}")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--config {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except RecursionError as error:
        raise ConfigError(f"--config {path}: not usable YAML, it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a whole number of thousands of digits
        raise ConfigError(f"--config {path}: not valid YAML ({' '.join(str(error).split())[:300]})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: needs keys and values at its top level")
    return content


def parse(options: type[T], arguments: Sequence[str], *, prog: str = "pharmacist", example: str = "") -> T:
    """Reads command-line arguments (and the YAML file they name) into an options dataclass.

    Args:
        options: The dataclass.
        arguments: Words of the command line without the command's name.
        prog: Shown in the help.
        example: Shown at the end of the help.

    Raises:
        ConfigError: Unknown or ill-typed options, unknown keys in the file, required ones missing.
        SystemExit: ``--help``.
    """
    words, path, named = _normalised(options, _methods(options), arguments)
    config = {} if path is None else _read_yaml(path)
    found = _parsed(options, config, f"--config {path}", words, named, prog, example)
    output = getattr(found, "output_dir", None)
    if path is not None and output is not None and getattr(found, "overwrite", False) and is_inside(path, output):
        refuse(f"--config {path}", Path(output))
    return found


def from_mapping(options: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Reads keys and values, as a YAML file holds them, into an options dataclass; checked like a command line.

    Args:
        options: The dataclass.
        values: Its fields, or some of them.
        where: Where they come from, for messages.

    Raises:
        ConfigError: Unknown or ill-typed keys, required ones missing.
    """
    try:
        return _parsed(options, dict(values), where, [], {}, "", "")
    except ConfigError as error:
        text = str(error)
        raise type(error)(text if text.startswith(where) else f"{where}: {text}") from error


def _parsed(
    options: type[T],
    config: dict[str, Any],
    where: str,
    words: Sequence[str],
    named: Mapping[str, str],
    prog: str,
    example: str,
) -> T:
    """Options from keys and values and from the words of a command line, which win."""
    methods, hints = _methods(options), get_type_hints(options)
    chosen = {name: str(field.metadata["default"]) for name, field in methods.items()}
    for key in list(config):
        if str(key).replace("-", "_") in _short(methods):
            field_name, option = _short(methods)[str(key).replace("-", "_")]
            own = config.get(field_name) or {}
            config[field_name] = ({"name": own} if isinstance(own, str) else dict(own)) | {option: config.pop(key)}
    # Method names must be known before the parser can be made, since they decide which options there are.
    for name in methods:
        choice = config.pop(name, None)
        if choice is not None:
            choice = {"name": choice} if isinstance(choice, str) else choice
            if not isinstance(choice, Mapping) or not isinstance(choice.get("name", ""), str):
                raise ConfigError(f"{where}: '{name}' needs the name of a method, or name and options of one")
            chosen[name] = choice.get("name", chosen[name])
        if named.get(name, chosen[name]) != chosen[name]:
            choice = None  # another method on the line: the file's options are not its own
        chosen[name] = named.get(name, chosen[name])
        config |= {name: choice} if choice is not None else {}
    parser = _kept_parser(options, tuple(chosen.items()), prog, example)  # type: ignore[arg-type]  # it is hashable
    # An option of several words goes on where it is given again, so the file's words must not come before the line's.
    given = {word.partition("=")[0] for word in words}
    again = {name for name in parser.several if flag(name) in given}
    config = {key: value for key, value in config.items() if str(key).replace("-", "_") not in again}
    before = _config_words(parser, config, where)
    try:
        parsed = parser.parse_args([*before, *words])
    except RecursionError as error:
        raise ConfigError("an option's value is nested too deeply; options need a few levels") from error
    except (argparse.ArgumentError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(parser.one_line(str(error))) from error
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value = parsed[field.name]
        if isinstance(value, Namespace):
            value = value.as_dict()
            if field.name not in methods:
                value = hints[field.name](**value)
        _check_numbers(flag(field.name), value)
        values[field.name] = copy.deepcopy(value)  # a default is the parser's own
    return options(**values)


def _check_numbers(name: str, value: Any) -> None:
    """Refuses numbers that no library can compute with."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_numbers(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_numbers(name, inner)
    elif isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        raise ConfigError(f"{name} {_cut(str(value))}: is too large; whole numbers go up to {_LARGEST}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} {value}: must be a finite number")


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def _normalised(
    options: type[Any], methods: Mapping[str, Any], arguments: Sequence[str]
) -> tuple[list[str], str | None, dict[str, str]]:
    """The words as the parser wants them, the path of the YAML file, and the methods named on the line."""
    hints = get_type_hints(options)
    leading = [field.name for field in dataclasses.fields(options) if field.metadata.get("first")]
    if leading and arguments and not arguments[0].startswith("-"):
        arguments = [flag(leading[0]), *arguments]
    words: list[str] = []
    path, named = None, {}
    for position, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            # Underscores are accepted for hyphens, so that YAML keys and Python names work as options too.
            head, dot, rest = name[2:].partition(".")
            field = head.replace("-", "_") + dot + rest
            if field in _short(methods):
                field = ".".join(_short(methods)[field])
            following = value if equals else "".join(arguments[position + 1 : position + 2])
            if field == "config":
                if not following:
                    raise ConfigError("--config needs the path of a YAML file")
                path = following
            elif field.removesuffix(".name") in methods:
                field = field.removesuffix(".name")
                named[field] = following
                field += ".name"
            elif dataclasses.is_dataclass(hints.get(field)):
                first = dataclasses.fields(hints[field])[0].name
                raise ConfigError(f"{name} has options of its own, such as {name}.{first}")
            name = f"--{field}" if field.partition(".")[0] in methods else flag(field)
        words.append(f"{name}{equals}{value}")
    return words, path, named


def _config_words(parser: _Parser, config: Mapping[str, Any], where: str, prefix: str = "") -> list[str]:
    """The file's content as words that come before those of the line, so that both are checked alike."""
    words: list[str] = []
    for key, value in config.items():
        name = prefix + str(key).replace("-", "_")
        if any(known.startswith(name + ".") for known in parser.hints):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: key '{name}' needs keys and values of its own")
            words += _config_words(parser, value, where, name + ".")
        elif name not in parser.hints or name == "config":
            known = sorted(set(parser.hints) - {"config"})
            raise ConfigError(f"{where}: unknown key '{name}'; {_nearest(name, known, parser.prog)}")
        elif name in parser.several and isinstance(value, list):
            words += [flag(name), *map(str, value)] if value else []
        elif parser.hints[name] is bool and not prefix:
            if not isinstance(value, bool):
                raise ConfigError(f"{where}: {name} {value}: must be true or false")
            words.append(flag(name if value else "no_" + name))
        elif isinstance(value, str):
            # Numbers such as 5e-4, which YAML takes for text, are left to the parser, which knows the type.
            words.append(f"{_word(parser, name)}={value}")
        elif value is not None:  # null: not given
            text = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize)
            words.append(f"{_word(parser, name)}={text.removesuffix('...' + chr(10)).strip()}")
    return words


def _word(parser: _Parser, name: str) -> str:
    # A method's options go by its field's own name, as jsonargparse makes them.
    return f"--{name}" if f"{name.partition('.')[0]}.name" in parser.hints else flag(name)
