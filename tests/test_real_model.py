"""The tables of a grid on a real language model: no mean is over pools, and no option is ignored."""

from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from tests.support.scripts import ROOT, load_script


RESULTS = ROOT / "benchmarks/results/smollm2.parquet"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("benchmarks/real_model.py", monkeypatch)


def test_means_and_runs_are_of_one_pool_and_task(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = pd.read_parquet(RESULTS)
    some = results[(results["selector"] == "full") & (results["defense"] == "sft") & (results["judge"] == "probe")]
    some.to_parquet(tmp_path / "results.parquet")
    script.main([str(tmp_path / "results.parquet")])
    after_the_page = capsys.readouterr().out.partition("loss_margin_before")[2].splitlines()
    assert set(some["pool"]) == {"natural", "clean"} and set(some["task"]) == {"SST-2", "AG News"}
    for where, own in some.groupby(["pool", "task"]):
        lines = [line for line in after_the_page if [cell.strip() for cell in line.split("|")][1:3] == [*where]]
        assert f"{own['loss_margin_before'].mean():.3f}" in lines[0]
        assert len(lines) == 1 + len(own), "one line of means, and one of each run"


def test_any_arm_may_be_the_baseline(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.main([str(RESULTS), "--baseline", "random"])
    assert "minus random" in (said := capsys.readouterr().out) and "minus full" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([str(RESULTS), "--arms", "full"], "--arms needs --page"),
        ([str(RESULTS), "--run", "x", "--page", "y", "--arms", "fool"], "--arms 'fool': there are full, "),
        (["nowhere.parquet"], "nowhere.parquet: no such file"),
        ([str(RESULTS), "--baseline", "fool"], "--baseline 'fool': there are full, "),
    ],
)
def test_what_cannot_be_shown_is_said(
    script: ModuleType, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        script.main(words)
    assert message in capsys.readouterr().err
