"""Base class of all sources of rows: reading of all rows or of some, and writing of some."""

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

from pharmacist.core.errors import DataError, one_line
from pharmacist.core.hashing import sha256_file
from pharmacist.core.typed import Given
from pharmacist.data.compression import split_suffix
from pharmacist.data.formats.json_text import fits_json, json_line, spelled


FORMATS = ".jsonl, .json, .csv (each also .gz or .zst) and .parquet"
MAX_ROW_BYTES = 16 * 2**20
"""Longest row of a text format."""


class Row(NamedTuple):
    """One row of a source.

    Attributes:
        number: From 0, in input order.
        line: Where it starts in a text file, from 1.
        value: Column -> value; None where the row could not be read.
        reason: Why it cannot be used.
        raw: Its bytes in a text format, without line break.
    """

    number: int
    line: int | None
    value: dict[str, Any] | None
    reason: str | None = None
    raw: bytes | None = None

    @property
    def where(self) -> str:
        """The row as messages name it."""
        return f"row {self.number}" if self.line is None else f"line {self.line} (row {self.number})"


def ascending(numbers: Iterable[int]) -> npt.NDArray[np.int64]:
    """Row numbers as an array; a ValueError where they do not ascend."""
    found = np.fromiter(numbers, dtype=np.int64)
    if (np.diff(found) <= 0).any():
        raise ValueError("row numbers must ascend")
    return found


def _as_json(value: Any) -> Any:
    """A value that JSON does not know, whole: the text of a long array leaves its middle out."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else repr(value)


class Source(Given, ABC):
    """A source of rows.

    Attributes:
        format: ``jsonl``, ``json``, ``csv``, ``parquet``, ``arrow``, ``hub`` or ``memory``.
        schema: Arrow types of the columns, where the format fixes them for all rows.
        spec: The path of a file, the Hub id, or the rows in memory.
        label: Short text that stands for the source in a configuration.
        name: What the rows are for, in messages (an option such as ``--pool``).
        where: How messages begin.
    """

    format: str
    schema: pa.Schema | None = None

    def __init__(self, spec: Any, label: str, name: str) -> None:
        self.spec, self.label, self.name, self.where = spec, label, name, f"{name} {label}"
        self._fingerprint: str | None = None

    def __str__(self) -> str:
        return str(self.label)

    @property
    def native(self) -> str:
        """Format in which `write_rows` writes by default."""
        return "jsonl" if self.format in ("arrow", "hub", "memory") else self.format

    @property
    def columns(self) -> list[str] | None:
        """Column names, where the format fixes them for all rows."""
        return None if self.schema is None else list(self.schema.names)

    def has(self, column: str) -> bool:
        """Whether any row has a column; where the format does not fix them, rows are read until one has it."""
        if self.columns is not None:
            return column in self.columns
        return any(column in (row.value or ()) for row in self.scan())

    def fingerprint(self) -> str:
        """Hex sha256 of the content: of a file's bytes, or of the rows where there is no single file."""
        if self._fingerprint is None:
            self._fingerprint = self._content_hash()
        return self._fingerprint

    def _content_hash(self) -> str:
        if self.native == self.format:
            return sha256_file(self.spec)
        digest = hashlib.sha256()
        for row in self.scan():
            digest.update(json.dumps(row.value, default=_as_json).encode("ascii"))
        return digest.hexdigest()

    @abstractmethod
    def scan(self, columns: Collection[str] | None = None) -> Iterator[Row]:
        """Reads all rows, those that cannot be read included; `columns` are those that are needed, a hint."""

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Numbers and values of all rows; a DataError where one cannot be read."""
        return ((row.number, row.value or {}) for row in self.pick())

    def pick(self, numbers: Iterable[int] | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
        """The rows with these numbers (ascending), or all, none of which may be unreadable.

        Raises:
            DataError: A row cannot be read, or is not there (the file has changed).
        """
        return map(self._usable, self._among(self.scan(columns), numbers))

    def _among(self, rows: Iterator[Row], numbers: Iterable[int] | None) -> Iterator[Row]:
        """Those of the rows that have these numbers, or all."""
        if numbers is None:
            yield from rows
            return
        targets = iter(ascending(numbers).tolist())
        target = next(targets, None)
        for row in rows if target is not None else ():
            if row.number == target:
                yield row
                if (target := next(targets, None)) is None:
                    return
        if target is not None:
            raise self._no_row(target)

    def _usable(self, row: Row) -> Row:
        if row.reason is not None:
            raise DataError(f"{self.where}: {row.where} {row.reason}; fix or delete it")
        return row

    def _no_row(self, number: int) -> DataError:
        return DataError(f"{self.where}: has no row {number}; has it changed since it was read?")

    def dataset(self, numbers: Iterable[int]) -> datasets.Dataset:
        """The rows with these numbers (ascending) with all their columns, in memory; missing values are None."""
        values = [row.value or {} for row in self.pick(numbers)]
        arrays, fields = [], []
        for column in dict.fromkeys(column for value in values for column in value):
            try:
                arrays.append(pa.array([value.get(column) for value in values]))
                fields.append(pa.field(str(column), arrays[-1].type))
            except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
                known = {UnicodeEncodeError: "a lone surrogate", OverflowError: "a number of more than 64 bits"}
                what = f"column {spelled(str(column))} holds {known.get(type(error), 'values of several types')}"
                raise DataError(
                    f"{self.where}: {what}, which a dataset cannot contain; write the rows to a file"
                ) from error
        return datasets.Dataset(pa.table(arrays, schema=pa.schema(fields)))

    def check_json_lines(self) -> None:
        """Refuses values that JSON lines cannot hold by a DataError, before hours are spent on which rows to write."""
        doubtful: list[list[str] | None] = [None]
        if self.schema is not None:
            doubtful = [[field.name] for field in self.schema if not fits_json(field.type)]
        for columns in doubtful:
            at, column = 0, "" if columns is None else columns[0]
            try:
                for row in self.scan(columns):
                    at = row.number
                    for column, item in (row.value or {}).items():
                        json_line({column: item})
            # The last three: no Python object can hold the value, such as a date beyond the year 9999.
            except (TypeError, RecursionError, ValueError, OverflowError, pa.ArrowException) as error:
                remedy = f"curate's --format input keeps it, as {self.native}"
                if self.native == "jsonl":
                    remedy = "leave it out, or save the rows as .parquet, which curate's --format input keeps"
                raise DataError(
                    f"{self.where}: column '{column}' contains values that JSON lines cannot represent, such as that "
                    f"of row {at} ({one_line(error)}); {remedy}"
                ) from error

    def write(self, numbers: Sequence[int], format: str, path: Path, target: Path) -> None:
        """Writes rows to `path`, compressed as the name `target` says; see `write_rows`."""
        # The same content gives the same bytes: Arrow stores neither a time nor a name.
        with pa.output_stream(str(path), compression=split_suffix(target)[1]) as file:
            for part in self._encoded(numbers, format):
                file.write(part)

    def _encoded(self, numbers: Sequence[int], format: str) -> Iterator[bytes]:
        """The bytes of a file that holds these rows, in parts."""
        for row in self.pick(numbers):
            try:
                yield json_line(row.value)
            except (TypeError, RecursionError) as error:
                what = f"row {row.number} holds {one_line(error)}, which JSON cannot represent"
                raise DataError(f"{self.where}: {what}; leave that column out") from error
