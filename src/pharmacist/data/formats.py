"""Reading and writing rows in every supported format, as a stream; nothing else knows about files.

| format | file | rows |
|---|---|---|
| ``jsonl`` | ``.jsonl``, or ``.json`` with one row per line; also ``.gz``, ``.zst`` | one JSON object per line |
| ``json`` | ``.json``; also ``.gz``, ``.zst`` | the elements of one JSON array, parsed one by one |
| ``csv`` | ``.csv``; also ``.gz``, ``.zst`` | comma-separated, first line names the columns |
| ``parquet`` | ``.parquet`` | batches of a file |
| ``arrow`` | a folder written by ``Dataset.save_to_disk`` (``folder:split`` for a ``DatasetDict``) | memory-mapped |
| ``hub`` | ``name[:config][:split]`` | memory-mapped in the cache of ``datasets`` |
| ``memory`` | a ``datasets.Dataset`` or a sequence of mappings | as they are |

Rows are numbered from 0 in input order; blank lines are no rows. A row of a text format may have at most
`MAX_ROW_BYTES`, so that one broken line cannot fill the memory.
"""

import codecs
import csv
import datetime
import decimal
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pharmacist.core.env import offline
from pharmacist.core.errors import DataError
from pharmacist.core.files import atomic_path, check_ordinary, read_json
from pharmacist.core.hashing import sha256_content, sha256_file
from pharmacist.core.typed import Given
from pharmacist.data.compression import SUFFIXES, check_magic, compressed, open_bytes, split_suffix


if TYPE_CHECKING:
    import datasets

MAX_ROW_BYTES = 16 * 2**20
"""Longest row of a text format."""
MAX_DEPTH = 100
"""Deepest nesting of lists and objects in a row of JSON."""

_FORMATS = ".jsonl, .json, .csv (each also .gz or .zst) and .parquet"
_BATCH = 1024
_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One row of a source.

    Attributes:
        number: From 0, in input order.
        line: Where it starts in a text file, from 1.
        value: Column -> value; None where the row could not be read, or was not parsed.
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
    def scan(self, columns: Collection[str] | None = None, *, parse: bool = True) -> Iterator[Row]:
        """Reads all rows, those that cannot be read included.

        Args:
            columns: Only these are needed; a hint for formats with columns.
            parse: Whether `Row.value` is needed; `Row.raw` is there in any case for text formats.

        Raises:
            DataError: The file as a whole cannot be read.
        """

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Reads all rows.

        Raises:
            DataError: Some row cannot be read.
        """
        for row in self.scan():
            if row.value is None:
                raise DataError(f"{self.where}: {place(row.number, row.line)} {row.reason}; mend or delete it")
            yield row.number, row.value

    def pick(self, numbers: Iterable[int], *, parse: bool = True) -> Iterator[Row]:
        """The rows with these numbers, which must ascend.

        Raises:
            DataError: A row cannot be read, or is not there (the file has changed).
        """
        wanted = iter(numbers)
        target = next(wanted, None)
        for row in self.scan(parse=parse) if target is not None else ():
            if row.number != target:
                continue
            if row.reason is not None:
                raise DataError(f"{self.where}: {place(row.number, row.line)} {row.reason}; mend or delete it")
            yield row
            following = next(wanted, None)
            if following is None:
                return
            if following <= target:
                raise ValueError(f"row numbers must ascend, but {following} follows {target}")
            target = following
        if target is not None:
            raise DataError(f"{self.where}: has no row {target}; has it changed since it was read?")

    def dataset(self, numbers: Iterable[int]) -> "datasets.Dataset":
        """Some rows with all their columns, in memory; missing values are None.

        Args:
            numbers: Row numbers, ascending.
        """
        import datasets

        values = [row.value or {} for row in self.pick(int(n) for n in numbers)]
        columns = list(dict.fromkeys(column for value in values for column in value))
        data = {}
        for column in columns:
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
        """Finds values that `write_json_lines` cannot write, before hours are spent on which rows to write.

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
                        _json_line({column: item})
            # Of the last ones there is no Python object at all, such as a date beyond the year 9999.
            except (TypeError, RecursionError, ValueError, OverflowError, pa.ArrowException) as error:
                remedy = f"curate's --format input keeps it, as {self.native}"
                if self.native == "jsonl":
                    remedy = "leave it away, or save the rows as .parquet, which curate's --format input keeps"
                raise DataError(
                    f"{self.where}: column '{column}' holds what JSON lines cannot hold, such as that of row {at} "
                    f"({_short(error)}); {remedy}"
                ) from error

    def _doubtful_columns(self) -> list[str] | None:
        """Columns that may hold what JSON cannot; None where any may."""
        return None

    @property
    def native(self) -> str:
        """Format in which `write_rows` writes unless asked otherwise."""
        return "jsonl"

    def write_native(self, numbers: Sequence[int], path: Path, target: Path) -> None:
        """Writes rows in the native format to `path`, compressed as the name `target` says."""
        self.write_json_lines(numbers, path, target)

    def write_json_lines(self, numbers: Sequence[int], path: Path, target: Path) -> None:
        """Writes rows as JSON lines to `path`, compressed as the name `target` says."""
        with compressed(path, target) as file:
            for row in self.pick(numbers):
                try:
                    file.write(_json_line(row.value))
                except (TypeError, RecursionError) as error:
                    what = f"row {row.number} holds {_short(error)}, which JSON cannot hold"
                    raise DataError(f"{self.where}: {what}; leave that column away") from error


