"""Functions of mappings."""

from collections.abc import Mapping
from typing import Any


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings merged, recursively; values of the second win.

    >>> merged({"train": {"max_steps": 1}}, {"train": {"seed": 2}})
    {'train': {'max_steps': 1, 'seed': 2}}
    """
    result = dict(first)
    for key, value in second.items():
        before = result.get(key)
        result[key] = merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return result


def under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors whose names begin so, without that beginning.

    >>> under("a.", {"a.x": 1, "b.x": 2})
    {'x': 1}
    """
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
