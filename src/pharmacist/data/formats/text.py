"""Text files, whose rows are copied byte by byte: the base class, JSON lines and CSV."""

import copy
import csv
import itertools
import os
import re
import tempfile
from abc import abstractmethod
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pharmacist.core.errors import DataError
from pharmacist.data.compression import HashedFile, open_bytes
from pharmacist.data.formats.base import MAX_ROW_BYTES, Row, Source
from pharmacist.data.formats.json_text import as_row, decode_json, spelled, why_no_json


BOM = b"\xef\xbb\xbf"
TOO_LONG = f"is longer than {MAX_ROW_BYTES // 2**20} MB"


class KeptRows:
    """The bytes of usable rows in a file without a name, instead of a second pass over the source."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)
        self._places = array("q")  # of each row its number, its line, and how many bytes it has

    def add(self, row: Row) -> None:
        """Keeps a row that is a text file's."""
        raw = row.raw or b""
        self._file.write(raw)
        self._places.extend((row.number, row.line or 0, len(raw)))

    def flush(self) -> None:
        """Writes what is still buffered, before rows are read: a full disk shows now."""
        self._file.flush()

    def rows(self, numbers: Collection[int] | None = None) -> Iterator[Row]:
        """All rows, or those with these numbers, without values."""
        start, places = 0, iter(self._places)
        for number, line, size in zip(places, places, places, strict=True):
            if numbers is None or number in numbers:
                yield Row(number, line, None, None, os.pread(self._file.fileno(), size, start))
            start += size


class TextFile(Source):
    """A text file, split into the bytes of its rows and parsed row by row."""

    _kept: KeptRows | None = None

    @abstractmethod
    def split(self, file: BinaryIO) -> Iterator[Row]:
        """Rows with their bytes, and with their values where the format tells rows apart only by parsing them."""

    def parse(self, raw: bytes) -> tuple[dict[str, Any] | None, str | None]:
        """Parses a row; returns it and None, or None and the reason why the bytes are no row."""
        try:
            return as_row(decode_json(raw.decode("utf-8")))
        except (ValueError, RecursionError) as error:
            return None, why_no_json(error)

    def join(self, rows: Iterable[bytes]) -> Iterator[bytes]:
        """The bytes of a file of these rows."""
        return (raw + b"\n" for raw in rows)

    def unparsed(self, numbers: Iterable[int] | None = None) -> Iterator[Row]:
        """All rows or those with these numbers (ascending), as `split` gives them.

        The first reading to the end of the file gives its fingerprint too.
        """
        if self._kept is not None:
            chosen = None if numbers is None else list(numbers)
            yield from self._among(self._kept.rows(None if chosen is None else set(chosen)), chosen)
            return
        hashed = HashedFile(self.spec) if self._fingerprint is None else None
        with open_bytes(self.spec, self.where, hashed) as file:
            yield from self._among(self.split(file), numbers)
            if hashed is not None:
                self._fingerprint = hashed.sha256()

    def with_kept(self, rows: KeptRows) -> "TextFile":
        """A copy of the source that reads its usable rows from where they were kept."""
        rows.flush()
        source = copy.copy(self)
        source._kept = rows
        return source

    def scan(self, columns: Collection[str] | None = None) -> Iterator[Row]:
        return map(self._parsed, self.unparsed())

    def pick(self, numbers: Iterable[int] | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
        return (self._usable(self._parsed(row)) for row in self.unparsed(numbers))

    def _parsed(self, row: Row) -> Row:
        if row.value is not None or row.raw is None or row.reason is not None:
            return row
        return Row(row.number, row.line, *self.parse(row.raw), row.raw)

    def check_json_lines(self) -> None:
        """Nothing to find: text is copied as it is."""

    def _encoded(self, numbers: Sequence[int], format: str) -> Iterator[bytes]:
        if format != self.format:
            return super()._encoded(numbers, format)
        return self.join(self._usable(row).raw or b"" for row in self.unparsed(numbers))


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Line numbers from 1 and lines with their line breaks; None in place of a line that is too long."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(BOM)
        too_long = len(line) > MAX_ROW_BYTES and not line.endswith(b"\n")
        while too_long and line and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW_BYTES)
        yield number, None if too_long else line


class JsonLines(TextFile):
    """One JSON object per line."""

    format = "jsonl"

    def split(self, file: BinaryIO) -> Iterator[Row]:
        number = 0
        for line, content in lines(file):
            raw = None if content is None else content.rstrip(b"\r\n")
            if raw is None or raw.strip():
                yield Row(number, line, None, TOO_LONG if raw is None else None, raw)
                number += 1


class Csv(TextFile):
    """Comma-separated cells; the first line names the columns."""

    format = "csv"
    _header: tuple[list[str], bytes] | None = None

    @property
    def columns(self) -> list[str] | None:
        if self._header is None:
            next(self.unparsed(), None)
        return self._header[0] if self._header else None

    def _records(self, file: BinaryIO) -> Iterator[tuple[int, list[str], bytes]]:
        """First line, cells and bytes of each record, the header's too."""
        pending: list[str] = []
        start = 1

        def tapped() -> Iterator[str]:
            for number, line in lines(file):
                if line is None:
                    raise DataError(f"{self.where}: line {number} {TOO_LONG}; shorten or delete it")
                # Bytes that are no UTF-8 survive as surrogates, to be refused by row and copied unchanged.
                pending.append(line.decode("utf-8", "surrogateescape"))
                yield pending[-1]

        # The limit is the module's, not the reader's; the default of 128 kB refuses honest cells.
        csv.field_size_limit(MAX_ROW_BYTES)
        reader = csv.reader(tapped(), strict=True)
        try:
            for cells in reader:
                if cells:
                    yield start, cells, "".join(pending).encode("utf-8", "surrogateescape").rstrip(b"\r\n")
                pending.clear()
                start = reader.line_num + 1
        except csv.Error as error:
            swallowed = "end of data" in str(error) or "limit" in str(error)
            reason = "a quote is not closed, or a cell is larger than 16 MB" if swallowed else error
            if "new-line character" in str(error):
                reason = "a carriage return outside quotes; lines end in a line feed"
            raise DataError(
                f"{self.where}: the row at line {start} is not valid CSV ({reason}); fix the file"
            ) from error

    def split(self, file: BinaryIO) -> Iterator[Row]:
        for number, (line, cells, raw) in enumerate(self._records(file), start=-1):
            if number < 0:
                if twice := [column for column in cells if cells.count(column) > 1]:
                    raise DataError(
                        f"{self.where}: line 1 names the column {spelled(twice[0])} twice; rename one of them"
                    )
                if len(cells) == 1 and re.search("[;\t]", cells[0]):
                    raise DataError(f"{self.where}: line 1 has a single column; separate the cells by commas")
                self._header = cells, raw
            else:
                yield Row(number, line, *self._row(cells, raw), raw)

    def _row(self, cells: list[str], raw: bytes) -> tuple[dict[str, Any] | None, str | None]:
        header = self.columns or []
        if len(cells) != len(header):
            return None, f"has {len(cells)} cells where the header has {len(header)}"
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return None, why_no_json(error)
        return dict(zip(header, cells, strict=True)), None

    def parse(self, raw: bytes) -> tuple[dict[str, Any] | None, str | None]:
        return self._row(next(csv.reader([raw.decode("utf-8", "surrogateescape")], strict=True)), raw)

    def join(self, rows: Iterable[bytes]) -> Iterator[bytes]:
        header = [self._header[1]] if self.columns is not None and self._header is not None else []
        return super().join(itertools.chain(header, rows))
