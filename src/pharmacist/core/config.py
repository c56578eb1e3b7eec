"""Joins our options dataclasses to YAML and the command line through jsonargparse.

Every option is declared once, as a typed dataclass field with a docstring below it. Three kinds of field:
plain ones become ``--name-with-hyphens``; a field that is itself a dataclass, or a plain ``dict``, becomes dotted
options (``--lora.r 8``, ``--train.max_steps 20``); a `method` field names a registered method, whose own options
follow as ``--selector.gamma 0.5``.
"""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.registry import Registry, closest


T = TypeVar("T")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def method(default: str, registry: str) -> Any:
    """A field that holds a method and its options as ``{"name": ..., **options}``.

    Args:
        default: The method used where none is named.
        registry: ``"module:NAME"`` of its `Registry`, imported only when needed.
    """
    return dataclasses.field(default_factory=lambda: {"name": default}, metadata={"registry": registry})


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


class _Parser(ArgumentParser):
    """Raises one-line `ConfigError`s instead of printing usage and exiting."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ConfigError(self._one_line(message))

    def _one_line(self, message: str) -> str:
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        match = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
        if match:
            option = match[1].split("=")[0]
            return f"unknown option '{option}'{closest(option, known) if option.startswith('-') else ''}"
        match = re.search(r"[Kk]ey \"?'?([\w.]+)\"?'? is not expected", message)
        if match:
            names = [option.lstrip("-").replace("-", "_") for option in known]
            return f"unknown key '{match[1]}'{closest(match[1], names)}"
        return " ".join(message.split())


def _parser(options: type[Any], chosen: Mapping[str, str], prog: str, description: str, example: str) -> _Parser:
    parser = _Parser(
        prog=prog, description=description, epilog=f"example: {example}", exit_on_error=False, add_help=True
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with the same keys; options on the line win")
    hints, docs = get_type_hints(options), _docs(options)
    for field in dataclasses.fields(options):
        flag, doc = "--" + field.name.replace("_", "-"), docs.get(field.name)
        if field.name in chosen:
            names = ", ".join(_registry(field).names())
            parser.add_argument(f"--{field.name}.name", default=chosen[field.name], help=f"{doc} One of: {names}.")
            parser.add_class_arguments(_registry(field).config_type(chosen[field.name]), field.name)
        elif dataclasses.is_dataclass(hints[field.name]):
            parser.add_class_arguments(hints[field.name], field.name, help=doc)
        elif field.default is False:
            parser.add_argument(flag, action="store_true", help=doc)
        else:
            factory = field.default_factory
            default = factory() if factory is not dataclasses.MISSING else field.default
            required = default is dataclasses.MISSING
            parser.add_argument(
                flag, type=hints[field.name], help=doc, required=required, default=None if required else default
            )  # fmt: skip
    return parser


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--config {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: needs keys and values at its top level")
    return content


def _split_option(word: str) -> tuple[str, str | None]:
    name, equals, value = word.partition("=")
    return name, value if equals else None


def parse(
    options: type[T], arguments: Sequence[str], *, prog: str = "pharmacist", example: str = ""
) -> T:  # fmt: skip
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
    methods = _methods(options)
    words, config = [], {}
    chosen = {name: str(field.default_factory()["name"]) for name, field in methods.items()}  # type: ignore[misc]
    arguments = list(arguments)
    # Method names must be known before the parser can be made, since they decide which options there are.
    for position, word in enumerate(arguments):
        name, value = _split_option(word)
        following = arguments[position + 1] if position + 1 < len(arguments) else None
        if name == "--config":
            path = value if value is not None else following
            if path is None:
                raise ConfigError("--config needs the path of a YAML file")
            config = _read_yaml(path)
        if name.startswith("--"):
            # Underscores are accepted for hyphens, so that YAML keys and Python names work as options too.
            head, dot, rest = name[2:].partition(".")
            name = f"--{head if dot else head.replace('_', '-')}{dot}{rest}"
            name += ".name" if name[2:] in methods else ""
        words.append(name if value is None else f"{name}={value}")
    for name in methods:
        if isinstance(config.get(name), str):
            config[name] = {"name": config[name]}
        chosen[name] = (config.get(name) or {}).get("name", chosen[name])
        for position, word in enumerate(words):
            option, value = _split_option(word)
            if option == f"--{name}.name":
                chosen[name] = value if value is not None else (words[position + 1 : position + 2] or [""])[0]
    parser = _parser(options, chosen, prog, inspect.getdoc(options) or "", example)
    try:
        if config:
            parser.set_defaults(_flatten(parser, config))
        parsed = parser.parse_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(parser._one_line(str(error))) from error
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(parser._one_line(str(error))) from error
    hints = get_type_hints(options)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value = parsed[field.name]
        if isinstance(value, Namespace):
            value = value.as_dict()
            if field.name not in methods:
                value = hints[field.name](**value)
        values[field.name] = value
    return options(**values)


def _flatten(parser: _Parser, config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested configuration as far down as the parser has options."""
    known = {action.dest for action in parser._actions}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        dotted = prefix + str(key)
        inner = any(name.startswith(dotted + ".") for name in known)
        if isinstance(value, Mapping) and inner:
            flat |= _flatten(parser, value, dotted + ".")
        elif dotted in known and dotted != "config":
            flat[dotted] = value
        else:
            raise ConfigError(f"unknown key '{dotted}' in the --config file{closest(dotted, known)}")
    return flat