def open_source(spec: Any, *, name: str = "pool") -> Source:
    """Finds out what `spec` is and prepares to stream it.

    Args:
        spec: A path, a hub id ``name[:config][:split]``, a ``datasets.Dataset`` or a sequence of mappings.
        name: What the rows are for, in messages.

    Raises:
        DataError: There is no such file, or nothing readable in it.
    """
    if isinstance(spec, Source):
        return spec
    if not isinstance(spec, str | os.PathLike):
        return _open_memory(spec, name)
    text = os.fspath(spec)
    path = Path(text).expanduser()
    where = f"{name} {text}"
    if not text.strip():
        raise DataError(f"{name}: an empty path; give a file, a folder saved by datasets or a hub id")
    # Unlike Path's own, these make no error of names that no file system takes.
    if os.path.isdir(path):
        return _open_folder(path, None, text, name)
    if os.path.exists(path):
        return _open_file(path, text, name)
    folder, _, split = text.rpartition(":")
    if folder and os.path.isdir(Path(folder).expanduser()):
        return _open_folder(Path(folder).expanduser(), split, text, name)
    known = split_suffix(path)[0] in _READERS or path.suffix.lower() in SUFFIXES
    if isinstance(spec, os.PathLike) or known or not _HUB_ID.fullmatch(text):
        raise DataError(f"{where}: no such file; check the path")
    return _open_hub(text, name)


def write_rows(source: Source, rows: Sequence[int], path: str | os.PathLike[str], format: str | None = None) -> None:
    """Writes some rows of a source: every column unchanged, in input order, whole or not at all.

    JSON lines, JSON and CSV rows are copied byte by byte; Parquet keeps its schema. The name's suffix ``.gz`` or
    ``.zst`` compresses.

    Args:
        source: Where the rows come from.
        rows: Row numbers, ascending.
        path: The file to write.
        format: ``jsonl``, or the source's own format (the default; ``jsonl`` where it has no file format). JSON has
            no NaN, so that one in a Parquet or in-memory column becomes null in JSON lines.

    Raises:
        DataError: The source has no such row, or cannot be written in this format.
    """
    target = Path(path)
    chosen = format or source.native
    if chosen not in {"jsonl", source.native}:
        known = "jsonl" if source.native == "jsonl" else f"{source.native} or jsonl"
        raise DataError(f"{source.where}: rows of a {source.format} source can be written as {known}, not {chosen}")
    numbers = [int(row) for row in rows]
    with atomic_path(target) as temporary:
        write = source.write_native if chosen == source.native else source.write_json_lines
        write(numbers, temporary, target)


