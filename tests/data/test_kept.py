"""A pool is read once: what is needed of its rows later comes from what was kept, not from the file."""

import json
import random
from pathlib import Path

import pytest

from pharmacist.core.errors import DataError
from pharmacist.core.hashing import sha256_file
from pharmacist.data.formats import open_source, write_rows
from pharmacist.data.formats.text import TextFile
from pharmacist.data.records import Records, read_records
from tests.support.files import SUFFIXES, made_rows, save


def kept(folder: Path, suffix: str, rows: list[dict]) -> tuple[Path, Records]:
    path = save(folder / f"pool.{suffix}", rows)
    return path, read_records(open_source(path), work_dir=folder / "work", on_bad_row="skip", keep=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_are_written_as_from_the_file(tmp_path: Path, suffix: str) -> None:
    rows = made_rows(9000)  # more than one batch
    path, records = kept(tmp_path, suffix, rows)
    chosen = sorted(random.Random(0).sample(range(9000), 700))
    own = suffix.split(".")[0]
    for numbers in (chosen, [], [0, 8999], list(range(9000))):
        for source, name in ((open_source(path), "a"), (records.source, "b")):
            write_rows(source, numbers, tmp_path / f"{name}.{suffix}", own)
            write_rows(source, numbers, tmp_path / f"{name}.jsonl", "jsonl")
        for ending in (suffix, "jsonl"):
            assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
    assert records.source.dataset(chosen).to_list() == [rows[i] for i in chosen]
    assert list(records.originals()) == rows and records.source.columns == open_source(path).columns


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != "parquet"])
def test_nothing_but_what_was_kept_is_read(tmp_path: Path, suffix: str) -> None:
    rows = made_rows(30)
    path, records = kept(tmp_path, suffix, rows)
    content = sha256_file(path)
    path.unlink()
    for file in (tmp_path / "work").iterdir():
        file.unlink()
    assert records.source.fingerprint() == content, "the reading gives the fingerprint too"
    assert [row["id"] for row in records.originals({"id"})] == [f"r{i}" for i in range(30)]
    write_rows(records.source, [3, 7], tmp_path / f"out.{suffix}")
    assert [value for _, value in open_source(tmp_path / f"out.{suffix}").rows()] == [rows[3], rows[7]]
    assert (records.source.format, records.source.label) == (suffix.split(".")[0], str(path))


def test_rows_that_were_refused_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    good = json.dumps({"prompt": "p", "completion": "c"})
    path.write_text(f"{good}\n{{\n\n{good}\n{good}\n")
    records = read_records(open_source(path), work_dir=tmp_path / "work", on_bad_row="skip", keep=True)
    assert [(row.number, row.line) for row in records.source.scan()] == [(0, 1), (2, 4), (3, 5)]
    assert len(list(records.originals())) == 3 and len(list(records.without([1]).originals())) == 2
    for numbers in ([1], [0, 1], [3, 9]):
        with pytest.raises(DataError, match="has no row [19]"):
            write_rows(records.source, numbers, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="ascend"):
        write_rows(records.source, [2, 0], tmp_path / "out.jsonl")


def test_a_reading_that_ends_early_is_no_fingerprint(tmp_path: Path) -> None:
    for suffix in ("jsonl", "jsonl.gz", "jsonl.zst", "csv", "json"):
        path = save(tmp_path / f"pool.{suffix}", made_rows(5000))
        source = open_source(path)
        assert isinstance(source, TextFile)
        next(source.scan())
        list(source.pick([2]))
        assert source.fingerprint() == sha256_file(path), suffix
