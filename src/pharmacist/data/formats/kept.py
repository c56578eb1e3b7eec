"""Rows of a text file that was read, kept in a file of our own: whoever needs them again does not walk the pool."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pharmacist.core.files import atomic_path
from pharmacist.data.formats.base import Row


_SCHEMA = pa.schema([("number", pa.int64()), ("line", pa.int64()), ("raw", pa.binary())])
_END = np.iinfo(np.int64).max


class KeptRows:
    """The bytes of rows, written once in input order and read in batches, so that memory stays flat.

    They are not memory-mapped, for pages that were read would pile up.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._file: Any = None

    @contextmanager
    def written_to(self, path: Path) -> Iterator[None]:
        """Takes rows in the block, and gives them when it has ended; the file may be deleted then."""
        with atomic_path(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
            with pa.ipc.new_file(file, _SCHEMA) as self._file:
                yield
        self._file = pa.ipc.open_file(pa.OSFile(str(path)))

    def add(self, rows: Sequence[Row]) -> None:
        """Writes a batch."""
        self._starts.append(rows[0].number if self._starts else 0)
        columns = [[getattr(row, name) for row in rows] for name in _SCHEMA.names]
        self._file.write_batch(pa.record_batch(columns, schema=_SCHEMA))

    def rows(self, wanted: npt.NDArray[np.int64] | None = None) -> Iterator[Row]:
        """All rows, or those of these numbers that are there, without values."""
        for i, (start, end) in enumerate(itertools.pairwise([*self._starts, _END])):
            among = None if wanted is None else wanted[(start <= wanted) & (wanted < end)]
            if among is None or len(among):
                batch = self._file.get_batch(i)
                if among is not None:
                    batch = batch.filter(pa.array(np.isin(batch["number"], among)))
                for number, line, raw in zip(*(column.to_pylist() for column in batch), strict=True):
                    yield Row(number, line, None, None, raw)
