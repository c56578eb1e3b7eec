"""Files that are written whole or not at all."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError, safe_open

from pharmacist.core.errors import DataError


FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a full disk, quota or file."""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Waits until a file, or a folder with all that is in it, is on the disk."""
    for part in (path, *path.rglob("*")) if path.is_dir() else (path,):
        _sync(part)


def remove(path: Path, *, as_far_as_possible: bool = False) -> None:
    """Deletes a file, folder or link if it exists; the target of a link stays.

    With `as_far_as_possible` files in a folder that cannot be deleted, such as open ones on NFS, stay.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=as_far_as_possible)  # which unlinks links too


def commit_file(temporary: Path, path: Path) -> None:
    """Makes the finished file or folder `temporary` appear as `path` (beside it): fsync, rename, fsync the folder."""
    sync(temporary)
    if temporary.is_dir():
        remove(path)  # of an interrupted run, never yet declared finished
    os.replace(temporary, path)
    _sync(path.parent)  # the rename is only durable once the folder is: see fsync(2)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for libraries that want a name; renamed when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        commit_file(temporary, path)
    finally:
        remove(temporary, as_far_as_possible=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it replaces `path` when the block succeeds."""
    with atomic_path(path) as temporary:
        temporary.mkdir()
        yield temporary


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
    _sync(folder)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Opens a temporary text file (UTF-8) that becomes `path` when the block succeeds."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        yield file


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_write(path) as file:
        file.write(text)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON atomically (indented, UTF-8; NaN and infinity are refused because JSON has none)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_ordinary(path: str | os.PathLike[str], where: str = "") -> None:
    """Raises a DataError for a named pipe or device, which cannot be read twice and may never end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise DataError(
            f"{where or path}: is not a regular file but a named pipe or a device; save its content to a file"
        )


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file; a DataError where it holds no JSON or is no ordinary file, an OSError where it is shut."""
    check_ordinary(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(
            f"{path}: is damaged, it contains no JSON ({reason}); restore it or, in the folder work of a run, delete "
            "that folder"
        ) from error


def read_json_lines(path: str | os.PathLike[str]) -> list[Any]:
    """Reads a file with one JSON value per line; a DataError where there is none, or a line holds no JSON."""
    check_ordinary(path)
    found = []
    try:
        with open(path, "rb") as file:
            for line in file:
                found.append(json.loads(line))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); run the command that writes it again") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: line {len(found) + 1} is damaged, it contains no JSON; run the command that writes it again"
        ) from error
    return found


def append_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Appends one JSON value per line to a log of partial results; ASCII, so that no torn line tears a character."""
    with path.open("a", encoding="ascii") as file:
        file.write("".join(json.dumps(value, ensure_ascii=True) + "\n" for value in values))


def read_json_log(path: Path, *, mend: bool = True) -> list[Any]:
    """The whole lines of what `append_json_lines` wrote; nothing where there is no file.

    `mend` cuts off a last line that a kill tore, so that the next one begins a line; not where another process writes.
    """
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if mend and len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def is_whole_tensors(path: Path) -> bool:
    """Whether a safetensors file has its full length and a valid header; the tensors are not read."""
    try:
        with safe_open(path, framework="numpy"):
            return True
    except SafetensorError:
        return False
