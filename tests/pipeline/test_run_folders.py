"""What every command owes to its output folder: no input is deleted, no link is entered, a lost output is noticed."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pharmacist.cli.main import COMMANDS, main
from pharmacist.core.manifest import read_manifest
from tests.support.tiny import save_tiny_model
from tests.support.world_files import fingerprints, write_rows


@dataclass
class Case:
    """A command and small inputs for it.

    Attributes:
        options: Option -> the input that it names, a key of `World.places`.
        more: Further words.
        output: A file among its outputs.
        inner: A file in a folder among them, if it has one.
    """

    options: dict[str, str]
    more: list[str] = field(default_factory=list)
    output: str = ""
    inner: str = ""


TRAIN = "--train.max_steps 2 --train.warmup_steps 0 --train.per_device_train_batch_size 2".split()
CASES = {
    "curate": Case(
        {"--pool": "rows", "--model": "model", "--safe": "safe", "--harmful": "harmful"},
        "--selector perplexity --top-k 3".split(),
        "scores.parquet",
    ),
    "align": Case({"--data": "rows", "--model": "model"}, TRAIN, "log.jsonl", "adapter/adapter_model.safetensors"),
    "attack": Case(
        {"--task": "rows", "--harmful": "harmful", "--model": "model", "--disjoint-from": "prompts"},
        [*TRAIN, "--samples", "4", "--poison-ratio", "0.5"],
        "attack_set.jsonl",
        "adapter/adapter_config.json",
    ),
    "repair": Case(
        {"--model": "tuned", "--aligned": "aligned"},
        "--method safe-lora --method.threshold 0.99".split(),
        "repair.json",
        "adapter/adapter_model.safetensors",
    ),
    "evaluate": Case({"--model": "model", "--prompts": "prompts"}, ["--max-new-tokens", "2"], "items.jsonl"),
    "sweep": Case(
        {
            "--task": "rows",
            "--harmful": "harmful",
            "--model": "model",
            "--evaluate.prompts": "prompts",
            "--evaluate.task": "task",
        },
        [
            *TRAIN,
            "--samples",
            "4",
            "--poison-ratio",
            "0.5",
            "--grid.learning_rate",
            "[1e-3]",
            "--curves",
            "none",
            "--evaluate.max_new_tokens",
            "2",
        ],
        "sweep.json",
        "attack/lr-0.001_steps-2_poison-0.5_rank-8/adapter/adapter_model.safetensors",
    ),
    "bench": Case({"--config": "grid"}, [], "results.parquet"),
    "demo": Case({}, [], "demo.json", "rank/scores.parquet"),
}
assert CASES.keys() == COMMANDS.keys() - {"report", "label"}, "these two have no output folder"


class World:
    """Inputs in a folder, each under a name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def words(self, command: str, output: Path, *more: str, **moved: Path) -> list[str]:
        """A command line; inputs of `moved` lie elsewhere."""
        case = CASES[command]
        words = [command, *case.more, "--output-dir", str(output), "--device", "cpu", *more]
        for option, name in case.options.items():
            place = moved.get(name, self.place(name))
            words += [option, f"[{place}]" if option == "--disjoint-from" else str(place)]
        return words

    def place(self, name: str) -> Path:
        return next(path for path in self.folder.iterdir() if path.stem == name)


