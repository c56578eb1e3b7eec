"""A ranking that is killed at any moment, or shared out among processes, finds what an undisturbed one finds."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pharmacist.cli.main import main
from pharmacist.core import files as core_files
from pharmacist.core.manifest import read_manifest
from tests.cli.world import CHEAP, FEW_STEPS, curate_words, fingerprints, write_world


TRAINING = [*CHEAP, "--selector.cotrain", "0.25"]
EVERYTHING = [*FEW_STEPS, "--selector.readers", "lexical,probe,adapters"]
GRADIENT = [*CHEAP, "--selector.form", "bilevel", "--selector.solver", "gradient", "--selector.cotrain", "1"]


def run(words: list[str], last_file: int, half_written: bool, count: Path | None) -> None:
    """In a process of its own: one command, killed when it is about to rename, or has just renamed, its n-th file."""
    real, made = core_files.commit_file, 0

    def commit(temporary: Path, path: Path) -> None:
        nonlocal made
        made += 1
        if made == last_file and half_written:
            os.kill(os.getpid(), signal.SIGKILL)
        real(temporary, path)
        if made == last_file:
            os.kill(os.getpid(), signal.SIGKILL)

    core_files.commit_file = commit
    code = main(words)
    if count is not None:
        count.write_text(str(made))
    sys.exit(code)


@pytest.fixture(scope="module")
def forks() -> ForkServerContext:
    """Makes processes that have all imports behind them, so that a kill falls into the work."""
    context = multiprocessing.get_context("forkserver")
    preload = ["pipeline.curate", "selectors.pharmacist", "report", "data.tokenize"]
    context.set_forkserver_preload([f"pharmacist.{name}" for name in preload])
    first = context.Process(target=main, args=(["--version"],))
    first.start()  # waits for the imports
    first.join()
    return context


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_world(tmp_path_factory.mktemp("files"))


def start(
    forks: ForkServerContext, words: list[str], last_file: int = 0, half_written: bool = False,
    count: Path | None = None,
) -> BaseProcess:  # fmt: skip
    process = forks.Process(target=run, args=(words, last_file, half_written, count))
    process.start()
    return process


def undisturbed(
    forks: ForkServerContext, words: list[str], output: Path
) -> tuple[dict[str, str | None], float, int]:  # fmt: skip
    """What a run leaves, how long it takes, and how many files it makes."""
    begin, count = time.monotonic(), output.with_name("count")
    process = start(forks, words, count=count)
    process.join()
    assert process.exitcode == 0
    return results(output), time.monotonic() - begin, int(count.read_text())


def results(output: Path) -> dict[str, str | None]:
    """Fingerprints of everything but what holds times."""
    found = {os.path.relpath(path, output): content for path, content in fingerprints(output).items()}
    assert found.pop("manifest.json") and found.pop("report.html")
    return found


def kill_until_done(
    forks: ForkServerContext, words: list[str], output: Path, kills: Iterator[float], expected: dict[str, str | None]
) -> int:  # fmt: skip
    """Starts a run again and again, killed after the given seconds each time; returns how often it was killed."""
    killed = 0
    for seconds in kills:
        process = start(forks, words)
        process.join(seconds)
        if process.is_alive():
            process.kill()
            killed += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
        assert not (output / "manifest.json").exists() or read_manifest(output).status in ("started", "success")
    process = start(forks, words)
    process.join()
    assert process.exitcode == 0
    assert results(output) == expected
    return killed


def test_a_run_killed_twice(forks: ForkServerContext, world: dict[str, str], tmp_path: Path) -> None:
    words = [*TRAINING, "--checkpoint-seconds", "0", "--quiet"]
    expected, seconds, _ = undisturbed(forks, curate_words(world, tmp_path / "whole", *words), tmp_path / "whole")
    assert {"scores.parquet", "selected.jsonl", "selector/adapters/twin_safe/adapter_model.safetensors"} <= set(
        expected
    )
    moments = iter([0.6 * seconds, 0.5 * seconds])
    killed = kill_until_done(
        forks, curate_words(world, tmp_path / "cut", *words), tmp_path / "cut", moments, expected
    )  # fmt: skip
    assert killed == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [EVERYTHING, GRADIENT], ids=["everything", "gradient"])
def test_a_run_killed_ten_times(
    options: list[str], forks: ForkServerContext, world: dict[str, str], tmp_path: Path
) -> None:  # fmt: skip
    words = [*options, "--checkpoint-seconds", "0", "--quiet"]
    expected, seconds, _ = undisturbed(forks, curate_words(world, tmp_path / "whole", *words), tmp_path / "whole")
    rng = random.Random(0)
    killed = rounds = 0
    while killed < 10:  # a run that ends before it is killed ten times is checked, and another one begins
        output = tmp_path / f"cut{rounds}"
        moments = (rng.uniform(0.05, 1) * seconds for _ in range(10 - killed))
        killed += kill_until_done(forks, curate_words(world, output, *words), output, moments, expected)
        rounds += 1
    assert killed == 10


@pytest.mark.slow
@pytest.mark.parametrize("half_written", [True, False], ids=["before", "after"])
def test_a_run_killed_at_any_file(
    half_written: bool, forks: ForkServerContext, world: dict[str, str], tmp_path: Path
) -> None:  # fmt: skip
    words = [*TRAINING, "--checkpoint-seconds", "0", "--quiet"]
    expected, _, made = undisturbed(forks, curate_words(world, tmp_path / "whole", *words), tmp_path / "whole")
    assert made > 20
    # The first and the last of them, results and manifest among these, and some between.
    for last_file in sorted({1, 2, *range(made - 6, made + 1), *random.Random(0).sample(range(3, made - 6), 8)}):
        output = tmp_path / f"cut{last_file}"
        process = start(forks, curate_words(world, output, *words), last_file, half_written)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        process = start(forks, curate_words(world, output, *words))
        process.join()
        assert process.exitcode == 0
        assert results(output) == expected, f"killed at file {last_file} of {made}"


@pytest.mark.slow
@pytest.mark.parametrize("options", [EVERYTHING, GRADIENT], ids=["everything", "gradient"])
def test_two_processes_find_what_one_finds(options: list[str], world: dict[str, str], tmp_path: Path) -> None:
    assert main(curate_words(world, tmp_path / "one", *options, "--quiet")) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--main_process_port", "0", "-m", "pharmacist"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for _ in range(2):  # the second time it is complete, on both
        words = [*launch, *curate_words(world, tmp_path / "two", *options, "--quiet")]
        done = subprocess.run(words, env=environment, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
    one, two = (pd.read_parquet(tmp_path / name / "scores.parquet") for name in ("one", "two"))
    assert one["score"].corr(two["score"], method="spearman") >= 0.99
    assert np.abs(one["score"] - two["score"]).max() < 1e-9
    assert results(tmp_path / "one") == results(tmp_path / "two")
    counts = [read_manifest(tmp_path / name).counts for name in ("one", "two")]
    assert counts[0] == counts[1]
