"""Reads options dataclasses from YAML and the command line; the help comes from the same declaration.

Every option is declared once, as a typed dataclass field with a docstring below it. Three kinds of field:
plain ones become ``--name-with-hyphens``; a field that is itself a dataclass, or a plain ``dict``, becomes dotted
options (``--lora.r 8``, ``--train.max_steps 20``); a `method` field names a registered method, whose own options
follow as ``--selector.gamma 0.5``. The field with the metadata ``first`` takes the first word where that is no option.
"""

import argparse
import copy
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from docstring_parser import parse_from_object

from pharmacist.core.errors import ConfigError, DataError, one_line
from pharmacist.core.files import check_ordinary
from pharmacist.core.inputs import is_inside, refuse
from pharmacist.core.mappings import merged
from pharmacist.core.naming import flag
from pharmacist.core.registry import Registry, closest
from pharmacist.core.typed import checked, default_of, hints_of, parts_of


T = TypeVar("T")
Line = Mapping[str, list[list[str]]]
"""Field name of each option on the command line -> for each time it occurs, the words that follow it."""


def method(default: str, registry: str, *, short: tuple[str, ...] = (), within: tuple[str, ...] = ("",)) -> Any:
    """A field that holds a method and its options as ``{"name": ..., **options}``.

    Its registry, ``"module:NAME"``, is imported only when needed; `short` names options of its methods that can be
    written without the field's name in front. The help offers the registry's names `within` these modules.
    """
    metadata = {"registry": registry, "default": default, "short": short, "within": within}
    return field(default_factory=lambda: {"name": default}, metadata=metadata)


def registry_of(item: "Field[Any]") -> Registry[Any]:
    """The registry of a `method` field."""
    registry: Registry[Any] = resolve_name(item.metadata["registry"])
    return registry


def offered(item: "Field[Any]") -> list[str]:
    """The names that help and docs offer for a `method` field."""
    return registry_of(item).names(item.metadata["within"])


def method_fields(options: type[Any]) -> dict[str, "Field[Any]"]:
    """The `method` fields of an options dataclass."""
    return {item.name: item for item in fields(options) if "registry" in item.metadata}


@cache
def docs_of(options: Any) -> dict[str, str]:
    """Field -> its docstring."""
    found: dict[str, str] = {}
    for base in reversed(options.__mro__):
        if is_dataclass(base):
            found |= {p.arg_name: p.description or "" for p in parse_from_object(base).params}
    return found


def _shown_type(kind: Any) -> str:
    """A type as the help names it, without ranges: ``list[int]`` of a list of numbers from 1 on."""
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return f"list[{'|'.join(map(_shown_type, parts_of(*get_args(kind))))}]"
    return inspect.formatannotation(kind).replace("typing.", "")


class _Option:
    """One option: its name (dotted, with underscores), its type, its field and the dataclass that declares it."""

    def __init__(self, name: str, hint: Any, item: "Field[Any]", owner: Any) -> None:
        self.name, self.hint, self.item, self.owner = name, hint, item, owner
        self.several = "nargs" in item.metadata
        # Where it takes a list: the type of its values. They are words of their own, or one text, "[a, b]".
        self.of = next((get_args(part)[0] for part in parts_of(hint) if get_origin(part) is list), None)
        self.is_method = "registry" in item.metadata
        # It needs no value: --quiet or --no-quiet.
        self.is_switch = hint is bool and "." not in name
        # Keys of any name may follow, as --train.max_steps.
        self.is_mapping = get_origin(hint) is dict and not self.is_method

    @property
    def default(self) -> Any:
        """Default value; `MISSING` for a required option."""
        return default_of(self.item)

    def help(self) -> str:
        """Help text: docstring, type and default."""
        doc, about = docs_of(self.owner).get(self.item.name, ""), []
        if self.is_method:
            doc = f"{doc} One of: {', '.join(offered(self.item))}; {flag(self.name)} NAME --help lists its options."
        elif not self.is_switch:
            names = dict.fromkeys(_shown_type(kind) for kind in parts_of(self.hint) if kind is not NoneType)
            about.append(f"type: {'|'.join(names)}")
        default = self.default["name"] if self.is_method else self.default
        if default is MISSING:
            about.append("required")
        elif default not in (None, "", [], {}):
            about.append(f"default: {str(default).lower() if self.is_switch else default}")
        return f"{doc} ({', '.join(about)})".replace("%", "%%")


