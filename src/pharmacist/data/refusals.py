"""Rows that cannot be used: counted, named, and refused in one message."""

from dataclasses import dataclass
from typing import Literal

from pharmacist.core.errors import DataError
from pharmacist.data.formats import Row, Source, place
from pharmacist.data.layouts import RowReader


_NAMED = 10


@dataclass(frozen=True)
class Refused:
    """A row that cannot be used: its number, its line in a text file, and why."""

    row: int
    line: int | None
    reason: str


class Refusals:
    """The rows of a source that cannot be used.

    Args:
        source: Where they come from.
        on_bad_row: ``fail``: the first ten are named; ``skip``: all are kept, and the others are used.

    Attributes:
        rows: They.
        bad: How many there are.
    """

    def __init__(self, source: Source, on_bad_row: Literal["fail", "skip"]) -> None:
        self.source, self.skip = source, on_bad_row == "skip"
        self.rows: list[Refused] = []
        self.bad = 0

    def add(self, row: Row, reason: str) -> None:
        """Counts a row."""
        self.bad += 1
        if self.skip or len(self.rows) < _NAMED:
            self.rows.append(Refused(row.number, row.line, reason))

    def check(self, total: int, reader: RowReader) -> None:
        """Says what is wrong, unless the rows that are left may be used.

        Args:
            total: Rows of the source, these included.
            reader: Has read them.

        Raises:
            DataError: There is no row, or none that can be used, or one that must not be left out.
        """
        where, bad = self.source.where, self.bad
        if total == 0:
            raise DataError(f"{where}: holds no rows; give a file with at least one")
        if bad < total and (not bad or self.skip):
            return
        named: dict[str, list[str]] = {}
        for row in self.rows[:_NAMED]:
            named.setdefault(row.reason, []).append(place(row.row, row.line))
        what = "; ".join(f"{', '.join(places)} {reason}" for reason, places in named.items())
        if reader.layout is None and reader.strange == bad:
            first = self.rows[0]
            raise DataError(
                f"{where}: {place(first.row, first.line)} {first.reason}; known row formats are {reader.known}; "
                "map other columns with --columns"
            )
        if bad == total and self.skip:
            raise DataError(f"{where}: none of the {total} rows can be used: {what}; mend them")
        more = f" and {bad - _NAMED} more" if bad > _NAMED else ""
        rows = "1 row" if bad == 1 else f"{bad} rows"
        raise DataError(
            f"{where}: {rows} of {total} cannot be used: {what}{more}; "
            "mend or delete them, or leave them out with --on-bad-row skip"
        )
