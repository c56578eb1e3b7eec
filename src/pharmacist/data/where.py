"""Choice of rows by the value of a column: ``--where label=true``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.data.formats import Source, spelled


_SOURCES = frozenset({"pool", "safe", "harmful", "utility", "data", "task"})


@dataclass(frozen=True)
class Condition:
    """A value that a column must have.

    Attributes:
        column: The column.
        value: The value as text: true, false, a number, NaN, null or a text.
        of: The one source that it applies to (``harmful`` for ``--harmful``); None for all that have the column.
        number: That of the class with this name, where the column is a `datasets.ClassLabel`, whose cells are numbers.
    """

    column: str
    value: str
    of: str | None = None
    number: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.column}={self.value}"

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has the value; a TypeError for a list, an object or bytes, which no value equals."""
        found = row.get(self.column)
        if found is None:
            return self.value.lower() in ("null", "none")
        if isinstance(found, list | Mapping | bytes):
            raise TypeError(f"holds {type(found).__name__}")
        if self.number is not None:
            return bool(found == self.number)
        text = str(found).strip()
        if text == self.value or {text.lower(), self.value.lower()} in ({"true"}, {"false"}, {"nan"}):
            return True
        return _number(text) is not None and _number(text) == _number(self.value)


def _number(text: str) -> float | None:
    for kind in (int, float):  # whole numbers beyond 2**53 stay exact
        try:
            return kind(text)
        except ValueError:
            pass
    return None


def parse_where(texts: Iterable[str]) -> list[Condition]:
    """Conditions from ``COLUMN=VALUE`` or ``SOURCE:COLUMN=VALUE``; a ConfigError for other texts."""
    found = []
    for text in texts:
        column, _, value = (part.strip() for part in text.partition("="))
        of, colon, rest = (part.strip() for part in column.partition(":"))
        one = Condition(rest, value, of) if colon and of in _SOURCES else Condition(column, value)
        if not one.column or not value:
            raise ConfigError(f"--where {text}: write it as label=true, or as harmful:is_safe=false for one file")
        found.append(one)
    return found


def conditions_for(texts: Iterable[str], name: str, source: Source) -> list[Condition]:
    """The conditions (`parse_where`) that hold for one source: those meant for it whose column it has."""
    found = [one for one in parse_where(texts) if one.of in (None, name) and source.has(one.column)]
    return [replace(one, number=_class_number(source, one)) for one in found]


def _class_number(source: Source, condition: Condition) -> int | None:
    if source.schema is None or b"huggingface" not in (source.schema.metadata or {}):
        return None
    kind = datasets.Features.from_arrow_schema(source.schema).get(condition.column)
    named = isinstance(kind, datasets.ClassLabel) and condition.value in kind.names
    return int(kind.str2int(condition.value)) if named else None


def conditions_of(texts: Sequence[str], sources: Mapping[str, Source]) -> dict[str, list[Condition]]:
    """`conditions_for` each source that a command reads, of which several may be of one kind (``safe``, ``safe 2``).

    A DataError where no source has the column.
    """
    found = {name: conditions_for(texts, name.split()[0], source) for name, source in sources.items()}
    for condition in parse_where(texts):
        if not any(condition in conditions for conditions in found.values()):
            where = ", ".join(sources[name].where for name in sources if condition.of in (None, name.split()[0]))
            raise DataError(
                f"--where {condition}: there is no column {spelled(condition.column)} in "
                f"{where or f'--{condition.of}, which is not given'}; check its name"
            )
    return found
