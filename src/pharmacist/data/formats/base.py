"""What every source of rows can do: be read once through, give some rows again, write them."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pharmacist.core.errors import DataError
from pharmacist.core.typed import Given
from pharmacist.data.compression import compressed
from pharmacist.data.formats.json_text import json_line, short


MAX_ROW_BYTES = 16 * 2**20
"""Longest row of a text format."""


class Row(NamedTuple):
    """One row of a source.

    Attributes:
        number: From 0, in input order.
        line: Where it starts in a text file, from 1.
        value: Column -> value; None where the row could not be read.
        reason: Why it could not be read.
        raw: Its own bytes in a text format, without line break.
    """

    number: int
    line: int | None
    value: dict[str, Any] | None
    reason: str | None
    raw: bytes | None = None


def place(number: int, line: int | None) -> str:
    """How a message names a row."""
    return f"row {number}" if line is None else f"line {line} (row {number})"


def named(numbers: Sequence[int], most: int = 10) -> str:
    """How a message names several rows, of which a few are enough."""
    return f"row {', '.join(map(str, numbers[:most]))}" + (", ..." if len(numbers) > most else "")


def ascending(numbers: Iterable[int]) -> npt.NDArray[np.int64]:
    """Row numbers as an array.

    Raises:
        ValueError: They do not ascend.
    """
    found = np.fromiter(numbers, dtype=np.int64)
    if (np.diff(found) <= 0).any():
        raise ValueError("row numbers must ascend")
    return found


class Source(Given, ABC):
    """Rows from somewhere.

    Attributes:
        spec: As given.
        name: What the rows are for, in messages (an option such as ``--pool``).
        format: ``jsonl``, ``json``, ``csv``, ``parquet``, ``arrow``, ``hub`` or ``memory``.
        label: Short text that stands for the source in a configuration.
    """

    format: str

    def __init__(self, spec: Any, label: str, name: str) -> None:
        self.spec, self.label, self.name = spec, label, name
        self._fingerprint: str | None = None

    @property
    def where(self) -> str:
        """How messages begin."""
        return f"{self.name} {self.label}"

    @property
    def native(self) -> str:
        """Format in which `write_rows` writes unless asked otherwise."""
        return "jsonl"

    @property
    def columns(self) -> list[str] | None:
        """Column names, where the format fixes them for all rows."""
        return None

    def fingerprint(self) -> str:
        """Hex sha256 of the content: of a file's bytes, or of the rows where there is no single file."""
        if self._fingerprint is None:
            self._fingerprint = self._content_hash()
        return self._fingerprint

    def _content_hash(self) -> str:
        digest = hashlib.sha256()
        for row in self.scan():
            digest.update(json.dumps(row.value, default=repr).encode("ascii"))
        return digest.hexdigest()

    @abstractmethod
    def scan(self, columns: Collection[str] | None = None) -> Iterator[Row]:
        """Reads all rows, those that cannot be read included.

        Args:
            columns: Only these are needed; a hint for formats with columns.

        Raises:
            DataError: The file as a whole cannot be read.
        """

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Numbers and values of all rows.

        Raises:
            DataError: Some row cannot be read.
        """
        return ((row.number, row.value or {}) for row in self.pick())

    def pick(self, numbers: Iterable[int] | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
        """The rows with these numbers, or all, none of which may be unreadable.

        Args:
            numbers: From 0, ascending.
            columns: As in `scan`.

        Raises:
            DataError: A row cannot be read, or is not there (the file has changed).
        """
        return map(self._usable, self._among(self.scan(columns), numbers))

    def _among(self, rows: Iterator[Row], numbers: Iterable[int] | None) -> Iterator[Row]:
        """Those of the rows that have these numbers, or all."""
        if numbers is None:
            yield from rows
            return
        wanted = iter(ascending(numbers).tolist())
        target = next(wanted, None)
        for row in rows if target is not None else ():
            if row.number == target:
                yield row
                if (target := next(wanted, None)) is None:
                    return
        if target is not None:
            raise self._no_row(target)

    def _usable(self, row: Row) -> Row:
        if row.reason is not None:
            raise DataError(f"{self.where}: {place(row.number, row.line)} {row.reason}; mend or delete it")
        return row

    def _no_row(self, number: int) -> DataError:
        return DataError(f"{self.where}: has no row {number}; has it changed since it was read?")

    def dataset(self, numbers: Iterable[int]) -> datasets.Dataset:
        """Some rows with all their columns, in memory; missing values are None.

        Args:
            numbers: Row numbers, ascending.
        """
        values = [row.value or {} for row in self.pick(numbers)]
        data = {}
        for column in dict.fromkeys(column for value in values for column in value):
            try:
                data[column] = pa.array([value.get(column) for value in values])
            except (pa.ArrowException, UnicodeEncodeError) as error:
                what = "a lone surrogate" if isinstance(error, UnicodeEncodeError) else "values of several types"
                raise DataError(
                    f"{self.where}: column '{column}' holds {what}, which no dataset can; write the rows to a file"
                ) from error
        return datasets.Dataset(pa.table(data))

    # --- writing --------------------------------------------------------------------------------------------------

    def check_json_lines(self) -> None:
        """Finds values that JSON lines cannot hold, before hours are spent on which rows to write.

        Raises:
            DataError: A column holds such values.
        """
        doubtful = self._doubtful_columns()
        for wanted in [None] if doubtful is None else [[column] for column in doubtful]:
            at, column = 0, "" if wanted is None else wanted[0]
            try:
                for row in self.scan(wanted):
                    at = row.number
                    for column, item in (row.value or {}).items():
                        json_line({column: item})
            # Of the last ones there is no Python object at all, such as a date beyond the year 9999.
            except (TypeError, RecursionError, ValueError, OverflowError, pa.ArrowException) as error:
                remedy = f"curate's --format input keeps it, as {self.native}"
                if self.native == "jsonl":
                    remedy = "leave it away, or save the rows as .parquet, which curate's --format input keeps"
                raise DataError(
                    f"{self.where}: column '{column}' holds what JSON lines cannot hold, such as that of row {at} "
                    f"({short(error)}); {remedy}"
                ) from error

    def _doubtful_columns(self) -> list[str] | None:
        """Columns that may hold what JSON cannot; None where any may."""
        return None

    def write(self, numbers: Sequence[int], format: str, path: Path, target: Path) -> None:
        """Writes rows to `path`, compressed as the name `target` says; see `write_rows`."""
        with compressed(path, target) as file:
            for part in self._encoded(numbers, format):
                file.write(part)

    def _encoded(self, numbers: Sequence[int], format: str) -> Iterator[bytes]:
        """The bytes of a file that holds these rows, in parts."""
        for row in self.pick(numbers):
            try:
                yield json_line(row.value)
            except (TypeError, RecursionError) as error:
                what = f"row {row.number} holds {short(error)}, which JSON cannot hold"
                raise DataError(f"{self.where}: {what}; leave that column away") from error
