"""A benchmark at a URL: any machine finds there what is finished, and nothing that is half there."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pytest

from pharmacist.cli.main import main
from pharmacist.core.config import from_mapping
from pharmacist.core.errors import DataError
from pharmacist.core.hashing import sha256_text
from pharmacist.core.manifest import read_manifest
from pharmacist.pipeline.bench import BenchOptions, BenchResult, StagesFailed, bench
from pharmacist.pipeline.bench.grid import expand
from pharmacist.pipeline.bench.remote import Remote
from tests.cli.world import fingerprints
from tests.pipeline.bench.fakes import OTHER, Stages
from tests.pipeline.bench.grids import FEW_STEPS, SMALL, TIMES, results, write_grid


GRID: dict[str, Any] = SMALL | {"selectors": ["random"]}
ALL = {"rank": 1, "select": 1, "align": 2, "attack": 2, "evaluate": 6}


@pytest.fixture
def url() -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    yield "memory://bench/there"
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def run(url: str, machine: Path, **changes: Any) -> BenchResult:
    """As another machine each, by its work folder."""
    options = GRID | changes | {"output_dir": url, "work_dir": str(machine)}
    return bench(from_mapping(BenchOptions, options, where="grid"))


def table(url: str) -> pd.DataFrame:
    with fsspec.open(f"{url}/results.parquet") as file:
        return pd.read_parquet(file).drop(columns=list(TIMES))


def markers(url: str) -> list[str]:
    fs, root = fsspec.core.url_to_fs(url)
    return sorted(fs.glob(f"{root}/finished/*.json"))


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_another_machine_finds_everything(stages: Stages, tmp_path: Path, url: str, kind: str) -> None:
    url = f"file://{tmp_path}/there" if kind == "file" else url
    run(url, tmp_path / "a")
    assert stages.began() == ALL
    assert len(markers(url)) == 12
    found = run(url, tmp_path / "b")
    assert stages.began() == {} and found.ran == [] and len(found.rows) == 2
    assert read_manifest(tmp_path / "b" / "results").status == "success"
    assert not (tmp_path / "b" / "stages").exists(), "what is only read needs no weights"
    bench(from_mapping(BenchOptions, GRID | {"output_dir": str(tmp_path / "plain")}, where="grid"))
    pd.testing.assert_frame_equal(table(url), results(tmp_path / "plain"))
    pd.testing.assert_frame_equal(table(url), results(tmp_path / "b" / "results"))
    assert stages.began() == ALL


def test_another_machine_goes_on(stages: Stages, tmp_path: Path, url: str) -> None:
    run(url, tmp_path / "a", only="sft")
    stages.began()
    found = run(url, tmp_path / "b")
    assert stages.began() == {"align": 1, "attack": 1, "evaluate": 3}
    assert len(found.rows) == 2
    assert run(url, tmp_path / "a").ran == [] and stages.began() == {}
    bench(from_mapping(BenchOptions, GRID | {"output_dir": str(tmp_path / "plain")}, where="grid"))
    pd.testing.assert_frame_equal(table(url), results(tmp_path / "plain"))
    # What was downloaded is whole, and no more than was needed.
    here = {path.name.partition("-")[0] for path in (tmp_path / "b" / "stages").iterdir()}
    assert here == {"rank", "select", "align", "attack", "evaluate"}
    for path in (tmp_path / "b" / "stages").glob("rank-*"):
        assert {file.name for file in path.iterdir()} == {"manifest.json", "result.txt", "selected.jsonl"}
        assert (path / "result.txt").read_text() == (tmp_path / "a" / "stages" / path.name / "result.txt").read_text()


def test_keys_do_not_depend_on_where_results_are(tmp_path: Path) -> None:
    def names(output_dir: str, root: Path) -> list[str]:
        options = from_mapping(BenchOptions, GRID | {"output_dir": output_dir}, where="grid")
        return list(expand(options, root).stages)

    assert names("s3://bucket/name", tmp_path / "a") == names(str(tmp_path / "b"), tmp_path / "b")


def test_an_upload_that_was_cut_is_not_finished(
    stages: Stages, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Remote.put

    def cut(self: Remote, folder: Path, names: list[str], place: str = "") -> None:
        half = place.startswith("stages/align")
        put(self, folder, names[:1] if half else names, place)
        if half:
            raise DataError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "put", cut)
        with pytest.raises(StagesFailed, match="the network is gone"):
            run(url, tmp_path / "a")
    assert stages.began() == {"rank": 1, "select": 1, "align": 2}
    fs, root = fsspec.core.url_to_fs(url)
    assert len(fs.glob(f"{root}/stages/align-*")) == 2 and not [name for name in markers(url) if "align" in name]
    run(url, tmp_path / "b", only="sft")
    assert stages.began() == {"align": 1, "attack": 1, "evaluate": 3}, "another machine has nothing to go on from"
    run(url, tmp_path / "a")
    assert stages.began() == {"attack": 1, "evaluate": 3}, "the one whose upload was cut uploads what it has"
    assert len(markers(url)) == 12
    assert len(table(url)) == 2


def test_a_marker_that_was_cut_is_none(stages: Stages, tmp_path: Path, url: str) -> None:
    run(url, tmp_path / "a")
    stages.began()
    fs, _ = fsspec.core.url_to_fs(url)
    name = next(name for name in markers(url) if "align" in name)
    fs.pipe_file(name, fs.cat_file(name)[:100])
    run(url, tmp_path / "b")
    assert stages.began()["align"] == 1
    json.loads(fs.cat_file(name))


@pytest.mark.parametrize("part", ["files", "folder"])
@pytest.mark.parametrize(
    "name", ["{elsewhere}/taken", "../../taken", "work/../../../taken", "..", "", "./taken", "a//taken", "a/*", "a\\b"]
)
def test_a_marker_cannot_name_files_elsewhere(part: str, name: str, stages: Stages, tmp_path: Path) -> None:
    url, name = f"file://{tmp_path}/there", name.format(elsewhere=tmp_path)
    run(url, tmp_path / "a", only="sft")
    marker = next(Path(path) for path in markers(url) if "select" in path)
    content = json.loads(marker.read_text())
    if part == "files":
        content["files"][name] = sha256_text("taken")
        source = tmp_path / "there" / content["folder"] / name.lstrip("/")
        if source.name not in ("..", "") and not source.is_dir():  # what is named can be had
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text("taken")
    else:
        content["folder"] = name
    marker.write_text(json.dumps(content))
    before = fingerprints(tmp_path / "a", tmp_path / "there")
    with pytest.raises(DataError, match="names the file .*, which lies outside the stage's folder; .*delete the file"):
        run(url, tmp_path / "b")
    assert not (tmp_path / "b").exists() and not (tmp_path / "taken").exists()
    assert fingerprints(tmp_path / "a", tmp_path / "there") == before


def test_a_copy_that_changed_is_refused(stages: Stages, tmp_path: Path, url: str) -> None:
    run(url, tmp_path / "a", only="sft")
    fs, root = fsspec.core.url_to_fs(url)
    for name in fs.glob(f"{root}/stages/select-*/*/result.txt"):
        fs.pipe_file(name, b"something else")
    with pytest.raises(StagesFailed, match="result.txt: is not what was uploaded; delete the stage's file"):
        run(url, tmp_path / "b", only="vaccine")
    assert not list((tmp_path / "b" / "stages").glob("select-*"))


def test_a_network_that_fails_makes_nothing_anew(
    stages: Stages, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(url, tmp_path / "a")
    stages.began()
    memory = fsspec.filesystem("memory")

    def fails(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "cat_file", fails)
        with pytest.raises(DataError, match=r"there: cannot be read \(ConnectionError: no route to host\); check"):
            run(url, tmp_path / "b")
    assert stages.began() == {} and not (tmp_path / "b").exists()


def test_who_was_quicker_stays(stages: Stages, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two drivers at once: neither knows at its start what the other one finishes."""
    finished, first = Remote.finished, True

    def other_goes_first(self: Remote, names: list[str]) -> Any:
        nonlocal first
        found = finished(self, names)
        if first:
            first = False
            run(url, tmp_path / "b")
        return found

    monkeypatch.setattr(Remote, "finished", other_goes_first)
    run(url, tmp_path / "a")
    assert stages.began() == ALL, "the other one's were taken"
    for path in (tmp_path / "a" / "stages").iterdir():
        there = tmp_path / "b" / "stages" / path.name
        assert read_manifest(path).created == read_manifest(there).created
    fs, root = fsspec.core.url_to_fs(url)
    assert len(fs.glob(f"{root}/stages/*/*")) == 12


