"""Rows of a text file that was read, kept in a file of our own: whoever needs them again does not walk the pool."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from pharmacist.core.files import atomic_path
from pharmacist.data.formats.base import Row, ascending
from pharmacist.data.formats.text import TextFile


_SCHEMA = pa.schema([("number", pa.int64()), ("line", pa.int64()), ("raw", pa.binary())])
_END = np.iinfo(np.int64).max


class KeptRows(TextFile):
    """The bytes of those rows of a text file that were kept; see `keeping`.

    They are read batch by batch and not memory-mapped, so that pages that were read do not pile up.
    """

    def __init__(self, origin: TextFile) -> None:
        super().__init__(origin.path, origin.label, origin.name)
        self.format, self._origin = origin.format, origin
        self._starts: list[int] = []
        self._written: Any = None

    @property
    def columns(self) -> list[str] | None:
        return self._origin.columns

    def _content_hash(self) -> str:
        return self._origin.fingerprint()

    def split(self, file: BinaryIO) -> Iterator[Row]:
        return self._origin.split(file)

    def parse(self, raw: bytes) -> tuple[dict[str, Any] | None, str | None]:
        return self._origin.parse(raw)

    def join(self, rows: Iterable[bytes]) -> Iterator[bytes]:
        return self._origin.join(rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Keeps rows, in input order."""
        self._starts.append(rows[0].number if self._starts else 0)
        columns = [[getattr(row, name) for row in rows] for name in _SCHEMA.names]
        self._written.write_batch(pa.record_batch(columns, schema=_SCHEMA))

    def unparsed(self, numbers: Iterable[int] | None = None) -> Iterator[Row]:
        wanted = None if numbers is None else ascending(numbers)
        for i, (start, end) in enumerate(itertools.pairwise([*self._starts, _END])):
            among = None if wanted is None else wanted[(start <= wanted) & (wanted < end)]
            if among is not None and not len(among):
                continue
            batch = self._written.get_batch(i)
            if among is not None:
                lost = np.setdiff1d(among, batch["number"])
                if len(lost):
                    raise self._no_row(int(lost[0]))
                batch = batch.filter(pa.array(np.isin(batch["number"], among)))
            for number, line, raw in zip(*(column.to_pylist() for column in batch), strict=True):
                yield Row(number, line, None, None, raw)


@contextmanager
def keeping(origin: TextFile, path: Path) -> Iterator[KeptRows]:
    """Yields a source that takes rows of `origin`, and gives them when the block has ended.

    Args:
        origin: Where the rows come from; it parses and joins them.
        path: The file to write them to, which may be deleted while the source is in use.
    """
    kept = KeptRows(origin)
    with atomic_path(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        with pa.ipc.new_file(file, _SCHEMA) as kept._written:
            yield kept
    kept._written = pa.ipc.open_file(pa.OSFile(str(path)))