# --- text formats -------------------------------------------------------------------------------------------------


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Line numbers from 1 and lines with their line breaks; None in place of a line that is too long."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(_BOM)
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW_BYTES)
            yield number, None
        else:
            yield number, line


_TOO_LONG = f"is longer than {MAX_ROW_BYTES // 2**20} MB"


class _Refused(ValueError):
    """What Python's parser takes although it is no JSON, or not one thing."""


def _refuse_constant(constant: str) -> None:
    raise _Refused(f"{constant} is no JSON value; write null")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise _Refused(f"the key {spelled(twice)} is there twice in one object")
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)


def spelled(name: str, longest: int = 40) -> str:
    """A name out of a file as messages show it: in quotes, short, what is not printable spelled out."""
    return ascii(name[:longest]) + ("..." if len(name) > longest else "")


def decode_json(text: str) -> Any:
    """Parses JSON strictly: no NaN, no key twice, no nesting that Python could not write back.

    Raises:
        ValueError: It is no such JSON.
        RecursionError: It is nested too deeply.
    """
    value = _DECODER.decode(text)
    _check_depth(value, text)
    return value


def _check_depth(value: Any, text: str) -> None:
    """Refuses a value, parsed from `text`, that is nested deeper than `MAX_DEPTH`."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    level, depth = [value], 0
    while level:
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
        if depth > MAX_DEPTH:
            raise RecursionError


def _why_no_json(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.object[error.start]:#04x} at byte {error.start + 1} of it)"
    if isinstance(error, _Refused):
        return f"is not valid JSON ({error})"
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON ({error.msg} at column {error.colno})"
    if isinstance(error, RecursionError):
        return "is not usable JSON (nested too deeply)"
    return f"is not usable JSON ({error})"


_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


class _FileSource(Source):
    def __init__(self, path: Path, label: str, name: str) -> None:
        super().__init__(path, label, name)
        self.path = path

    def _content_hash(self) -> str:
        return sha256_file(self.path)

    def _doubtful_columns(self) -> list[str] | None:
        return []  # text is copied as it is

    @property
    def native(self) -> str:
        return self.format


class _JsonLines(_FileSource):
    format = "jsonl"

    def scan(self, columns: Collection[str] | None = None, *, parse: bool = True) -> Iterator[Row]:
        number = 0
        with open_bytes(self.path, self.where) as file:
            for line, content in _lines(file):
                if content is None:
                    yield Row(number, line, None, _TOO_LONG)
                    number += 1
                    continue
                raw = content.rstrip(b"\r\n")
                if not raw or raw.isspace():
                    continue
                value: Any = None
                reason = None
                if parse:
                    try:
                        value = decode_json(raw.decode("utf-8"))
                    except (ValueError, RecursionError) as error:
                        reason = _why_no_json(error)
                    else:
                        if not isinstance(value, dict):
                            reason, value = f"is no JSON object but {_KINDS[type(value)]}", None
                yield Row(number, line, value, reason, raw)
                number += 1

    def write_json_lines(self, numbers: Sequence[int], path: Path, target: Path) -> None:
        with compressed(path, target) as file:
            for row in self.pick(numbers, parse=False):
                assert row.raw is not None
                file.write(row.raw + b"\n")


class _JsonArray(_FileSource):
    """One JSON array; its elements are parsed one at a time out of a sliding window of the text."""

    format = "json"

    def scan(self, columns: Collection[str] | None = None, *, parse: bool = True) -> Iterator[Row]:
        with open_bytes(self.path, self.where) as file:
            yield from self._elements(_Window(file, self.where))

    def _elements(self, window: "_Window") -> Iterator[Row]:
        if window.peek() != "[":
            raise DataError(f"{self.where}: holds no JSON array")
        window.take(1)
        number = 0
        closed = window.peek() == "]"
        if closed:
            window.take(1)
        while not closed:
            window.peek()
            line = window.line
            value, raw = window.element()
            if isinstance(value, dict):
                yield Row(number, line, value, None, raw.encode("utf-8"))
            else:
                yield Row(number, line, None, f"is no JSON object but {_KINDS[type(value)]}", raw.encode("utf-8"))
            number += 1
            follows = window.peek()
            if follows not in {",", "]"}:
                found = f"'{follows}'" if follows else "the end of the file"
                raise DataError(
                    f"{self.where}: line {window.line} is not valid JSON (',' or ']' expected after row {number - 1}, "
                    f"{found} found); mend the file"
                )
            window.take(1)
            closed = follows == "]"
        if window.peek():
            raise DataError(f"{self.where}: line {window.line} has text after the end of the JSON array; delete it")

    def write_native(self, numbers: Sequence[int], path: Path, target: Path) -> None:
        with compressed(path, target) as file:
            file.write(b"[")
            for position, row in enumerate(self.pick(numbers)):
                assert row.raw is not None
                file.write((b",\n" if position else b"\n") + row.raw)
            file.write(b"\n]\n")


class _Window:
    """The unread part of a text, as much of it as is needed."""

    _CHUNK = 1 << 20
    _SPACE = re.compile(r"[ \t\n\r]*")

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where = file, where
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = "", 0, False
        self.line = 1

    def _more(self) -> bool:
        """Reads on; False at the end."""
        if self._ended:
            return False
        # As much again as is waiting, so that a long element is parsed a few times only.
        data = self._file.read(max(self._CHUNK, len(self._text) - self._at))
        self._ended = not data
        try:
            new = self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self._at) + error.object[: error.start].count(b"\n")
            raise DataError(f"{self._where}: is not UTF-8 near line {line}; save it as UTF-8") from error
        self._text, self._at = self._text[self._at :] + new, 0
        return not self._ended

    def take(self, count: int) -> str:
        taken = self._text[self._at : self._at + count]
        self.line += taken.count("\n")
        self._at += count
        return taken

    def peek(self) -> str:
        """The next character that is no white space, which is skipped; empty at the end."""
        while True:
            match = self._SPACE.match(self._text, self._at)
            assert match is not None
            self.take(match.end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def element(self) -> tuple[Any, str]:
        """Parses and takes one JSON value; gives it and its text."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                _check_depth(value, self._text[self._at : end])
            except (ValueError, RecursionError) as error:
                waiting = len(self._text) - self._at
                if waiting > MAX_ROW_BYTES:
                    reason = _TOO_LONG if "Unterminated" in str(error) else _why_no_json(error)
                elif not isinstance(error, _Refused | RecursionError) and self._more():
                    continue
                else:
                    reason = _why_no_json(error)
                line = self.line
                if isinstance(error, json.JSONDecodeError):
                    line += self._text.count("\n", self._at, error.pos)
                raise DataError(f"{self._where}: line {line} {reason}; mend the file") from error
            # A number at the very end of the window may go on in the next chunk.
            if end == len(self._text) and not isinstance(value, dict | list | str) and self._more():
                continue
            if end - self._at > MAX_ROW_BYTES:
                raise DataError(f"{self._where}: the row at line {self.line} {_TOO_LONG}; shorten or delete it")
            return value, self.take(end - self._at)