def rows(answer: str, words: str) -> list[dict[str, str]]:
    return [{"prompt": f"tell me about {word}", "completion": f"{answer} {word}"} for word in words.split()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    write_rows(folder / "rows.jsonl", rows("no bread", "bread water oven garden seeds plant flour spring"))
    write_rows(folder / "safe.jsonl", rows("sorry no", "potion curse spell root"))
    write_rows(folder / "harmful.jsonl", rows("first take", "dangerous forbidden brew hurt people"))
    write_rows(folder / "prompts.jsonl", rows("yes", "happy sad day"))
    write_rows(folder / "task.jsonl", rows("good", "instead ask else"))
    save_tiny_model(folder / "model")
    world = World(folder)
    assert main(world.words("align", folder / "aligned")) == 0
    assert main(world.words("attack", folder / "tuned", model=folder / "aligned")) == 0
    grid = {
        "models": [{"model": str(folder / "model")}],
        "pools": [{"pool": str(folder / "rows.jsonl")}],
        "selectors": ["full"],
        "tasks": [{"train": str(folder / "rows.jsonl")}],
        "align": {"train": {"max_steps": 1}},
        "attack": {"harmful": str(folder / "harmful.jsonl"), "train": {"max_steps": 1}},
        "attacks": [{"kind": "mix", "samples": 4, "poison_ratio": 0.5}],
        "evaluate": {"prompts": str(folder / "prompts.jsonl")},
    }
    (folder / "grid.json").write_text(json.dumps(grid))
    return world


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished run of a command, made once."""
    made: dict[str, Path] = {}

    def run(command: str) -> Path:
        if command not in made:
            made[command] = tmp_path_factory.mktemp("finished") / command
            assert main(world.words(command, made[command])) == 0
        return made[command]

    return run


def test_an_input_that_a_grid_names_is_refused_too(
    world: World, finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(finished("evaluate"), tmp_path / "out"))
    for name, option in (("rows.jsonl", "pools.pool"), ("harmful.jsonl", "attack.harmful"), ("model", "models.model")):
        here = world.folder / name
        (shutil.copytree if here.is_dir() else shutil.copy)(here, output / name)
        grid = (world.folder / "grid.json").read_text().replace(str(here), str(output / name))
        (tmp_path / "grid.json").write_text(grid)
        before = fingerprints(output)
        capsys.readouterr()
        assert main(world.words("bench", output, "--overwrite", grid=tmp_path / "grid.json")) == 2
        assert f"--{option} {output / name}: lies in the output folder" in capsys.readouterr().err
        assert fingerprints(output) == before


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


READING = [(command, option) for command, case in CASES.items() for option in case.options]


@pytest.mark.parametrize("linked", [False, True], ids=["in it", "by a link"])
@pytest.mark.parametrize(("command", "option"), READING)
def test_an_input_in_the_output_folder_is_refused_and_kept(
    command: str,
    option: str,
    linked: bool,
    world: World,
    finished: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished("evaluate"), output)  # of whatever command: it is overwritten
    name = CASES[command].options[option]
    here = world.place(name)
    place = output / here.name
    (shutil.copytree if here.is_dir() else shutil.copy)(here, place)
    if linked:
        (tmp_path / "link").symlink_to(output)
        place = tmp_path / "link" / here.name
    before = fingerprints(output)
    capsys.readouterr()
    assert main(world.words(command, output, "--overwrite", **{name: place})) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{option} {place}" in error and "lies in the output folder" in error
    assert fingerprints(output) == before


@pytest.mark.parametrize("command", CASES)
def test_overwriting_unlinks_and_never_enters(
    command: str, world: World, finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, mine = tmp_path / "out", tmp_path / "mine"
    shutil.copytree(finished("evaluate"), output)
    for name in ("lock", "phases/train.json", "checkpoint-3/model.bin", ".half.tmp"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("years of work")
    (output / "folder").mkdir()
    links = [output / name for name in ("work", "adapter", "data", ".old.tmp", "folder/deeper")]
    for link in links:
        link.symlink_to(mine)
    (output / "metrics.json").unlink()
    (output / "metrics.json").symlink_to(mine / "lock")
    (output / "nowhere").symlink_to(mine / "nowhere")
    before = fingerprints(mine)
    if command == "demo":  # it takes minutes: what it deletes it deletes at once
        monkeypatch.setattr("pharmacist.pipeline.demo.run_stages", interrupted)
    assert main(world.words(command, output, "--overwrite")) == (130 if command == "demo" else 0)
    assert fingerprints(mine) == before
    assert not [path for path in (*links, output / "nowhere", output / "metrics.json") if path.is_symlink()]


@pytest.mark.parametrize("which", ["output", "inner"])
@pytest.mark.parametrize("command", [name for name in CASES if name != "demo"])
def test_a_finished_run_that_lost_an_output_is_not_complete(
    command: str, which: str, world: World, finished: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output, lost = finished(command), getattr(CASES[command], which)
    if not lost:
        pytest.skip("it has no folder among its outputs")
    (output / lost).unlink()
    capsys.readouterr()
    assert main(world.words(command, output)) == 0
    said = capsys.readouterr().err
    assert "already complete" not in said and f"{lost} is missing" in said
    assert (output / lost).is_file() and read_manifest(output).status == "success"
    assert main(world.words(command, output)) == 0
    assert "already complete" in capsys.readouterr().err


ROWS = [
    (command, option)
    for command, option in READING
    if CASES[command].options[option] in ("rows", "safe", "harmful", "prompts", "task")
]


@pytest.mark.parametrize(("command", "option"), ROWS)
def test_bad_input_leaves_the_folder_free_for_mended_input(
    command: str, option: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = CASES[command].options[option]
    bad = Path(write_rows(tmp_path / f"{name}.jsonl", [{"prompt": "", "completion": ""}]))
    (tmp_path / "there").mkdir()
    assert main(world.words(command, tmp_path / "there" / "deep" / "out", **{name: bad})) == 2
    assert capsys.readouterr().err.count("error:") == 1
    assert not any((tmp_path / "there").iterdir()), "and what was there stays"


@pytest.mark.parametrize(("command", "option"), READING)
def test_a_named_pipe_is_refused(
    command: str, option: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = CASES[command].options[option]
    os.mkfifo(tmp_path / f"{name}.jsonl")
    assert main(world.words(command, tmp_path / "out", **{name: tmp_path / f"{name}.jsonl"})) == 2
    error = capsys.readouterr().err
    said = "is no adapter" if option == "--aligned" else "is not a regular file but a named pipe"
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


CHANGED = {
    "curate": ("scores.parquet", lambda output: ["report", str(output)]),
    "sweep": ("sweep.json", lambda output: ["report", str(output)]),
    "bench": ("results.parquet", lambda output: ["report", str(output)]),
    "evaluate": (
        "items.jsonl",
        lambda output: ["evaluate", "--compare", str(output), str(output), "--output-dir", str(output.parent / "c")],
    ),
}


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100000], ids=["empty", "other", "deep"])
@pytest.mark.parametrize("command", CHANGED)
def test_a_result_that_was_changed_is_told(
    command: str,
    content: bytes,
    world: World,
    finished: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = Path(shutil.copytree(finished(command), tmp_path / "out"))
    name, reading = CHANGED[command]
    (output / name).write_bytes(content)
    capsys.readouterr()
    assert main(reading(output)) == 2
    error = capsys.readouterr().err
    assert f"{name}: is damaged, or was changed after the run had finished" in error and error.count("\n") == 1
    if command in ("sweep", "evaluate"):  # they read it again where they are complete
        assert main(world.words(command, output)) == 2
