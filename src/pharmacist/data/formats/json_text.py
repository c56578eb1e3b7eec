"""Strict JSON: parsing of rows, reasons why a text is no row, and rows as lines of JSON."""

import datetime
import decimal
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa


MAX_DEPTH = 100
"""Deepest nesting of lists and objects in a row of JSON."""

_KINDS: dict[Any, str] = {bool: "true or false", int | float: "a number", list: "a list", dict: "an object"}
_KINDS |= {str: "a text", bytes: "bytes", type(None): "null"}


class Refused(ValueError):
    """Text that Python's parser accepts although it is not valid or not unambiguous JSON."""


def _refuse_constant(constant: str) -> None:
    raise Refused(f"{constant} is not a JSON value; write null")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise Refused(f"the key {spelled(twice)} is given twice in one object")
    return found


DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)
"""Refuses NaN, infinities and keys that are there twice."""


def spelled(name: str) -> str:
    """A name from a file as messages show it: in quotes, shortened, with escapes for unprintable characters."""
    return ascii(name[:40]) + ("..." if len(name) > 40 else "")


def decode_json(text: str) -> Any:
    """Parses JSON strictly: a ValueError on NaN and on keys that are there twice, a RecursionError on deep nesting."""
    value = DECODER.decode(text)
    check_depth(value, text)
    return value


def check_depth(value: Any, text: str) -> None:
    """Refuses a value, parsed from `text`, that is nested deeper than `MAX_DEPTH`, by a RecursionError."""
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise RecursionError


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def as_row(value: Any) -> tuple[dict[str, Any] | None, str | None]:
    """Returns a JSON object and None, or for another value None and the reason why it is no row."""
    return (value, None) if isinstance(value, dict) else (None, f"is not a JSON object but {kind_of(value)}")


def kind_of(value: Any) -> str:
    """What a value is, as messages name it."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    return next((name for kind, name in _KINDS.items() if isinstance(value, kind)), type(value).__name__)


def why_no_json(error: Exception) -> str:
    """The reason why a text is no row, from the error that parsing it raised."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.object[error.start]:#04x} at byte {error.start + 1} of it)"
    if isinstance(error, Refused):
        return f"is not valid JSON ({error})"
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON ({error.msg} at column {error.colno})"
    return f"is not usable JSON ({'nested too deeply' if isinstance(error, RecursionError) else error})"


def fits_json(kind: pa.DataType) -> bool:
    """Whether JSON holds every value of an Arrow type."""
    types = pa.types
    if types.is_struct(kind):
        return all(fits_json(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return fits_json(kind.value_type)
    plain = ("string", "large_string", "integer", "floating", "boolean", "null")
    return any(getattr(types, f"is_{name}")(kind) for name in plain)


def json_line(value: Any) -> bytes:
    """A row as one line of JSON, with null for NaN and infinities; a TypeError or RecursionError on other values."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_as_json)
    except ValueError:
        text = json.dumps(_as_json(value), ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # JSON too spells a lone surrogate out so


def _as_json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if hasattr(value, "tolist"):
        return _as_json(value.tolist())
    raise TypeError(f"a value of the type {type(value).__name__}")