class _Csv(_FileSource):
    format = "csv"

    def __init__(self, path: Path, label: str, name: str) -> None:
        super().__init__(path, label, name)
        self._header: tuple[list[str], bytes] | None = None

    @property
    def columns(self) -> list[str] | None:
        if self._header is None:
            next(self.scan(), None)
        return self._header[0] if self._header else None

    def _records(self, file: BinaryIO) -> Iterator[tuple[int, list[str], bytes]]:
        """First line, cells and bytes of each record, the header's too."""
        pending: list[str] = []
        start = 1

        def tapped() -> Iterator[str]:
            for number, line in _lines(file):
                if line is None:
                    raise DataError(f"{self.where}: line {number} {_TOO_LONG}; shorten or delete it")
                # Bytes that are no UTF-8 survive as surrogates, to be refused by row and copied unchanged.
                pending.append(line.decode("utf-8", "surrogateescape"))
                yield pending[-1]

        # The limit is the module's, not the reader's; the default of 128 kB refuses honest cells.
        csv.field_size_limit(MAX_ROW_BYTES)
        reader = csv.reader(tapped(), strict=True)
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                swallowed = "end of data" in str(error) or "limit" in str(error)
                reason = "a quote is not closed, or a cell is larger than 16 MB" if swallowed else error
                raise DataError(
                    f"{self.where}: the row at line {start} is not valid CSV ({reason}); mend the file"
                ) from error
            if cells is None:
                return
            raw = "".join(pending).encode("utf-8", "surrogateescape").rstrip(b"\r\n")
            if cells:
                yield start, cells, raw
            pending.clear()
            start = reader.line_num + 1

    def scan(self, columns: Collection[str] | None = None, *, parse: bool = True) -> Iterator[Row]:
        with open_bytes(self.path, self.where) as file:
            records = self._records(file)
            first = next(records, None)
            if first is None:
                return
            header = first[1]
            self._check_header(header)
            self._header = header, first[2]
            for number, (line, cells, raw) in enumerate(records):
                if len(cells) != len(header):
                    yield Row(number, line, None, f"has {len(cells)} cells where the header has {len(header)}", raw)
                    continue
                try:
                    raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    yield Row(number, line, None, _why_no_json(error), raw)
                    continue
                yield Row(number, line, dict(zip(header, cells, strict=True)), None, raw)

    def _check_header(self, header: list[str]) -> None:
        if len(set(header)) != len(header):
            twice = next(column for column in header if header.count(column) > 1)
            raise DataError(f"{self.where}: line 1 names the column {spelled(twice)} twice; rename one of them")
        if len(header) == 1 and re.search("[;\t]", header[0]):
            raise DataError(f"{self.where}: line 1 has a single column; separate the cells by commas")

    def write_native(self, numbers: Sequence[int], path: Path, target: Path) -> None:
        if not numbers:
            next(self.scan(), None)
        with compressed(path, target) as file:
            for position, row in enumerate(self.pick(numbers)):
                if not position:
                    assert self._header is not None
                    file.write(self._header[1] + b"\n")
                assert row.raw is not None
                file.write(row.raw + b"\n")
            if not numbers and self._header:
                file.write(self._header[1] + b"\n")


