"""Byte streams over plain, gzip and zstd files; zstd by Arrow, for fsspec needs a further package."""

import codecs
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pharmacist.core.errors import DataError, one_line


SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
"""File suffix -> compression."""

# A zstd file may begin with a skippable frame.
_MAGIC = {".gz": re.compile(rb"\x1f\x8b"), ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")}


def split_suffix(path: Path) -> tuple[str, str | None]:
    """The suffix that names the format, in lower case, and the compression.

    >>> split_suffix(Path("pool.JSONL.gz"))
    ('.jsonl', 'gzip')
    """
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return path.with_suffix("").suffix.lower(), SUFFIXES[suffix]
    return suffix, None


def check_magic(path: Path, where: str) -> None:
    """Refuses a file whose first bytes belong to another compression than its name says, or to UTF-16 text."""
    with path.open("rb") as file:
        start = file.read(4)
    expected = split_suffix(path)[1]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and expected is None:
        raise DataError(f"{where}: is UTF-16 or UTF-32 text; save it as UTF-8")
    suffix = next((suffix for suffix, magic in _MAGIC.items() if magic.match(start)), "")
    if suffix and SUFFIXES[suffix] != expected:
        raise DataError(f"{where}: holds {SUFFIXES[suffix]} data under another name; rename it to end in {suffix}")
    if start and expected and not suffix:
        raise DataError(f"{where}: is not a {expected} file although its name says so; rename it or compress it again")


class HashedFile(io.FileIO):
    """A file that is hashed while it is read from its beginning."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._digest = hashlib.sha256()

    def readinto(self, buffer: Any) -> int:
        """Reads and hashes."""
        count = super().readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        return count

    def sha256(self) -> str:
        """Hex sha256 of the file; reads the rest of it."""
        rest = bytearray(1 << 20)
        while self.readinto(rest):
            pass
        return self._digest.hexdigest()


@contextmanager
def open_bytes(path: Path, where: str, file: io.FileIO | None = None) -> Iterator[BinaryIO]:
    """Opens a file for reading, decompressed as its name says; a DataError where the data end early or are damaged.

    `file` is the same file, opened in another way, which is closed in the end.
    """
    compression = split_suffix(path)[1]
    with io.BufferedReader(file or io.FileIO(path), 1 << 20) as plain:
        if compression is None:
            yield plain
            return
        try:
            # Unlike Arrow, the standard library reads gzip data that are padded with zeros.
            gz = compression == "gzip"
            with gzip.GzipFile(fileobj=plain) if gz else pa.CompressedInputStream(plain, compression) as stream:
                yield cast(BinaryIO, io.BufferedReader(stream, 1 << 20))
        except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{where}: damaged {compression} data ({one_line(error)}); copy or compress it again"
            ) from error
