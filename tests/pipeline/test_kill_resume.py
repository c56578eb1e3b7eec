"""A ranking that is killed at any moment, or shared out among processes, finds what an undisturbed one finds."""

import os
import random
import signal
import subprocess
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pharmacist.cli.main import main
from pharmacist.core.manifest import read_manifest
from tests.support.kills import kill_until_done, results, start, undisturbed
from tests.support.world_files import CHEAP, FEW_STEPS, TWO_PROCESSES, curate_words, write_world


EVERYTHING = [*FEW_STEPS, "--selector.readers", "lexical,probe", "--selector.form", "both"]
GRADIENT = [*CHEAP, "--selector.form", "bilevel", "--selector.solver", "gradient", "--selector.cotrain", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_world(tmp_path_factory.mktemp("files"))


def test_a_run_killed_twice(forks: ForkServerContext, world: dict[str, str], tmp_path: Path) -> None:
    words = [*EVERYTHING, "--checkpoint-seconds", "0", "--quiet"]
    expected, seconds, _ = undisturbed(forks, curate_words(world, tmp_path / "whole", *words), tmp_path / "whole")
    assert {"scores.parquet", "selected.jsonl", "selector/twins/twin_safe/adapter_model.safetensors"} <= set(expected)
    killed = rounds = 0
    while killed < 2 and rounds < 20:  # a run that ends before it is killed is checked too
        moments = iter([0.5 * seconds, 0.4 * seconds][killed:])
        output = tmp_path / f"cut{rounds}"
        killed += kill_until_done(forks, curate_words(world, output, *words), output, moments, expected)
        rounds += 1
    assert killed == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [EVERYTHING, GRADIENT], ids=["everything", "gradient"])
def test_a_run_killed_ten_times(
    options: list[str], forks: ForkServerContext, world: dict[str, str], tmp_path: Path
) -> None:
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
) -> None:
    words = [*EVERYTHING, "--checkpoint-seconds", "0", "--quiet"]
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
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for _ in range(2):  # the second time it is complete, on both
        words = [*TWO_PROCESSES, *curate_words(world, tmp_path / "two", *options, "--quiet")]
        done = subprocess.run(words, env=environment, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
    one, two = (pd.read_parquet(tmp_path / name / "scores.parquet") for name in ("one", "two"))
    assert one["score"].corr(two["score"], method="spearman") >= 0.99
    assert np.abs(one["score"] - two["score"]).max() < 1e-9
    assert results(tmp_path / "one") == results(tmp_path / "two")
    counts = [read_manifest(tmp_path / name).counts for name in ("one", "two")]
    assert counts[0] == counts[1]
