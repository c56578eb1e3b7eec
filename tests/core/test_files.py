"""Files appear whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest

from pharmacist.core import files
from pharmacist.core.files import FULL_DISK, atomic_path, atomic_write, read_json, write_json, write_text


class Stop(Exception):
    pass


@pytest.mark.parametrize("before", [None, b"old"])
def test_an_exception_leaves_what_was_there(before: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    for open_it in (atomic_write, atomic_path):
        with pytest.raises(Stop), open_it(path) as handle:
            if isinstance(handle, Path):
                handle.write_bytes(b"half of it")
            else:
                handle.write("half of it")
                handle.flush()
            raise Stop
        assert (path.read_bytes() if path.exists() else None) == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["file"] * (before is not None)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_text(path, "new")
    assert caught.value.errno in FULL_DISK
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with atomic_write(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_text_is_utf8_with_plain_line_breaks(tmp_path: Path) -> None:
    write_text(tmp_path / "deeper" / "file", "ünï\n漢\n")
    assert (tmp_path / "deeper" / "file").read_bytes() == "ünï\n漢\n".encode()


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "ü": "漢"}
    write_json(tmp_path / "file", value)
    assert read_json(tmp_path / "file") == value
    assert "ü" in (tmp_path / "file").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_nan(value: float, tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"x": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "file", {"x": value})
    assert json.loads((tmp_path / "file").read_text()) == {"x": 1}
