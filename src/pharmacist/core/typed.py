"""Validation of options by their types, such as ``Annotated[float, Gt(0), Le(1)]``."""

import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError

from pharmacist.core.console import plain
from pharmacist.core.errors import ConfigError


AtLeast0 = Annotated[int, Ge(0)]
AtLeast1 = Annotated[int, Ge(1)]
NotNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Gt(0), Le(1)]
"""A share that is not nothing, in (0, 1]."""
Fraction = Annotated[float, Ge(0), Le(1)]
"""A share, in [0, 1]."""

_LARGEST = 2**63 - 1
_OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}


class Given:
    """Base of objects that an option takes instead of a name or a mapping: opened rows, loaded models, methods."""

    label: Any
    """Text that stands for the object in messages and manifests."""


class Checked:
    """Base of options dataclasses, whose values are validated by the types of the fields."""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        hints = hints_of(kind)
        for field in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value = getattr(self, field.name)
            if "nargs" in field.metadata and not isinstance(value, list | tuple):  # one word need not be in a list
                value = None if value is None and NoneType in parts_of(hints[field.name]) else [value] if value else []
            object.__setattr__(self, field.name, checked(field.name, hints[field.name], value))

    def refuse_unused(self, *names: str, because: str) -> None:
        """Refuses options that the value of another one, `because`, makes useless, unless they have their defaults."""
        for field in fields(self):  # type: ignore[arg-type]
            if field.name in names and (value := getattr(self, field.name)) != default_of(field):
                raise ConfigError(
                    f"{field.name} {value}: has no effect with {because} {getattr(self, because)}; "
                    "change that, or leave it out"
                )


def default_of(field: "Field[Any]") -> Any:
    """The default value of a field; `MISSING` if it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


@cache
def hints_of(options: Any) -> dict[str, Any]:
    """Field -> type, ranges included."""
    return get_type_hints(options, include_extras=True)


_adapter = cache(TypeAdapter)


def checked(name: str, hint: Any, value: Any) -> Any:
    """Validates a value; converts paths to text, tuples to lists, what is NumPy's and, for floats, whole numbers.

    A ConfigError, in which the option is called `name`, where it is of another type than `hint`, out of its range, a
    number that no library can compute with, or text that no file can hold.
    """
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, hint):
            raise _refused(name, value, f"must be an instance of {hint.__name__}")
        return value
    if any(isinstance(one, Given) for one in (value if isinstance(value, list) else [value])):
        return value
    value = _plain(value)
    try:
        found = _adapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        out_of_range = any(found["type"] in _OUT_OF_RANGE for found in error.errors(include_url=False))
        raise _refused(name, value, _range(hint) if out_of_range else f"must be {described(hint)}") from error
    _check_values(name, found)
    return found


def _plain(value: Any) -> Any:
    """A path as text, a tuple as a list, and the arrays and numbers of NumPy as Python's, within others too."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict) and not isinstance(value, Given):
        return {key: _plain(one) for key, one in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def _refused(name: str, value: Any, expected: str) -> ConfigError:
    """The error for a value, in the notation of the command line or of Python."""
    shown = cut(str(value))
    return ConfigError(f"{name} {shown}: {expected}" if name.startswith("--") else f"{name} {expected}, not {shown}")


def _check_values(name: str, value: Any) -> None:
    """Refuses numbers that no library can compute with, and text that no file can hold or be called."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_values(f"{name}.{key}", inner)
    elif isinstance(value, list):
        for inner in value:
            _check_values(name, inner)
    elif isinstance(value, str):
        if "\0" in value or any("\ud800" <= one <= "\udfff" for one in value):
            raise ConfigError(f"{name} {cut(plain(value))}: holds a null character, or bytes that are not UTF-8")
    elif isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        raise ConfigError(f"{name} {cut(str(value))}: is too large; whole numbers go up to {_LARGEST}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise _refused(name, value, "must be a finite number")


def cut(text: str) -> str:
    """A text as messages show it, shortened, on one line."""
    text = text.replace("\n", " ")
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def parts_of(hint: Any) -> list[Any]:
    """The alternatives of a type, without ranges; `None` is `NoneType`."""
    if get_origin(hint) is Annotated:
        return parts_of(get_args(hint)[0])
    if get_origin(hint) in {Union, UnionType}:
        return [part for kind in get_args(hint) for part in parts_of(kind)]
    return [hint]


def described(hint: Any) -> str:
    """A type as messages name it."""
    known: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    known |= {list: "a list, written [a, b]", dict: "keys and values, written {a: b}"}
    known |= {list[int]: "a list of whole numbers, written [1, 2]", list[float]: "a list of numbers, written [0.1, 2]"}
    kinds = [
        f"one of {', '.join(map(str, get_args(part)))}"
        if get_origin(part) is Literal
        else known.get(part) or known.get(get_origin(part), "of another type")
        for part in parts_of(hint)
        if part is not NoneType
    ]
    return " or ".join(dict.fromkeys(kinds))


def _range(hint: Any) -> str:
    """The range of a type as messages name it."""
    if get_origin(hint) is not Annotated:
        return next(filter(None, map(_range, get_args(hint))), "")
    at: dict[Any, Any] = {type(limit): getattr(limit, type(limit).__name__.lower()) for limit in get_args(hint)[1:]}
    if len(at) == 2:
        low, high = sorted(at.values())
        return f"must lie in {'[' if Ge in at else '('}{low}, {high}{']' if Le in at else ')'}"
    ((kind, limit),) = at.items()
    if limit == 0 and kind in (Ge, Gt):
        return "must not be negative" if kind is Ge else "must be positive"
    return f"must be {({Ge: 'at least', Gt: 'above', Le: 'at most', Lt: 'below'})[kind]} {limit}"