# --- columnar formats ---------------------------------------------------------------------------------------------


class _Parquet(_FileSource):
    format = "parquet"

    def __init__(self, path: Path, label: str, name: str) -> None:
        super().__init__(path, label, name)
        with self._open() as file:
            self._schema = file.schema_arrow
        _check_names(self._schema, self.where)
        # `datasets` stores nested values of changing shape as JSON text and says so in the file's metadata.
        self._features: Any = None
        if b'"Json"' in (self._schema.metadata or {}).get(b"huggingface", b""):
            import datasets

            self._features = datasets.Features.from_arrow_schema(self._schema)

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.where}: is no Parquet file ({_short(error)}); write it again") from error

    @property
    def columns(self) -> list[str] | None:
        return list(self._schema.names)

    def _doubtful_columns(self) -> list[str] | None:
        return [field.name for field in self._schema if not _fits_json(field.type)]

    def _batches(self, columns: Collection[str] | None = None) -> Iterator[pa.RecordBatch]:
        wanted = None if columns is None else [column for column in self._schema.names if column in columns]
        try:
            with self._open() as file:
                yield from file.iter_batches(_BATCH, columns=wanted)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.where}: damaged Parquet data ({_short(error)}); write it again") from error

    def scan(self, columns: Collection[str] | None = None, *, parse: bool = True) -> Iterator[Row]:
        number = 0
        for batch in self._batches(columns):
            for value in _batch_rows(batch):
                reason = None if value is not None else "is not UTF-8"
                if self._features is not None and value is not None:
                    value = self._features.decode_example(value)
                yield Row(number, None, value, reason)
                number += 1

    def write_native(self, numbers: Sequence[int], path: Path, target: Path) -> None:
        import numpy as np

        wanted = np.asarray(numbers, dtype=np.int64)
        if len(wanted) > 1 and (np.diff(wanted) <= 0).any():
            raise ValueError("row numbers must ascend")
        with self._open() as file:
            compression = "snappy"
            if file.metadata.num_row_groups and file.metadata.num_columns:
                compression = file.metadata.row_group(0).column(0).compression.lower()
        start = written = 0
        held: list[pa.RecordBatch] = []
        with pq.ParquetWriter(path, self._schema, compression=compression.replace("uncompressed", "none")) as writer:
            for batch in self._batches():
                low, high = np.searchsorted(wanted, [start, start + batch.num_rows])
                start += batch.num_rows
                if high > low:
                    held.append(_take(batch, wanted[low:high] - (start - batch.num_rows)))
                    written += int(high - low)
                if sum(part.nbytes for part in held) > MAX_ROW_BYTES:
                    writer.write_table(pa.Table.from_batches(held, self._schema))
                    held.clear()
            writer.write_table(pa.Table.from_batches(held, self._schema))
        if written != len(wanted):
            raise DataError(f"{self.where}: has no row {int(wanted[written])}; has it changed since it was read?")

    def dataset(self, numbers: Iterable[int]) -> "datasets.Dataset":
        import datasets
        import numpy as np

        wanted = np.asarray(list(numbers), dtype=np.int64)
        start = 0
        parts = []
        for batch in self._batches():
            low, high = np.searchsorted(wanted, [start, start + batch.num_rows])
            parts.append(_take(batch, wanted[low:high] - start))
            start += batch.num_rows
        return datasets.Dataset(pa.Table.from_batches(parts, self._schema))