@pytest.mark.parametrize("same", [True, False], ids=["with the same content", "with other content"])
def test_a_stage_that_was_deleted_is_made_again_with_what_is_below(
    same: bool, stages: Stages, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(url, tmp_path / "a")
    stages.began()
    name = next(name for name in markers(url) if "align" in name)
    fsspec.core.url_to_fs(url)[0].rm(name)
    if not same:
        monkeypatch.setenv(OTHER, "yes")
    run(url, tmp_path / "b")
    before = table(url)
    assert stages.began() == ({"align": 1} if same else {"align": 1, "attack": 1, "evaluate": 3})
    assert run(url, tmp_path / "b").ran == [] == run(url, tmp_path / "c").ran
    pd.testing.assert_frame_equal(table(url), before)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--output-dir", "gopher://b/k"], "--output-dir gopher://b/k: Protocol not known: gopher; give a folder"),
        (["--output-dir", "memory://b[1]"], "--output-dir memory://b[1]: a URL must hold none of * ? ["),
        (["--output-dir", "memory://b", "--overwrite"], "--overwrite: deletes nothing at a URL"),
        (["--output-dir", "out", "--work-dir", "w"], "--work-dir: is for an --output-dir that is a URL"),
        (["--output-dir", "file:///proc/nowhere"], "file:///proc/nowhere: cannot be written (FileNotFoundError"),
        (["--output-dir", "memory://b", "--work-dir", "thesis"], "choose an empty --work-dir"),
    ],
    ids=str,
)
def test_told_in_one_line(
    words: list[str],
    told: str,
    stages: Stages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "thesis" / "results").mkdir(parents=True)
    (tmp_path / "thesis" / "results" / "thesis.txt").write_text("mine")
    assert main(["bench", "--config", str(write_grid(tmp_path / "grid.yaml")), *words]) == 2
    text = capsys.readouterr().err
    assert told in text and text.count("\n") == 1
    assert stages.began() == {} and not (tmp_path / "out").exists()


