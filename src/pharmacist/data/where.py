"""Rows chosen by the value of a column: ``--where label=true``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.data.formats import Source, spelled


@dataclass(frozen=True)
class Condition:
    """What a column has to hold.

    Attributes:
        column: Name of the column.
        value: As given: true, false, a number or a text.
        of: The only source that it is meant for (``harmful`` for ``--harmful``); None for all that have the column.
    """

    column: str
    value: str
    of: str | None = None

    def __str__(self) -> str:
        return f"{self.column}={self.value}"

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has the value; a row without the column has not.

        Raises:
            TypeError: The row holds a list or an object there, which equals no value that can be given.
        """
        found = row.get(self.column)
        if found is None:
            return self.value.lower() in ("null", "none")
        if isinstance(found, bool):
            return self.value.lower() == str(found).lower()
        if isinstance(found, int | float):
            return _number(self.value) == found
        if not isinstance(found, str):
            raise TypeError(f"holds {type(found).__name__}")
        found = found.strip()
        if found == self.value or {found.lower(), self.value.lower()} in ({"true"}, {"false"}):
            return True
        return _number(found) is not None and _number(found) == _number(self.value)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_where(texts: Iterable[str], sources: Iterable[str]) -> list[Condition]:
    """Conditions from ``COLUMN=VALUE`` or ``SOURCE:COLUMN=VALUE``.

    Args:
        texts: As given.
        sources: Names of the sources that there can be.

    Raises:
        ConfigError: A text of another form.
    """
    found = []
    for text in texts:
        column, equals, value = text.partition("=")
        source, colon, rest = column.partition(":")
        of = source.strip().replace("-", "_") if colon and source.strip().replace("-", "_") in set(sources) else None
        column = (rest if of is not None else column).strip()
        if not equals or not column or not value.strip():
            raise ConfigError(f"--where {text}: write it as label=true, or as harmful:is_safe=false for one file alone")
        found.append(Condition(column, value.strip(), of))
    return found


def conditions_of(texts: Sequence[str], sources: Mapping[str, Source]) -> dict[str, list[Condition]]:
    """Which conditions hold for which source: each for those that have its column.

    Args:
        texts: As given (`parse_where`).
        sources: What the command reads, by name.

    Raises:
        ConfigError: A text of another form.
        DataError: No source has the column.
    """
    found: dict[str, list[Condition]] = {name: [] for name in sources}
    for condition in parse_where(texts, sources):
        meant = [condition.of] if condition.of is not None else list(sources)
        having = [name for name in meant if has_column(sources[name], condition.column)]
        for name in having:
            found[name].append(condition)
        if not having:
            files = ", ".join(dict.fromkeys(sources[name].where for name in meant))
            raise DataError(
                f"--where {condition}: there is no column {spelled(condition.column)} in {files}; check its name"
            )
    return found


def has_column(source: Source, column: str) -> bool:
    """Whether some row has the column; of a format without fixed columns as many rows are read as it takes."""
    if source.columns is not None:
        return column in source.columns
    return any(row.value is not None and column in row.value for row in source.scan())