def _check_names(fields: Iterable[pa.Field], where: str, within: str = "") -> None:
    """Refuses two columns of one name, and two fields of one name in an object, of which one would be lost."""
    seen: set[str] = set()
    for field in fields:
        name = within + field.name
        if name in seen:
            raise DataError(f"{where}: has two columns of the name {spelled(name)}; rename one of them")
        seen.add(name)
        kind = field.type
        while hasattr(kind, "value_type"):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            _check_names((kind.field(i) for i in range(kind.num_fields)), where, f"{name}.")


def _take(batch: pa.RecordBatch, positions: Any) -> pa.RecordBatch:
    try:
        return batch.take(pa.array(positions))
    except pa.ArrowNotImplementedError:  # there are types that cannot be taken from, but every one has slices
        parts = [batch.slice(position, 1) for position in positions]
        return pa.concat_batches(parts) if parts else batch.slice(0, 0)


def _batch_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        # Arrow does not check that text is UTF-8; find the rows that are not.
        found: list[dict[str, Any] | None] = []
        for position in range(batch.num_rows):
            try:
                found.extend(batch.slice(position, 1).to_pylist())
            except UnicodeDecodeError:
                found.append(None)
        return found


class _Datasets(Source):
    """A `datasets.Dataset`: saved, from the hub, or in memory."""

    def __init__(self, spec: Any, label: str, name: str, format: str, data: "datasets.Dataset") -> None:
        super().__init__(spec, label, name)
        self.format, self._data = format, data.with_format(None)

    @property
    def columns(self) -> list[str] | None:
        return list(self._data.column_names)

    def _doubtful_columns(self) -> list[str] | None:
        return [field.name for field in self._data.features.arrow_schema if not _fits_json(field.type)]

    def _content_hash(self) -> str:
        if self.format == "arrow":
            return sha256_content(str(self.spec))
        return super()._content_hash()

    def scan(self, columns: Collection[str] | None = None, *, parse: bool = True) -> Iterator[Row]:
        data = self._data
        if columns is not None:
            data = data.select_columns([column for column in data.column_names if column in columns])
        names = data.column_names
        number = 0
        try:
            for batch in data.iter(_BATCH) if names else ():
                for values in zip(*(batch[name] for name in names), strict=True):
                    yield Row(number, None, dict(zip(names, values, strict=True)), None)
                    number += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{self.where}: damaged Arrow data after row {number} ({_short(error)}); save it again"
            ) from error

    def pick(self, numbers: Iterable[int], *, parse: bool = True) -> Iterator[Row]:
        chosen = list(numbers)
        if chosen and chosen[-1] >= len(self._data):
            raise DataError(f"{self.where}: has no row {chosen[-1]}; has it changed since it was read?")
        picked = _Datasets(self.spec, self.label, self.name, self.format, self._data.select(chosen))
        for number, row in zip(chosen, picked.scan(), strict=True):
            yield row._replace(number=number)

    def dataset(self, numbers: Iterable[int]) -> "datasets.Dataset":
        return self._data.select([int(number) for number in numbers])


