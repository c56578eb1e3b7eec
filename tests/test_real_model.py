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
    steps = {"attack_steps": [0, 10, 30], "folder": str(folder.relative_to(run))}
    return axes | {"cell": f"m / {arm}", "seed": seed} | steps


def test_differences_over_prompts(script: ModuleType, tmp_path: Path) -> None:
    no, yes = False, True
    given: list[list[list[bool | None]]] = [
        [[no, no, no], [yes, no, no], [yes, yes, None]],
        [[no, no, no], [no, no, no], [yes, no, no]],
        [[no, no, no], [no, no, no], [no, yes, no]],
        [[no, no, no], [no, no, no], [no, no, yes]],
    ]
    runs = [(arm, seed) for arm in ("full", "core") for seed in (0, 1)]
    rows = [write_run(tmp_path, *run, verdicts) for run, verdicts in zip(runs, given, strict=True)]
    elsewhere = rows[0] | {"cell": "elsewhere", "selector": "other", "folder": "stages/evaluate-other"}
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
    # The table that a grid writes gives the same, without the stages.
    (tmp_path / "alone").mkdir()
    repaired = {"cell": rows[0]["cell"], "seed": 0, "step": None, "prompts": [0, 1, 2], "harmful": [yes, yes, yes]}
    table = [
        {"cell": row["cell"], "seed": row["seed"], "step": step, "prompts": [0, 1, 2], "harmful": harmful}
        for row, verdicts in zip(rows, given, strict=True)
        for step, harmful in zip([0, 10, 30], verdicts, strict=True)
    ]
    pd.DataFrame([*table, repaired]).to_parquet(tmp_path / "alone" / "verdicts.parquet")
    pd.testing.assert_frame_equal(script.over_prompts(pd.DataFrame([*rows, elsewhere]), tmp_path / "alone"), found)


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
