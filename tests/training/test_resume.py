"""A training that was interrupted ends with the weights of one that was not, bit for bit."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from pharmacist.core.errors import CompatibilityError, ConfigError, DataError
from pharmacist.training.checkpoint import newest_checkpoint
from pharmacist.training.loop import Snapshots
from pharmacist.training.strategy import StrategyState
from tests.support.training_toy import Noise, Stop, options, same, setting, sft, trained


LONG = {"dropout": 0.3, "max_steps": 8}


class Forgetful(Noise):
    """Saves its state and does not read it."""

    def load_state(self, state: StrategyState) -> None:
        pass


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "work/train/checkpoints").iterdir())


# 12 rows in batches of 2 are 6 micro-batches: after 5 the last one of the epoch is left, after 6 none.
@pytest.mark.parametrize(("stops", "accumulation"), [((3,), 1), ((5,), 1), ((6,), 1), ((1, 7), 1), ((5,), 2)])
def test_resumed_at_an_odd_step(model: Path, tmp_path: Path, stops: tuple[int, ...], accumulation: int) -> None:
    more = LONG | {"gradient_accumulation_steps": accumulation}
    whole, steady = setting(options(model, tmp_path / "whole", **more)), Noise()
    expected = trained(whole, steady)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            trained(setting(options(model, tmp_path / "cut", **more)), Noise(), Stop(stop))
        assert f"checkpoint-{stop}" in checkpoints(tmp_path / "cut")
    cut, resumed = setting(options(model, tmp_path / "cut", **more)), Noise()
    result = trained(cut, resumed)
    assert same(whole.weights(), cut.weights())
    assert resumed.draws == steady.draws == 8 * accumulation
    assert (result.steps, result.tokens) == (expected.steps, expected.tokens)
    timeless = [[{k: v for k, v in line.items() if "runtime" not in k} for line in r.log] for r in (result, expected)]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 8


def test_rows_grouped_by_length_come_in_the_same_order_after_a_resume(model: Path, tmp_path: Path) -> None:
    more = LONG | {"train_sampling_strategy": "group_by_length"}
    whole, cut = (setting(options(model, tmp_path / name, **more)) for name in ("whole", "cut"))
    trained(whole, Noise())
    with pytest.raises(KeyboardInterrupt):
        trained(setting(options(model, tmp_path / "cut", **more)), Noise(), Stop(7))  # in the second epoch
    trained(cut, Noise())
    assert same(whole.weights(), cut.weights())


def test_the_comparison_notices_a_state_that_is_not_restored(model: Path, tmp_path: Path) -> None:
    whole, cut = (setting(options(model, tmp_path / name, **LONG)) for name in ("whole", "cut"))
    trained(whole, Noise())
    with pytest.raises(KeyboardInterrupt):
        trained(setting(options(model, tmp_path / "cut", **LONG)), Noise(), Stop(3))
    trained(cut, Forgetful())
    assert not same(whole.weights(), cut.weights())


def test_an_incomplete_checkpoint_is_ignored_and_removed(model: Path, tmp_path: Path) -> None:
    whole, cut = (setting(options(model, tmp_path / name, **LONG)) for name in ("whole", "cut"))
    trained(whole, Noise())
    with pytest.raises(KeyboardInterrupt):
        trained(setting(options(model, tmp_path / "cut", **LONG)), Noise(), Stop(3))
    folder = tmp_path / "cut/work/train/checkpoints"
    assert checkpoints(tmp_path / "cut") == ["checkpoint-2", "checkpoint-3"]  # no more are kept
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-20")
    (folder / "checkpoint-20/strategy.json").unlink()
    (folder / "checkpoint-3/strategy.json").unlink()
    assert newest_checkpoint(folder) == folder / "checkpoint-2"
    assert checkpoints(tmp_path / "cut") == ["checkpoint-2"]
    trained(cut, Noise())
    assert same(whole.weights(), cut.weights())


WRITTEN = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "strategy.json",
    "strategy.safetensors",
)


@pytest.fixture(scope="module")
def cut(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that was stopped, with two checkpoints."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.raises(KeyboardInterrupt):
        trained(setting(options(model, folder, **LONG)), Noise(), Stop(3))
    return folder


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [halve, spoil, Path.unlink])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_damaged_checkpoint_is_left_for_the_one_before(
    name: str, damage: Callable[[Path], None], model: Path, cut: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(cut, tmp_path / "own")
    folder = own / "work/train/checkpoints"
    damage(folder / "checkpoint-3" / name)
    assert newest_checkpoint(folder) == folder / "checkpoint-2"
    assert checkpoints(own) == ["checkpoint-2"]


def test_the_training_goes_on_from_the_checkpoint_before(model: Path, cut: Path, tmp_path: Path) -> None:
    whole = setting(options(model, tmp_path / "whole", **LONG))
    trained(whole, Noise())
    own = shutil.copytree(cut, tmp_path / "own")
    halve(own / "work/train/checkpoints/checkpoint-3/trainer_state.json")
    resumed = setting(options(model, own, **LONG))
    trained(resumed, Noise())
    assert same(whole.weights(), resumed.weights())


def test_where_all_checkpoints_are_damaged_the_folder_to_delete_is_named(
    model: Path, cut: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(cut, tmp_path / "own")
    folder = own / "work/train/checkpoints"
    for step in (2, 3):
        halve(folder / f"checkpoint-{step}/optimizer.pt")
    with pytest.raises(DataError, match="no checkpoint in it is intact.*delete this folder") as caught:
        trained(setting(options(model, own, **LONG)), Noise())
    assert str(caught.value).startswith(f"{folder}:")
    assert checkpoints(own) == ["checkpoint-2", "checkpoint-3"]
    shutil.rmtree(folder)
    assert trained(setting(options(model, own, **LONG)), Noise()).steps == 8


def test_a_checkpoint_of_two_processes_is_refused_by_one(model: Path, cut: Path, tmp_path: Path) -> None:
    own = shutil.copytree(cut, tmp_path / "own")
    folder = own / "work/train/checkpoints/checkpoint-3"
    marks = json.loads((folder / "strategy.json").read_text())
    digest = marks["files"].pop("rng_state.pth")
    for number in range(2):  # as two processes leave it
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{number}.pth")
        marks["files"][f"rng_state_{number}.pth"] = digest
    (folder / "rng_state.pth").unlink()
    (folder / "strategy.json").write_text(json.dumps(marks))
    assert newest_checkpoint(folder.parent) == folder
    with pytest.raises(CompatibilityError, match=r"checkpoint-3: was written by .*\(2, now 1\).* start that many"):
        trained(setting(options(model, own, **LONG)), Noise())
    assert checkpoints(own) == ["checkpoint-2", "checkpoint-3"]


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_no_code_runs_from_a_checkpoint(name: str, model: Path, cut: Path, tmp_path: Path) -> None:
    own = shutil.copytree(cut, tmp_path / "own")
    folder = own / "work/train/checkpoints/checkpoint-3"
    assert (folder / name).is_file()
    torch.save({"state": Bomb(tmp_path / "boom")}, tmp_path / "bomb")
    shutil.copy(tmp_path / "bomb", folder / name)
    marks = json.loads((folder / "strategy.json").read_text())
    marks["files"][name] = xxhash.xxh3_64_hexdigest((folder / name).read_bytes())
    (folder / "strategy.json").write_text(json.dumps(marks))
    resumed = setting(options(model, own, **LONG))
    if name == "training_args.bin":  # written by the Trainer, and never read
        assert trained(resumed, Noise()).steps == 8
    else:
        with pytest.raises(DataError, match=r"checkpoint-3: cannot be resumed from .*; delete this folder"):
            trained(resumed, Noise())
    assert not (tmp_path / "boom").exists()
    torch.load(tmp_path / "bomb", weights_only=False)
    assert (tmp_path / "boom").is_dir(), "what it would have done"


def test_numbers_are_not_compared_as_text(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing") is None
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/strategy.json").write_text('{"files": {}}')
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_checkpoints_come_by_the_clock(model: Path, tmp_path: Path) -> None:
    given = options(model, tmp_path, max_steps=4)
    given.checkpoint_seconds = 3600.0
    with pytest.raises(KeyboardInterrupt):
        trained(setting(given), sft(), Stop(3))
    assert checkpoints(tmp_path) == []


def test_a_checkpoint_holds_the_adapter_alone(model: Path, tmp_path: Path) -> None:
    own = setting(options(model, tmp_path, **LONG))
    with pytest.raises(KeyboardInterrupt):
        trained(own, Noise(), Stop(3))
    folder = tmp_path / "work/train/checkpoints/checkpoint-3"
    assert len(load_file(folder / "adapter_model.safetensors")) == len(own.weights())
    assert not (folder / "model.safetensors").exists()


def test_snapshots_are_taken_at_their_steps_or_refused_before_the_first(model: Path, tmp_path: Path) -> None:
    own, taken = setting(options(model, tmp_path / "a")), []
    trained(own, sft(), Snapshots([3, 1, 4], taken.append))
    assert taken == [1, 3, 4]
    before = (other := setting(options(model, tmp_path / "b"))).weights()
    with pytest.raises(ConfigError, match="--snapshots 5: the training has only 4 steps"):
        trained(other, sft(), Snapshots([2, 5, 9], taken.append))
    assert taken == [1, 3, 4]
    assert same(before, other.weights())