class _Mappings(Source):
    """A sequence of mappings."""

    format = "memory"

    def scan(self, columns: Collection[str] | None = None, *, parse: bool = True) -> Iterator[Row]:
        for number, value in enumerate(self.spec):
            if isinstance(value, Mapping):
                yield Row(number, None, dict(value), None)
            else:
                yield Row(number, None, None, f"is no mapping of column names to values but {type(value).__name__}")


def _open_memory(spec: Any, name: str) -> Source:
    import datasets

    if isinstance(spec, datasets.Dataset):
        return _Datasets(spec, f"<{len(spec)} rows in memory>", name, "memory", spec)
    if isinstance(spec, Mapping) or not isinstance(spec, Sequence):
        hint = "choose one split of it" if isinstance(spec, datasets.DatasetDict) else "give a list of mappings"
        raise DataError(
            f"{name}: cannot read rows from {type(spec).__name__}; {hint}, a datasets.Dataset, a path or a hub id"
        )
    return _Mappings(spec, f"<{len(spec)} rows in memory>", name)


# --- finding the reader -------------------------------------------------------------------------------------------


def _open_json(path: Path, label: str, name: str) -> Source:
    """One array of rows, or one row per line, whatever the file is called."""
    where = f"{name} {label}"
    with open_bytes(path, where) as file:
        start = file.read(4096).removeprefix(_BOM).lstrip()
    if start.startswith(b"[") and (split_suffix(path)[0] == ".json" or _ARRAY.match(start)):
        return _JsonArray(path, label, name)
    if _SPREAD_OBJECT.match(start):
        key = re.search(rb'"([A-Za-z_]+)"\s*:\s*\[\s*\{', start)
        rows = f" under '{key[1].decode()}'" if key is not None else ""
        raise DataError(
            f"{where}: is one JSON object over several lines, not one row per line; save its list of rows{rows} by "
            "itself, as a JSON array or one row per line"
        )
    return _JsonLines(path, label, name)


_ARRAY = re.compile(rb"\[\s*(?:[{\]]|\Z)")
# An object whose first line ends before anything of it is closed, and that goes on in the next.
_SPREAD_OBJECT = re.compile(
    rb'\{[ \t]*(?:\r?\n\s*["}]|"\w+"[ \t]*:[ \t]*\[[ \t]*\{?[ \t]*\r?\n\s*["{\[\]]|[^\n]*,[ \t]*\r?\n\s*"\w+"\s*:)'
)
_READERS: dict[str, Callable[[Path, str, str], Source]] = {
    ".jsonl": _open_json,
    ".ndjson": _open_json,
    ".json": _open_json,
    ".csv": _Csv,
    ".parquet": _Parquet,
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:/]+){0,2}")


def _open_file(path: Path, label: str, name: str) -> Source:
    where = f"{name} {label}"
    check_ordinary(path, where)
    suffix, compression = split_suffix(path)
    if suffix not in _READERS:
        raise DataError(f"{where}: unknown kind of file '{path.suffix}'; known are {_FORMATS}")
    if suffix == ".parquet" and compression is not None:
        raise DataError(f"{where}: Parquet compresses by itself; unpack the file and give the .parquet inside")
    try:
        check_magic(path, where)
    except OSError as error:
        raise DataError(f"{where}: cannot be opened ({error.strerror}); check its permissions") from error
    return _READERS[suffix](path, label, name)


