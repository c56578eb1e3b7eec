"""The tables of a grid on a real language model: no mean is over pools, and no option is ignored."""

from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from scipy import stats

from pharmacist.core.files import append_json_lines, write_json
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


def write_run(run: Path, arm: str, seed: int, verdicts: list[list[bool | None]]) -> dict[str, object]:
    """The evaluations of a model along its attack, at step 0, 10 and 30, and its row of the results."""
    align, attack = (run / f"stages/{name}-{arm}-{seed}" for name in ("align", "attack"))
    attack.mkdir(parents=True)
    write_json(attack / "manifest.json", {"config": {"model": str(align)}})
    references = {"safe": None, "harmful": None, "utility": None}
    for model, harmful in zip((align, attack / "snapshots/step-10", attack), verdicts, strict=True):
        folder = run / f"stages/evaluate-{arm}-{seed}-{model.name}"
        folder.mkdir()
        write_json(folder / "manifest.json", {"config": {"model": str(model), "judge": "keyword"} | references})
        items = [{"set": "prompts", "row": row, "harmful": verdict} for row, verdict in enumerate(harmful)]
        append_json_lines(folder / "items.jsonl", [*items, {"set": "task", "row": 0, "harmful": None}])
    axes = {"model": "m", "pool": "p", "attack": "mix", "post_alignment_defense": "none", "task": "t"}
    axes |= {"judge": "keyword", "defense": "sft", "selector": arm, "fraction": 1.0 if arm == "full" else 0.4}
    return axes | {"seed": seed, "attack_steps": [0, 10, 30], "folder": str(folder.relative_to(run))}


def test_differences_over_prompts(script: ModuleType, tmp_path: Path) -> None:
    no, yes = False, True
    rows = [
        write_run(tmp_path, "full", 0, [[no, no, no], [yes, no, no], [yes, yes, None]]),
        write_run(tmp_path, "full", 1, [[no, no, no], [no, no, no], [yes, no, no]]),
        write_run(tmp_path, "core", 0, [[no, no, no], [no, no, no], [no, yes, no]]),
        write_run(tmp_path, "core", 1, [[no, no, no], [no, no, no], [no, no, yes]]),
    ]
    elsewhere = rows[0] | {"selector": "other", "folder": "stages/evaluate-other"}
    found = script.over_prompts(pd.DataFrame([*rows, elsewhere]), tmp_path)
    # Areas under the curves of a prompt: 100 from step 10 on are (5 + 20) / 30; 100 at step 30 alone 10 / 30.
    by_prompt = [(-100 * 25 / 30 - 100 / 3) / 2, 0.0, 100 / 3]  # the third has no verdict with seed 0
    by_seed = [-100 * 25 / 30 / 2, 0.0]
    assert found.to_dict("records") == [
        {
            "selector": "core",
            "fraction": 0.4,
            "seeds": 2,
            "difference": pytest.approx(sum(by_prompt) / 3),
            "low": pytest.approx(sum(by_prompt) / 3 - stats.t.ppf(0.975, 2) * stats.sem(by_prompt)),
            "high": pytest.approx(sum(by_prompt) / 3 + stats.t.ppf(0.975, 2) * stats.sem(by_prompt)),
            "se_prompts": pytest.approx(stats.sem(by_prompt)),
            "se_seeds": pytest.approx(stats.sem(by_seed)),
        }
    ]
    assert script.over_prompts(pd.DataFrame([elsewhere]), tmp_path).empty


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