def test_a_missing_driver(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    assert main(["bench", "--config", str(write_grid(tmp_path / "grid.yaml")), "--output-dir", "s3://b/k"]) == 2
    text = capsys.readouterr().err
    assert "--output-dir s3://b/k: Install s3fs to access S3" in text and text.count("\n") == 1
    assert stages.began() == {}


def test_work_goes_to_the_cache(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    places = {Remote(url).work_dir for url in ("s3://a/b", "s3://a/c")}
    assert len(places) == 2 and all(place.parent == tmp_path / "pharmacist" / "bench" for place in places)
    bench(from_mapping(BenchOptions, GRID | {"output_dir": f"file://{tmp_path}/there/"}, where="grid"))
    assert (Remote(f"file://{tmp_path}/there").work_dir / "results" / "results.parquet").is_file()


@pytest.mark.slow
def test_ray_takes_its_way_by_the_url(stages: Stages, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    url = f"file://{tmp_path}/there"
    run(url, tmp_path / "a", executor="ray")
    assert stages.began() == ALL
    assert run(url, tmp_path / "b", executor="ray").ran == []
    bench(from_mapping(BenchOptions, GRID | {"output_dir": str(tmp_path / "plain")}, where="grid"))
    pd.testing.assert_frame_equal(table(url), results(tmp_path / "plain"))


@pytest.mark.slow
def test_real_stages_go_on_elsewhere(tmp_path: Path) -> None:
    """An adapter names its base, and a ranking its pool, where another machine has them."""
    url, few = f"file://{tmp_path}/there", {"selectors": ["random"], "defenses": ["sft"], **FEW_STEPS}
    run(url, tmp_path / "a", **few)
    for name in markers(url):
        if "evaluate" in name or "select" in name:
            Path(name).unlink()
    before = table(url)
    shutil.move(tmp_path / "a", tmp_path / "gone")
    ran = run(url, tmp_path / "b", **few).ran
    assert len(ran) == 6
    bench(from_mapping(BenchOptions, GRID | few | {"output_dir": str(tmp_path / "plain")}, where="grid"))
    pd.testing.assert_frame_equal(table(url), results(tmp_path / "plain"))
    pd.testing.assert_frame_equal(table(url), before)
