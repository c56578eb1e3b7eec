"""Output folders: resume, complete, refusal, overwriting, lock, phases."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pharmacist.core import rundir
from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import read_json
from pharmacist.core.hashing import sha256_folder
from pharmacist.core.inputs import check_outside
from pharmacist.core.manifest import check_unchanged, missing_output, read_manifest
from pharmacist.core.rundir import RunDir, RunOptions


@dataclass(kw_only=True)
class Options(RunOptions):
    pool: str = "pool.jsonl"
    top: float = 0.3


def start(root: Path, *, stage: str = "curate", version: int = 1, content: str = "abc", **options: object) -> RunDir:
    settings = Options(output_dir=str(root), **options)  # type: ignore[arg-type]
    return RunDir.open(settings, stage=stage, version=version, inputs={"pool": content})


def finish(root: Path, **options: object) -> None:
    run = start(root, **options)  # type: ignore[arg-type]
    run.path("result").write_text("result")
    run.finish(outputs=["result"], counts={"in": 3}, metrics={"x": 1.5}, device="cpu")


def finished(folder: Path) -> bool:
    """Whether a finished run lies in the folder, with all its outputs."""
    if not (folder / "manifest.json").is_file():
        return False
    manifest = read_manifest(folder)
    return manifest.status == "success" and missing_output(folder, manifest) is None


def test_a_finished_run(tmp_path: Path) -> None:
    finish(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.status, manifest.outputs, manifest.counts) == ("success", ["result"], {"in": 3})
    assert manifest.config["pool"] == "pool.jsonl"
    assert manifest.inputs == {"pool": "abc"}
    assert manifest.created <= manifest.finished
    assert finished(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"manifest.json", "result"}


def test_a_second_run_is_complete_and_changes_nothing(tmp_path: Path) -> None:
    finish(tmp_path / "out")
    before = sha256_folder(tmp_path / "out")
    run = start(tmp_path / "out")
    assert run.complete
    run.close()
    assert sha256_folder(tmp_path / "out") == before


def test_a_kill_after_the_last_manifest_leaves_nothing_behind(tmp_path: Path) -> None:
    finish(tmp_path / "out")
    (tmp_path / "out" / "work" / "data").mkdir(parents=True)
    (tmp_path / "out" / "work" / "lock").touch()
    assert start(tmp_path / "out").complete
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"manifest.json", "result"}


def test_a_complete_runs_folder_is_left_to_the_process_that_continues_it(tmp_path: Path) -> None:
    finish(tmp_path / "out")
    other = start(tmp_path / "out")
    other.begin_again()
    other.work("state").write_text("half")
    assert start(tmp_path / "out").complete
    assert other.work("state").read_text() == "half"


def test_an_interrupted_run_resumes(tmp_path: Path) -> None:
    run = start(tmp_path / "out")
    run.work("deep", "state").write_text("half")
    created = run.manifest.created
    run.close()
    assert not finished(tmp_path / "out")
    (tmp_path / "out" / ".scores.parquet.123.tmp").write_text("half")
    (tmp_path / "out" / ".adapter.123.tmp").mkdir()
    again = start(tmp_path / "out")
    assert not again.complete
    assert again.work("deep", "state").read_text() == "half"
    assert again.manifest.created == created
    again.finish(outputs=[])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "manifest.json"
    }  # nor what a kill left half written


def test_a_run_killed_before_its_manifest_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "out" / "work").mkdir(parents=True)
    (tmp_path / "out" / "work" / "lock").touch()
    (tmp_path / "out" / ".manifest.json.7.tmp").touch()
    run = start(tmp_path / "out")
    assert not run.complete
    run.close()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"top": 0.5}, "a run with other top"),
        ({"seed": 1}, "a run with other seed"),
        ({"content": "other"}, "a run with other content of pool"),
        ({"stage": "align"}, "a run of 'curate'"),
        ({"version": 2}, "a run with other code"),
    ],
)
@pytest.mark.parametrize("done", [True, False])
def test_another_run_is_refused_and_untouched(change: dict, named: str, done: bool, tmp_path: Path) -> None:
    if done:
        finish(tmp_path / "out")
    else:
        run = start(tmp_path / "out")
        run.work("state").write_text("half")
        run.close()
    before = sha256_folder(tmp_path / "out")
    with pytest.raises(ConfigError, match=named) as caught:
        start(tmp_path / "out", **change)
    assert "--overwrite" in str(caught.value)
    assert sha256_folder(tmp_path / "out") == before
    assert (tmp_path / "out" / "work").exists() is not done


@pytest.mark.parametrize(
    "change", [{"quiet": True}, {"checkpoint_seconds": 1.0}, {"pool": "elsewhere/pool.jsonl"}, {"overwrite": False}]
)
def test_what_cannot_change_a_result_makes_no_other_run(change: dict, tmp_path: Path) -> None:
    finish(tmp_path / "out")
    assert start(tmp_path / "out", **change).complete


def test_late_options_may_change_before_the_end(tmp_path: Path) -> None:
    def open_with(top: float, seed: int = 0) -> RunDir:
        options = Options(output_dir=str(tmp_path / "out"), top=top, seed=seed)
        return RunDir.open(options, stage="curate", version=1, inputs={}, final=frozenset({"top"}))

    run = open_with(0.3)
    run.work("state").write_text("half")
    run.close()
    with pytest.raises(ConfigError, match="other seed, top"):
        open_with(0.5, seed=1)
    run = open_with(0.5)
    assert run.work("state").read_text() == "half"
    assert read_manifest(tmp_path / "out").config["top"] == 0.5
    run.finish(outputs=[])
    with pytest.raises(ConfigError, match="other top"):  # what is finished says 0.5
        open_with(0.3)
    assert open_with(0.5).complete


def test_overwriting_deletes_runs(tmp_path: Path) -> None:
    finish(tmp_path / "out")
    (tmp_path / "out" / "folder").mkdir()
    (tmp_path / "out" / "folder" / "file").touch()
    run = start(tmp_path / "out", top=0.5, overwrite=True)
    assert not run.complete
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"manifest.json", "work"}
    run.work("state").write_text("half")
    run.close()
    run = start(tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out" / "work").iterdir()] == ["lock"]
    run.close()
    (tmp_path / "empty").mkdir()
    start(tmp_path / "empty", overwrite=True).close()


def test_a_run_killed_while_it_is_deleted_is_neither_complete_nor_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise SystemExit

    finish(tmp_path / "out")
    (tmp_path / "out" / "folder").mkdir()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("shutil.rmtree", killed)
        start(tmp_path / "out", overwrite=True)
    with pytest.raises(ConfigError, match="--overwrite to delete it"):
        start(tmp_path / "out")
    start(tmp_path / "out", overwrite=True).close()
    assert not (tmp_path / "out" / "result").exists()


@pytest.mark.parametrize("foreign", ["thesis.tex", "work/thesis.tex", "manifest.json"])
def test_overwriting_deletes_nothing_but_runs(foreign: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / foreign
    path.parent.mkdir(parents=True)
    path.write_text('{"name": "my web app"}')
    before = sha256_folder(tmp_path / "out")
    for overwrite in (True, False):
        with pytest.raises((ConfigError, DataError), match="not belong to a pharmacist run|not a manifest"):
            start(tmp_path / "out", overwrite=overwrite)
        assert sha256_folder(tmp_path / "out") == before


def test_a_folder_has_one_process_at_a_time(tmp_path: Path) -> None:
    run = start(tmp_path / "out")
    run.work("state").write_text("half")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="another process is working in this folder"):
            start(tmp_path / "out", overwrite=overwrite)
    assert run.work("state").read_text() == "half"
    run.close()
    start(tmp_path / "out").close()


def test_a_lock_that_was_deleted_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, flock = start(tmp_path / "out"), fcntl.flock

    def finish_first(*arguments: Any) -> None:
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "out" / "work")  # as the run that has the folder does in the end
        held.close()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    run = start(tmp_path / "out")
    with pytest.raises(ConfigError, match="another process is working in this folder"):
        start(tmp_path / "out")
    run.close()


def test_a_dead_process_holds_no_lock(tmp_path: Path) -> None:
    code = (
        "import os\nfrom pathlib import Path\nfrom tests.core.test_rundir import start\n"
        f"run = start(Path({str(tmp_path / 'out')!r}))\nos.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == -9
    run = start(tmp_path / "out")
    assert not run.complete
    run.close()


def test_places_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file; --output-dir needs a folder"):
        start(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be written"):
        start(tmp_path / "file" / "below")
    with pytest.raises(ConfigError, match="cannot be written"):
        start(tmp_path / ("x" * 300))
    assert (tmp_path / "file").read_text() == "mine"


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    start(Path("~/out")).close()
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_phases_add_up_over_resumes(tmp_path: Path) -> None:
    run = start(tmp_path / "out")
    with run.phase("train") as phase:
        phase.tokens += 10
    with pytest.raises(KeyboardInterrupt), run.phase("score") as phase:
        phase.tokens += 3
        raise KeyboardInterrupt
    first = run.manifest.phases["score"].seconds
    run.close()
    run = start(tmp_path / "out")
    with run.phase("score") as phase:
        phase.tokens += 4
        phase.extra["note"] = 1
    with run.phase("train") as phase:
        phase.tokens = 10  # of the whole training, which had ended before, unlike the run
    run.finish(outputs=[])
    phases = read_manifest(tmp_path / "out").phases
    assert {name: phase.tokens for name, phase in phases.items()} == {"train": 10, "score": 7}
    assert phases["score"].seconds > first > 0
    assert phases["score"].extra == {"note": 1}


def work_until_killed(root: Path) -> None:
    """In a process of its own: a phase that does not end."""
    rundir.KEPT_EVERY = 0.05
    with start(root).phase("train") as phase:
        phase.tokens, phase.extra["note"] = 10, 1
        time.sleep(60)


def test_a_phase_of_a_killed_run_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "out" / "work" / "phases" / "train.json"
    process = get_context("spawn").Process(target=work_until_killed, args=(tmp_path / "out",))
    process.start()
    deadline = time.monotonic() + 120
    while not file.is_file() or read_json(file)["seconds"] < 0.2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    run = start(tmp_path / "out")
    with run.phase("train") as phase:
        phase.tokens += 5
    assert phase.seconds > 0.2 and phase.tokens == 15 and phase.extra == {"note": 1}


def test_a_run_without_results_can_be_forgotten(tmp_path: Path) -> None:
    run = start(tmp_path / "out")
    run.work("data", "rows").write_text("x")
    run.discard()
    assert not any(tmp_path.iterdir())
    run = start(tmp_path / "out", top=0.5)  # other options
    run.path("scores.parquet").write_text("x")
    run.discard()
    assert run.path("scores.parquet").exists()
    run.close()
    assert read_manifest(tmp_path / "out").status == "started"


def test_other_processes_of_a_launcher_leave_the_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    run = start(tmp_path / "out")
    with run.phase("read"):
        pass
    run.finish(outputs=[])
    run.close()
    assert not (tmp_path / "out" / "manifest.json").exists()


def finish_with_folder(root: Path) -> None:
    run = start(root)
    for name in ("result", "adapter/weights", "adapter/config.json"):
        run.path(name).parent.mkdir(exist_ok=True)
        run.path(name).write_text(name)
    run.finish(outputs=["result", "adapter"])


@pytest.mark.parametrize("lost", ["result", "adapter", "adapter/weights"])
def test_a_lost_output_is_made_again(lost: str, tmp_path: Path) -> None:
    finish_with_folder(tmp_path / "out")
    (tmp_path / "out" / lost).rename(tmp_path / "gone")
    assert missing_output(tmp_path / "out", read_manifest(tmp_path / "out")) == lost
    assert not finished(tmp_path / "out")
    run = start(tmp_path / "out")
    assert not run.complete and read_manifest(tmp_path / "out").status == "started"
    run.close()


def test_outputs_of_runs_within_a_run_are_looked_for_too(tmp_path: Path) -> None:
    run = start(tmp_path / "out", stage="sweep")
    finish_with_folder(tmp_path / "out" / "attack" / "first")
    run.finish(outputs=["attack"])
    assert list(read_manifest(tmp_path / "out").files) == ["attack/first/manifest.json"]
    assert start(tmp_path / "out", stage="sweep").complete
    (tmp_path / "out" / "attack" / "first" / "adapter" / "weights").unlink()
    run = start(tmp_path / "out", stage="sweep")
    assert not run.complete
    run.close()


def test_overwriting_deletes_no_run_beside_its_own(tmp_path: Path) -> None:
    run = start(tmp_path / "out", stage="sweep")
    run.claim("attack")
    with rundir.made_from({}):
        finish(tmp_path / "out" / "attack" / "first")
    run.close()
    finish(tmp_path / "out" / "notes" / "mine")
    before = sha256_folder(tmp_path / "out")
    with pytest.raises(ConfigError, match="--overwrite would delete another run too, .*notes/mine; move that"):
        start(tmp_path / "out", overwrite=True)
    assert sha256_folder(tmp_path / "out") == before
    shutil.move(tmp_path / "out" / "notes" / "mine", tmp_path / "mine")
    start(tmp_path / "out", overwrite=True).close()
    assert not (tmp_path / "out" / "attack").exists() and finished(tmp_path / "mine")


def test_no_run_begins_where_the_one_around_it_deletes_it(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "my web app"}')
    outer = start(tmp_path / "out", stage="sweep")
    outer.claim("attack")
    with rundir.made_from({}):  # a part of it
        finish(tmp_path / "out" / "attack" / "first")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for place in ("out/work/mine", "out/attack/mine", "out/attack/first/mine", "out/earlier/mine", "link/attack/mine"):
        with pytest.raises(
            ConfigError, match="is deleted or replaced with the run in .*; choose another --output-dir"
        ):
            start(tmp_path / place)
        assert not (tmp_path / place).exists()
    with pytest.raises(ConfigError, match="is deleted or replaced"):
        start(tmp_path / "out/attack/first", top=0.5, overwrite=True)
    assert start(tmp_path / "out/attack/first").complete
    finish(tmp_path / "out" / "mine")
    outer.close()


def test_what_another_run_is_writing_is_not_cleared_away(tmp_path: Path) -> None:
    start(tmp_path / "out").close()
    inner = start(tmp_path / "out" / "mine")
    mine, left = (tmp_path / "out" / name for name in ("mine/.metrics.json.7.tmp", "adapter/.weights.7.tmp"))
    for path in (mine, left):
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    start(tmp_path / "out").close()
    assert mine.is_file() and not left.exists()
    inner.close()
    start(tmp_path / "out" / "mine").close()
    assert not mine.exists()


def test_a_changed_output_is_told(tmp_path: Path) -> None:
    finish_with_folder(tmp_path / "out")
    for name in ("result", "adapter"):
        check_unchanged(tmp_path / "out", name)
    (tmp_path / "out" / "adapter" / "weights").write_text("others")
    check_unchanged(tmp_path / "out", "result")
    with pytest.raises(DataError, match="adapter/weights: is damaged, or was changed"):
        check_unchanged(tmp_path / "out", "adapter")
    check_unchanged(tmp_path, "out")  # no run's folder


def test_partial_state_behind_a_link_is_refused_and_kept(tmp_path: Path) -> None:
    run = start(tmp_path / "out")
    run.work("data", "rows").write_text("x")
    run.close()
    (tmp_path / "mine").mkdir()
    for link in ("work/data/link", "work/lock"):
        path = tmp_path / "out" / link
        path.unlink(missing_ok=True)
        path.symlink_to(tmp_path / "mine")
        with pytest.raises(ConfigError, match=f"{link}: is a link, but partial results must lie"):
            start(tmp_path / "out")
        path.unlink()
    (tmp_path / "out" / "work").rename(tmp_path / "elsewhere")
    (tmp_path / "out" / "work").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="out/work: is a link"):
        start(tmp_path / "out")
    start(tmp_path / "out", overwrite=True).close()
    assert (tmp_path / "elsewhere" / "data" / "rows").read_text() == "x"
    assert not (tmp_path / "out" / "work").is_symlink()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"seconds": "long"}', b"[" * 100000, b"\xff"])
def test_a_damaged_phase_costs_its_figures_and_not_the_run(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(tmp_path / "out")
    with run.phase("train"), run.phase("score"):
        pass
    run.close()
    for name in ("train", "score"):
        run.work("phases", f"{name}.json").write_bytes(content)
    run = start(tmp_path / "out")
    with run.phase("train") as phase:
        phase.tokens = 5
    run.finish(outputs=[])
    phases = read_manifest(tmp_path / "out").phases
    assert phases["train"].tokens == 5 and phases["score"].extra == {"before_lost": True}
    assert "warning: " in (said := capsys.readouterr().err) and "phases/train.json: is damaged" in said


@pytest.mark.parametrize("damage", ["cut", "emptied", "spoiled"])
def test_damaged_partial_tensors_are_dropped(damage: str, tmp_path: Path) -> None:
    run = start(tmp_path / "out")
    for name in ("good", "bad/adapter_model"):
        save_file({"x": np.arange(20), "y": np.ones(3)}, run.work(f"{name}.safetensors"), metadata={"step": "3"})
    run.work("bad", "adapter_config.json").write_text("{}")
    run.close()
    path = run.work("bad", "adapter_model.safetensors")
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-1], "emptied": b"", "spoiled": content[:8] + b"x" + content[9:]}[damage])
    run = start(tmp_path / "out")
    assert not path.exists() and not run.work("bad", "adapter_config.json").exists()
    assert load_file(run.work("good.safetensors"))["x"][19] == 19
    run.close()


def test_a_folder_is_free_where_only_hollow_folders_are_left(tmp_path: Path) -> None:
    run = start(tmp_path / "out")
    inner = start(tmp_path / "out" / "attack" / "first")
    inner.discard()
    run.discard()
    assert not any(tmp_path.iterdir())


@dataclass(kw_only=True)
class Named(RunOptions):
    defense: dict = field(default_factory=lambda: {"name": "out"})
    files: list[str] = field(default_factory=list)
    kind: Literal["out", "in"] = "out"
    columns: str = "out"

    NOT_PATHS = RunOptions.NOT_PATHS | {"columns"}


def test_names_are_not_taken_for_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    check_outside(Path("out"), Named(output_dir="out"))
    check_outside(Path("nowhere"), Named(output_dir="nowhere", files=["nowhere"]))


@pytest.mark.parametrize(
    "place",
    "out out/a.jsonl ./out/../out/a.jsonl harmbench:out/a.jsonl out/data:train link out/away adapter nearby".split(),
)
def test_whatever_lies_in_the_output_folder_is_an_input(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "a.jsonl").touch()
    (tmp_path / "link").symlink_to("out/a.jsonl")
    (tmp_path / "b.jsonl").touch()
    (tmp_path / "out" / "away").symlink_to("../b.jsonl")
    for adapter, base in (
        ("adapter", os.path.abspath("out/data")),
        ("nearby", "../out/data"),
        ("circle", "../circle"),
    ):
        (tmp_path / adapter).mkdir()
        (tmp_path / adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(ConfigError, match="^--files .* lies in the output folder out, which"):
        check_outside(Path("out"), Named(output_dir="out", files=["b.jsonl", place]))
    if place != "out":  # which is more often a name
        with pytest.raises(ConfigError, match="^--defense.model .* lies in the output folder out, which"):
            check_outside(Path("out"), Named(output_dir="out", defense={"name": "x", "model": place}))
    (tmp_path / "elsewhere").mkdir()
    check_outside(Path("elsewhere"), Named(output_dir="elsewhere", files=["b.jsonl", place, "circle"]))
