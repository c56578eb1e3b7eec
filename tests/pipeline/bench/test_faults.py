"""Drivers, workers and all of Ray are killed at any moment; the next run finds what an undisturbed one finds."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pandas as pd
import psutil
import pytest

from pharmacist.cli.main import main
from pharmacist.core.config import from_mapping
from pharmacist.core.errors import CompatibilityError
from pharmacist.core.manifest import read_manifest
from pharmacist.pipeline.bench.command import StagesFailed, bench
from pharmacist.pipeline.bench.options import BenchOptions
from tests.support.bench_driver import run_with_fakes
from tests.support.bench_fakes import BROKEN, LOG, SECONDS, Stages
from tests.support.grids import FEW_STEPS, SMALL, results, write_grid
from tests.support.kills import start


ROOT = Path(__file__).parents[3]


def words(grid: Path, output: Path, *more: str) -> list[str]:
    return ["bench", "--config", str(grid), "--output-dir", str(output), *more]


@contextmanager
def driver(command: list[str]) -> Iterator[psutil.Process]:
    """A driver in a process of its own, which leaves nothing behind."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/src{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.support.bench_driver", *command]
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = psutil.Process(started.pid)
    try:
        yield process
    finally:
        kill(family(process))
        started.communicate()


def family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass


def workers(process: psutil.Process) -> list[psutil.Process]:
    """Processes of Ray that are in the middle of a stage."""
    found = []
    for child in family(process):
        try:
            title = " ".join(child.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if title.startswith("ray::") and "IDLE" not in title:
            found.append(child)
    return found


def began(log: Path) -> int:
    return log.read_text().count("began") if log.is_file() else 0


def wait_for_stages(log: Path, count: int, process: psutil.Process) -> bool:
    """Until so many stages have begun in all; False where the driver ended before."""
    while began(log) < count:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def forked(forks: ForkServerContext, command: list[str], seconds: float, log: Path) -> Iterator[psutil.Process]:
    """A driver with all imports behind it, so that a kill falls into the work; it is killed when the block ends."""
    process = forks.Process(target=run_with_fakes, args=(command, {SECONDS: str(seconds), LOG: str(log)}))
    process.start()
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.join()


def undisturbed(grid: Path, output: Path) -> pd.DataFrame:
    assert main(words(grid, output)) == 0
    return results(output)


def check(grid: Path, output: Path, expected: pd.DataFrame) -> None:
    assert main(words(grid, output)) == 0
    pd.testing.assert_frame_equal(results(output), expected)
    assert read_manifest(output).status == "success"
    assert not list(output.rglob("*.tmp"))


def test_a_driver_killed_three_times(stages: Stages, forks: ForkServerContext, tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "grid.yaml")
    expected = undisturbed(grid, tmp_path / "whole")
    stages.began()
    for count in (1, 6, 12):
        with forked(forks, words(grid, tmp_path / "cut"), 0.05, stages.path) as process:
            assert wait_for_stages(stages.path, count, process)
            time.sleep(0.1)
    check(grid, tmp_path / "cut", expected)
    # Every stage once, and those again that a kill fell into.
    assert 24 <= stages.began().total() <= 27


def test_two_drivers_in_one_folder(
    stages: Stages, forks: ForkServerContext, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(tmp_path / "grid.yaml")
    with forked(forks, words(grid, tmp_path / "out"), 1, stages.path) as process:
        assert wait_for_stages(stages.path, 1, process)
        assert main(words(grid, tmp_path / "out")) == 2
    assert "another process is working in this folder" in capsys.readouterr().err


@pytest.mark.slow
def test_drivers_killed_at_twenty_moments(stages: Stages, forks: ForkServerContext, tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "grid.yaml")
    expected = undisturbed(grid, tmp_path / "whole")
    stages.began()
    rng, killed, rounds = random.Random(0), 0, 0
    while killed < 20:  # a run that ends before it is killed is checked, and another one begins
        output = tmp_path / f"cut{rounds}"
        for _ in range(20 - killed):
            with forked(forks, words(grid, output), 0.05, stages.path) as process:
                if not wait_for_stages(stages.path, began(stages.path) + rng.randint(1, 4), process):
                    break
                time.sleep(rng.uniform(0, 0.25))
                killed += 1
        check(grid, output, expected)
        rounds += 1
    assert killed == 20


@pytest.mark.slow
def test_ray_finds_what_one_process_finds(stages: Stages, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    grid = write_grid(tmp_path / "grid.yaml")
    expected = undisturbed(grid, tmp_path / "whole")
    stages.began()
    assert main(words(grid, tmp_path / "ray", "--executor", "ray")) == 0
    pd.testing.assert_frame_equal(results(tmp_path / "ray"), expected)
    assert stages.began().total() == 24
    assert main(words(grid, tmp_path / "ray", "--executor", "ray")) == 0
    assert stages.began().total() == 0


@pytest.mark.slow
def test_what_fails_on_ray(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv(BROKEN, "'rho': 2.0")
    options = {"output_dir": str(tmp_path / "out"), "executor": "ray"}
    with pytest.raises(StagesFailed, match="2 of 24 stages failed, 8 could not run without them") as caught:
        bench(from_mapping(BenchOptions, SMALL | options, where="grid"))
    error = caught.value.exceptions[0]
    assert str(error) == "ValueError: this stage is broken"
    assert "fakes.py" in error.__notes__[0]
    monkeypatch.delenv(BROKEN)
    bench(from_mapping(BenchOptions, SMALL | options, where="grid"))
    assert len(results(tmp_path / "out")) == 4
    with pytest.raises(CompatibilityError, match="--executor.gpus 99: this machine has"):
        greedy = options | {"executor": {"name": "ray", "gpus": 99}, "seeds": [1]}
        bench(from_mapping(BenchOptions, SMALL | greedy, where="grid"))


@pytest.mark.slow
def test_workers_of_ray_and_all_of_ray_killed_at_twenty_moments(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    grid = write_grid(tmp_path / "grid.yaml")
    expected = undisturbed(grid, tmp_path / "whole")
    stages.began()
    rng = random.Random(1)
    killed = {"worker": 0, "ray": 0}
    for number in range(12):  # where the machine is slow, fewer workers are busy when it is their turn
        if killed["worker"] >= 10 and sum(killed.values()) >= 20:
            break
        output = tmp_path / f"cut{number}"
        monkeypatch.setenv(SECONDS, "0.2")
        while True:
            with driver(words(grid, output, "--executor", "ray", "--executor.max_retries", "20")) as process:
                alive = wait_for_stages(stages.path, began(stages.path) + 1, process)
                for _ in range(4):
                    time.sleep(rng.uniform(0.2, 1.0))
                    if busy := workers(process):
                        kill([rng.choice(busy)])
                        killed["worker"] += 1
                time.sleep(rng.uniform(0.2, 1.0))
                if alive and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    kill(family(process))
                    killed["ray"] += 1
            if not alive or killed["ray"] >= 2 * (number + 1):
                break
        monkeypatch.setenv(SECONDS, "0")
        check(grid, output, expected)
    assert killed["worker"] >= 10 and killed["ray"] >= 4 and sum(killed.values()) >= 20, killed


@pytest.mark.slow
def test_real_stages_killed_at_ten_moments(forks: ForkServerContext, tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "grid.yaml", selectors=["random"], **FEW_STEPS, checkpoint_seconds=0)
    expected = undisturbed(grid, tmp_path / "whole")
    rng, killed, rounds = random.Random(2), 0, 0
    while killed < 10:
        output = tmp_path / f"cut{rounds}"
        for _ in range(10 - killed):
            process = start(forks, words(grid, output))
            process.join(rng.uniform(1, 5))
            if not process.is_alive():
                break
            process.kill()
            process.join()
            killed += 1
        check(grid, output, expected)
        rounds += 1
    assert killed == 10