@cache
def _table(options: Any, chosen: tuple[tuple[str, str], ...] = (), prefix: str = "") -> dict[str, _Option]:
    """Options by name, with those of nested dataclasses and chosen methods; those of base classes come last."""
    found: dict[str, _Option] = {}
    inherited = {name for base in options.__mro__[1:] for name in vars(base).get("__annotations__", ())}
    for item in sorted(fields(options), key=lambda item: item.name in inherited):
        name, hint = prefix + item.name, hints_of(options)[item.name]
        if is_dataclass(hint):
            found |= _table(hint, (), f"{name}.")  # type: ignore[arg-type]
            continue
        found[name] = _Option(name, hint, item, options)
        if name in dict(chosen):
            config: Any = registry_of(item).config_type(dict(chosen)[name])
            found |= _table(config, (), f"{name}.")
    return found


class _Loader(yaml.SafeLoader):
    """Knows numbers such as 5e-4, which YAML 1.1 takes for text, and says where a value does not fit its tag."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (LookupError, AttributeError) as error:  # from PyYAML, for values such as `!!bool many`
            problem = f"the value does not fit {node.tag}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def whole_number(self, node: yaml.ScalarNode) -> int | str:
        """A whole number, where YAML 1.1 takes 010 for 8; 1:20, which it takes for 80, is text."""
        digits = str(node.value).replace("_", "")
        if ":" in digits:
            return str(node.value)
        return int(digits) if digits.lstrip("+-").isdecimal() else int(self.construct_yaml_int(node))


_SHORT_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+")
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole_number)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _SHORT_FLOAT, list("-+0123456789"))


class _Unquoted(str):
    """A number, truth value or date as a YAML file has it, for an option may take it as text."""


class _FileLoader(_Loader):
    """Keeps the text of scalars, and refuses a key that is given twice, of which PyYAML takes the last."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        kept = value is None or isinstance(value, str | list | dict | set)
        return value if kept else _Unquoted(node.value)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := _repeated(keys):
            raise yaml.MarkedYAMLError(problem=f"the key '{twice}' is given twice", problem_mark=node.start_mark)
        return node


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _from_text(hint: Any, text: str) -> Any:
    """The value of an option of a type from the command line's text."""
    parts = parts_of(hint)
    if text == "null" and NoneType in parts:
        return None
    named = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
    if str in parts or text in named or all(part is NoneType or get_origin(part) is Literal for part in parts):
        return text
    try:
        return yaml.load(text, Loader=yaml.BaseLoader if list[str] in parts else _Loader)
    except (yaml.YAMLError, ValueError):
        return text


def _from_file(option: _Option, value: Any) -> Any:
    """The value of an option from that of a YAML file."""
    if option.several:
        return [value] if isinstance(value, str) else [str(one) for one in value] if isinstance(value, list) else value
    if option.of is Any:  # entries, which are read by types of their own
        return value
    if str in parts_of(option.hint) and isinstance(value, bool | int | float):
        return yaml.safe_dump(value).splitlines()[0]
    return _from_text(option.hint, str(value)) if isinstance(value, str) else _resolved(value)


def _resolved(value: Any) -> Any:
    """The value of a YAML file with its numbers, truth values and dates."""
    if isinstance(value, dict):
        return {_resolved(key): _resolved(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner) for inner in value]
    return yaml.load(value, Loader=_Loader) if isinstance(value, _Unquoted) else value


