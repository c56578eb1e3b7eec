"""Parquet files, in batches."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pharmacist.core.errors import DataError, one_line
from pharmacist.data.formats.base import MAX_ROW_BYTES, Row, Source, ascending
from pharmacist.data.formats.json_text import spelled


BATCH = 1024


class Parquet(Source):
    """A Parquet file; schema, metadata and compression stay when rows are written back."""

    format = "parquet"
    schema: pa.Schema

    def __init__(self, path: Path, label: str, name: str) -> None:
        super().__init__(path, label, name)
        with self._open() as file:
            self.schema = file.schema_arrow
        check_names(self.schema, self.where)
        # `datasets` stores nested values of changing shape as JSON text and says so in the file's metadata.
        as_json = b'"Json"' in (self.schema.metadata or {}).get(b"huggingface", b"")
        self._features = datasets.Features.from_arrow_schema(self.schema) if as_json else None

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.spec, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.where}: is not a Parquet file ({one_line(error)}); write it again") from error

    def _batches(self, columns: Collection[str] | None = None) -> Iterator[pa.RecordBatch]:
        names = None if columns is None else [column for column in self.schema.names if column in columns]
        try:
            with self._open() as file:
                yield from file.iter_batches(BATCH, columns=names)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.where}: damaged Parquet data ({one_line(error)}); write it again") from error

    def scan(self, columns: Collection[str] | None = None) -> Iterator[Row]:
        values = (value for batch in self._batches(columns) for value in _rows(batch))
        for number, value in enumerate(values):
            if value is None:
                yield Row(number, None, None, "is not UTF-8")
            else:
                yield Row(number, None, self._features.decode_example(value) if self._features else value)

    def _taken(self, numbers: Iterable[int]) -> Iterator[pa.RecordBatch]:
        """The rows with these numbers, as Arrow holds them."""
        chosen, start = ascending(numbers), 0
        for batch in self._batches():
            low, high = np.searchsorted(chosen, [start, start + batch.num_rows])
            if high > low:
                yield _take(batch, chosen[low:high] - start)
            start += batch.num_rows
        if len(chosen) and chosen[-1] >= start:
            raise self._no_row(int(chosen[chosen >= start][0]))

    def write(self, numbers: Sequence[int], format: str, path: Path, target: Path) -> None:
        if format != self.format:
            super().write(numbers, format, path, target)
            return
        with self._open() as file:
            groups = file.metadata.num_row_groups and file.metadata.num_columns
            compression = file.metadata.row_group(0).column(0).compression.lower() if groups else "snappy"
        held: list[pa.RecordBatch] = []
        with pq.ParquetWriter(path, self.schema, compression=compression.replace("uncompressed", "none")) as writer:
            for batch in self._taken(numbers):
                held.append(batch)
                if sum(part.nbytes for part in held) > MAX_ROW_BYTES:
                    writer.write_table(pa.Table.from_batches(held, self.schema))
                    held.clear()
            writer.write_table(pa.Table.from_batches(held, self.schema))

    def dataset(self, numbers: Iterable[int]) -> datasets.Dataset:
        taken = pa.Table.from_batches(list(self._taken(numbers)), self.schema)
        try:
            return datasets.Dataset(taken)
        except ValueError as error:  # of types that `datasets` does not have, such as Arrow's maps
            raise DataError(
                f"{self.where}: a dataset cannot contain all its columns ({one_line(error)}); write the rows to a file"
            ) from error


def check_names(fields: Iterable[pa.Field], where: str, within: str = "") -> None:
    """Refuses two columns of one name, and two fields of one name in an object, of which one would be lost."""
    seen: set[str] = set()
    for field in fields:
        name = within + field.name
        if name in seen:
            raise DataError(f"{where}: has two columns with the name {spelled(name)}; rename one of them")
        seen.add(name)
        kind = field.type
        while hasattr(kind, "value_type"):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            check_names(kind, where, f"{name}.")


def _take(batch: pa.RecordBatch, positions: Any) -> pa.RecordBatch:
    try:
        return batch.take(pa.array(positions))
    except pa.ArrowNotImplementedError:  # there are types that cannot be taken from, but every one has slices
        return pa.concat_batches([batch.slice(position, 1) for position in positions])


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:  # Arrow does not check that text is UTF-8; find the rows that are not
        if batch.num_rows == 1:
            return [None]
        return [row for position in range(batch.num_rows) for row in _rows(batch.slice(position, 1))]
