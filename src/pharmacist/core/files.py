"""Files that are written whole or not at all."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers that mean: no room for what was to be written."""


def _sync_folder(folder: Path) -> None:
    # The rename itself is only durable once the folder is: see fsync(2).
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_file(temporary: Path, path: Path) -> None:
    """Makes the finished file `temporary` appear as `path` (same folder): fsync, rename, fsync the folder."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` for libraries that want a file name; renamed when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        commit_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it takes the place of `path` when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        if path.exists():  # of an interrupted run, never yet declared finished
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def show_in(folder: Path, files: Iterable[Path]) -> None:
    """Makes files of a subfolder appear in a folder too, by relative links, so that the folder can be moved.

    Where the file system has no links they are copied.
    """
    for file in files:
        temporary = folder / f".{file.name}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(os.path.relpath(file, folder))
        except OSError as error:
            if error.errno in FULL_DISK:
                raise
            shutil.copyfile(file, temporary)
        os.replace(temporary, folder / file.name)
    _sync_folder(folder)


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file that becomes `path` only when the block ends without an exception.

    Args:
        path: The final file; an existing one stays untouched until the rename.
        mode: ``"wb"`` or ``"w"`` (UTF-8).
    """
    with atomic_path(path) as temporary:
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        with open(temporary, mode, **text) as file:  # type: ignore[call-overload]
            yield file


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_write(path, "w") as file:
        file.write(text)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON atomically (indented, UTF-8; NaN and infinity are refused because JSON has none)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))