def _read_yaml(path: str) -> dict[str, Any]:
    check_ordinary(path, f"--config {path}")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_FileLoader)
    except OSError as error:
        raise DataError(f"--config {path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--config {path}: cannot be read ({error}); save it as UTF-8") from error
    except RecursionError as error:
        raise ConfigError(f"--config {path}: not usable YAML, it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a whole number of thousands of digits
        raise ConfigError(f"--config {path}: not valid YAML ({one_line(error, 300)})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: needs keys and values at its top level")
    return content


def parse(options: type[T], arguments: Sequence[str], *, prog: str = "pharmacist", example: str = "") -> T:
    """Reads command-line arguments (and the YAML file they name) into an options dataclass.

    A ConfigError for unknown or ill-typed options, unknown keys in the file and required ones that are missing;
    ``--help`` ends in a SystemExit. `prog` and `example` are shown in the help.
    """
    line, path = _line(options, arguments), None
    if "config" in line:
        path, *more = [word for words in line.pop("config") for word in words] or [""]
        if more or not path:
            raise ConfigError(f"--config needs the path of {'a single' if more else 'a'} YAML file")
    config = {} if path is None else _read_yaml(path)
    found: T = _parsed(options, config, f"--config {path}", line, prog, example)
    output = getattr(found, "output_dir", None)
    if output is not None and not output.strip():
        raise ConfigError("--output-dir is empty; give a folder for the results")
    if path is not None and output is not None and getattr(found, "overwrite", False) and is_inside(path, output):
        refuse(f"--config {path}", Path(output))
    return found


def from_mapping(options: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Reads keys and values, as a YAML file holds them, into an options dataclass; checked like a command line.

    Raises the errors of `parse`, which begin with `where`, the origin of the values.
    """
    try:
        found: T = _parsed(options, dict(values), where, {}, "", "")
        return found
    except ConfigError as error:
        text = str(error)
        raise type(error)(text if text.startswith(where) else f"{where}: {text}") from error


def _line(options: type[Any], arguments: Sequence[str]) -> dict[str, list[list[str]]]:
    """Takes a command line apart, see `Line`."""
    leading = [item.name for item in fields(options) if item.metadata.get("first")]
    if leading and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{leading[0]}", *arguments]
    methods, found, words = method_fields(options), dict[str, list[list[str]]](), None
    short = {name: f"{of}.{name}" for of, item in methods.items() for name in item.metadata["short"]}
    for word in arguments:
        if word in ("-h", "--help"):
            found["help"] = []
        elif word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            name = short.get(name, name)
            name = name.removesuffix(".name") if name.removesuffix(".name") in methods else name
            words = [word.partition("=")[2]] if "=" in word else []
            found[name] = [*found.pop(name, []), words]  # at the end: of --quiet and --no-quiet the last one wins
        elif words is None:
            raise ConfigError(f"'{word}' belongs to no option; quote values that contain spaces")
        else:
            words.append(word)
    return found


def _parsed(options: Any, config: dict[str, Any], where: str, line: Line, prog: str, example: str) -> Any:
    """Options from keys and values and from a command line, which wins."""
    config = underscored(config, where)
    chosen = _chosen_methods(options, config, where, line)
    table = _table(options, tuple(chosen.items()))
    if "help" in line:
        _print_help(options, table, prog, example)
        raise SystemExit(0)
    try:
        values = _file_values(table, config, where, prog) | {field: {"name": name} for field, name in chosen.items()}
        _add_line_values(values, table, line, prog)
    except RecursionError as error:
        raise ConfigError("an option's value is nested too deeply; options need a few levels") from error
    missing = [flag(name) for name, option in table.items() if name not in values and option.default is MISSING]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given" + (f"; see {prog} --help" if prog else ""))
    tree: dict[str, Any] = {}
    for name, declared in table.items():
        _put(tree, name, values[name] if name in values else declared.default)
    return _built(options, tree)


def underscored(config: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Keys and values of a file, with `prefix` and without hyphens; a ConfigError where one is given twice."""
    keys = [prefix + str(key).replace("-", "_") for key in config]
    if twice := _repeated(keys):
        raise ConfigError(f"{where}: the key '{twice}' is given twice, once with a hyphen")
    return dict(zip(keys, config.values(), strict=True))


def _chosen_methods(options: Any, config: dict[str, Any], where: str, line: Line) -> dict[str, str]:
    """Field -> name of the method, which decides which options exist; only the options stay in `config`."""
    chosen = {}
    for name, item in method_fields(options).items():
        choice = config.pop(name, None)
        choice = {"name": choice} if isinstance(choice, str) else {} if choice is None else choice
        if not isinstance(choice, Mapping) or not isinstance(choice.get("name", ""), str):
            raise ConfigError(f"{where}: '{name}' needs the name of a method, or name and options of one")
        choice = {**choice, **{key: config.pop(key) for key in item.metadata["short"] if key in config}}
        in_file = choice.get("name", item.metadata["default"])
        chosen[name] = next(iter(line[name][-1]), in_file) if name in line else in_file
        if chosen[name] == in_file:  # else the line names another method, to which the file's options do not belong
            config[name] = {key: value for key, value in choice.items() if key != "name"}
    return chosen


def _suggested(table: Mapping[str, _Option]) -> list[str]:
    """What an unknown option may have meant: the options, and the keys of mappings whose keys are a dataclass's."""
    keys = {name: option.item.metadata["keys"] for name, option in table.items() if "keys" in option.item.metadata}
    return [*table, *(f"{name}.{key.name}" for name, of in keys.items() for key in fields(resolve_name(of)))]


def _file_values(
    table: Mapping[str, _Option], config: Mapping[str, Any], where: str, prog: str, prefix: str = ""
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in underscored(config, where, prefix).items():
        inner = any(known.startswith(f"{name}.") for known in table)
        if not inner and name not in table:
            nearest = closest(name, _suggested(table), prog and f"see {prog} --help")
            raise ConfigError(f"{where}: unknown key '{name}'{nearest}")
        if value is None:  # as if the key were not there
            continue
        if inner or table[name].is_method:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: key '{name}' needs keys and values of its own")
            values |= _file_values(table, value, where, prog, f"{name}.")
        else:
            values[name] = checked(flag(name), table[name].hint, _from_file(table[name], value))
    return values


def _add_line_values(values: dict[str, Any], table: Mapping[str, _Option], line: Line, prog: str) -> None:
    """Reads a command line into `values`."""
    switches = {f"no_{name}": name for name, option in table.items() if option.is_switch}
    for name, given in line.items():
        if name in switches:
            if any(given):
                raise ConfigError(f"{flag(name)} takes no value")
            name, given = switches[name], [["false"]]
        head = next((head for head, known in table.items() if known.is_mapping and name.startswith(f"{head}.")), "")
        option = table.get(name) or (head and _Option(name, Any, table[head].item, table[head].owner))
        if not option:
            if inner := [known for known in table if known.startswith(f"{name}.")]:
                raise ConfigError(f"{flag(name)} has options of its own, such as {flag(inner[0])}")
            nearest = closest(flag(name), map(flag, _suggested(table)), f"see {prog} --help")
            raise ConfigError(f"unknown option '{flag(name)}'{nearest}")
        given = [words or ["true"] for words in given] if option.is_switch else given
        if not all(given):
            raise ConfigError(f"{flag(name)} needs a value")
        stray = [] if option.of else [words[1] for words in given if len(words) > 1]
        if stray:
            raise ConfigError(f"'{stray[0]}' belongs to no option; quote values that contain spaces")
        if option.is_method:
            continue
        words = list(itertools.chain.from_iterable(given))
        if option.is_mapping:
            for word in words:
                more = checked(flag(name), option.hint, _from_text(option.hint, word))
                before = values.get(name) or option.default
                values[name] = merged(underscored(before, flag(name)), underscored(more, flag(name)))
            continue
        value: Any = words
        if not option.several:
            value = None if option.of and len(words) > 1 else _from_text(option.hint, words[-1])
            if option.of and not isinstance(value, list) and words != ["null"]:
                value = [_from_text(option.of, word) for word in words]
        value = checked(flag(name), option.hint, value)
        if head:
            values[head] = underscored(copy.deepcopy(values.get(head) or table[head].default), flag(head))
            _put(values[head], name.removeprefix(f"{head}."), value)
        else:
            values[name] = value


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    """Sets the value of a dotted name in nested mappings, where the text of a mapping with options is its name."""
    *path, last = name.split(".")
    for key in path:
        if isinstance(tree.get(key), str):
            tree[key] = {"name": tree[key]}
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"option '{name}': '{key}' has a value already, which is no mapping")
    before = tree.get(last)
    if isinstance(before, dict) and isinstance(value, str) and before.get("name", value) == value:
        value = before | {"name": value}
    tree[last] = value


def _built(options: Any, tree: Mapping[str, Any]) -> Any:
    """Builds an options dataclass, and those nested in it, from nested mappings."""
    hints = hints_of(options)
    return options(
        **{name: _built(hints[name], value) if is_dataclass(hints[name]) else value for name, value in tree.items()}
    )


def _print_help(options: type[Any], table: Mapping[str, _Option], prog: str, example: str) -> None:
    about, usage = inspect.getdoc(options), f"{prog} [options]"
    # As it is: an example is there to be copied.
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog, usage, about, f"example: {example}", formatter_class=plain)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with the same keys; options on the line win")
    for option in table.values():
        how: dict[str, Any] = {"metavar": option.name.rpartition(".")[2].upper()}
        if option.is_switch:
            how = {"action": argparse.BooleanOptionalAction}
        elif option.is_method or option.is_mapping:
            how = {"metavar": "NAME" if option.is_method else "VALUE"}
        elif option.of:
            how |= {"nargs": "+"}
        parser.add_argument(flag(option.name) + (".NAME" if option.is_mapping else ""), help=option.help(), **how)
    parser.print_help()