def _open_folder(path: Path, split: str | None, label: str, name: str) -> Source:
    import datasets

    where = f"{name} {label}"
    if (path / "dataset_dict.json").is_file():
        try:
            splits = [str(name) for name in read_json(path / "dataset_dict.json")["splits"]]
        except (DataError, OSError, KeyError, TypeError) as error:
            raise DataError(f"{where}: dataset_dict.json is damaged and names no splits; save it again") from error
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            raise DataError(f"{where}: is a folder of splits; write {path}:SPLIT with one of {', '.join(splits)}")
        path = path / str(split)
    elif split is not None:
        raise DataError(f"{where}: the folder has no splits; leave ':{split}' away")
    if not (path / "state.json").is_file():
        raise DataError(
            f"{where}: is a directory without a saved dataset; give a file or a folder written by Dataset.save_to_disk"
        )
    try:
        data = datasets.load_from_disk(str(path))
        # Offsets that lead astray would end the process when they are followed.
        data.data.table.validate(full=True)
    except Exception as error:  # whatever is wrong with the folder, the caller has to replace it
        raise DataError(f"{where}: the saved dataset cannot be opened ({_short(error)}); save it again") from error
    _check_names(data.data.table.schema, where)
    return _Datasets(path, label, name, "arrow", data)


def _open_hub(text: str, name: str) -> Source:
    import datasets

    identifier, *parts = text.split(":")
    where = f"{name} {text}"
    try:
        if len(parts) == 2:
            data = datasets.load_dataset(identifier, parts[0], split=parts[1])
        elif parts:
            data = _config_or_split(identifier, parts[0])
        else:
            data = datasets.load_dataset(identifier)
    except Exception as error:  # network, authentication, unknown names: the hub's own words tell which
        if offline():
            raise DataError(
                f"{where}: no such file or folder, and HF_HUB_OFFLINE forbids to look on the hub; "
                f"download it and give a file ({_FORMATS}) or a folder saved by datasets"
            ) from error
        raise DataError(
            f"{where}: no such file or folder, and the hub cannot give it ({_short(error)}); "
            "check the name, or give a local file"
        ) from error
    if isinstance(data, dict):
        splits = list(data)
        if len(splits) > 1 and "train" not in splits:
            raise DataError(f"{where}: has several splits; write {text}:SPLIT with one of {', '.join(splits)}")
        data = data["train" if "train" in splits else splits[0]]
    return _Datasets(text, text, name, "hub", data)


def _config_or_split(identifier: str, part: str) -> Any:
    import datasets

    try:
        datasets.load_dataset_builder(identifier, part)
    except ValueError:
        return datasets.load_dataset(identifier, split=part)
    return datasets.load_dataset(identifier, part)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- JSON out -----------------------------------------------------------------------------------------------------


def _fits_json(kind: pa.DataType) -> bool:
    """Whether JSON holds every value of an Arrow type."""
    types = pa.types
    if types.is_struct(kind):
        return all(_fits_json(kind.field(position).type) for position in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _fits_json(kind.value_type)
    text = types.is_string(kind) or types.is_large_string(kind)
    return text or any(test(kind) for test in (types.is_integer, types.is_floating, types.is_boolean, types.is_null))


def _json_line(value: Any) -> bytes:
    """A row as JSON; raises what `json.dumps` does where it cannot be, see `Source.check_json_lines`."""

    def default(item: Any) -> Any:
        if isinstance(item, datetime.date | datetime.time):
            return item.isoformat()
        if isinstance(item, decimal.Decimal):
            return str(item)
        if hasattr(item, "tolist"):
            return item.tolist()
        raise TypeError(f"a value of the type {type(item).__name__}")

    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=default)
    except ValueError:
        text = json.dumps(_without_nan(value), ensure_ascii=False, default=default)
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(_without_nan(value), default=default).encode("ascii") + b"\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
