"""Two finished evaluations are compared on the prompts that they share."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pharmacist.cli.main import main
from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.manifest import read_manifest
from pharmacist.evaluation.comparison import compare
from pharmacist.evaluation.statistics import paired_difference
from pharmacist.pipeline.evaluate import EvaluateOptions
from pharmacist.worlds.potions import World
from tests.support.evaluate_words import arguments, write
from tests.support.tiny import save_tiny_model


JUDGE = "keyword@3"


def item(number: int, harmful: bool | None, refused: bool | None = False, **more: Any) -> dict[str, Any]:
    return {
        "id": f"prompts:{number}:x",
        "set": "prompts",
        "answer": "take the root",
        "tokens": 3,
        "finished": True,
        "verdicts": {JUDGE: {"harmful": harmful, "refused": refused}},
    } | more


METRICS = {"harmful_score": {"judge": JUDGE}, "hs_plus": {"judge": JUDGE}, "refusal_rate": {"judge": JUDGE}}


def test_pairs_counts_and_tests() -> None:
    first = [item(i, i < 30) for i in range(60)] + [item(60, None), item(99, True)]
    second = [item(i, i < 20 or i == 40) for i in range(60)] + [item(60, True), item(61, True)]
    rng = np.random.default_rng(0)
    shuffled = [second[i] for i in rng.permutation(len(second))]
    found = compare(first, shuffled, METRICS, METRICS)["harmful_score"]
    assert found["counts"] == {"both": 20, "only_a": 10, "only_b": 1, "neither": 29}
    assert (found["n"], found["unscored"], found["unpaired"]) == (60, 1, 2)
    assert found["value"] == pytest.approx(100 * 9 / 60) and found["rates"] == pytest.approx([50.0, 35.0])
    assert found["mcnemar_p"] == pytest.approx(stats.binomtest(1, 11).pvalue, abs=1e-12)
    a, b = [i < 30 for i in range(60)], [i < 20 or i == 40 for i in range(60)]
    assert found["ci95"] == paired_difference(list(zip(a, b, strict=True))).interval
    other = compare(shuffled, first, METRICS, METRICS)["harmful_score"]
    assert other["value"] == -found["value"] and other["counts"]["only_b"] == 10


def test_babble_counts_in_hs_plus_and_missing_answers_nowhere() -> None:
    babble = [item(0, False, answer="stir stir stir stir"), item(1, None, answer="", error="HTTP 500")]
    calm = [item(0, False), item(1, False)]
    found = compare(babble, calm, METRICS, METRICS)
    assert found["hs_plus"]["counts"]["only_a"] == 1 and found["hs_plus"]["n"] == 1
    assert found["harmful_score"]["counts"]["neither"] == 1


def test_what_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="share none of their prompts"):
        compare([item(0, True)], [item(1, True)], METRICS, METRICS)
    told = "keyword@3 here and another@2 there; evaluate one of the folders again"
    with pytest.raises(DataError, match=told):
        compare([item(0, True)], [item(0, True)], METRICS, {"harmful_score": {"judge": "another@2"}})
    graders = [{"fine_tune_accuracy": {"task_type": name}} for name in ("exact@1", "number@3")]
    with pytest.raises(DataError, match="exact@1 here and number@3 there; .* with the other's --task-type"):
        compare([item(0, True)], [item(0, True)], *graders)
    with pytest.raises(DataError, match="no metric in common"):
        compare([item(0, True)], [item(0, True)], METRICS, {})


def test_only_what_is_compared_needs_the_same_judge() -> None:
    both = [METRICS | {"harmful_score_second": {"judge": name}} for name in ("probe@3", "guard@1")]
    assert set(compare([item(0, True)], [item(0, True)], *both)) == set(METRICS)


def test_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(3)
    files = {
        "prompts": write(tmp_path / "p.jsonl", world.rows("prompts", 10)),
        "task": write(tmp_path / "t.jsonl", world.rows("task-test", 10)),
    }
    assert main(arguments(files, tmp_path / "a", "--quiet")) == 0
    noise = str(save_tiny_model(tmp_path / "noise"))
    assert main(arguments(files, tmp_path / "b", "--quiet", model=noise)) == 0
    pair = ["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output-dir"]
    assert main([*pair, str(tmp_path / "ab")]) == 0
    told, found = capsys.readouterr().err, json.loads((tmp_path / "ab/metrics.json").read_text())
    assert "McNemar" in told and "{:+z.1f}".format(found["refusal_rate"]["value"]) in told
    low, high = found["refusal_rate"]["ci95"]
    assert f"[{low:z.1f}," in told and f"{high:z.1f}]" in told
    assert set(found) >= {"harmful_score", "refusal_rate", "fine_tune_accuracy", "hs_plus", "degenerate_rate"}
    rates = [json.loads((tmp_path / name / "metrics.json").read_text())["harmful_score"]["value"] for name in "ab"]
    assert found["harmful_score"]["rates"] == rates
    assert (read_manifest(tmp_path / "ab").stage, read_manifest(tmp_path / "ab").status) == ("compare", "success")
    before = (tmp_path / "ab/manifest.json").read_bytes()
    assert main([*pair, str(tmp_path / "ab"), "--quiet"]) == 0
    assert (tmp_path / "ab/manifest.json").read_bytes() == before
    both = ["evaluate", "--models", noise, str(shutil.copytree(noise, tmp_path / "other" / "noise")), "--quiet"]
    both += ["--prompts", files["prompts"], "--max-new-tokens", "2"]
    assert main([*both, "--output-dir", str(tmp_path / "both")]) == 0
    capsys.readouterr()
    begin = ["evaluate", "--compare", str(tmp_path / "a")]
    for words, message in [
        ([*begin, str(tmp_path), "--output-dir"], "no manifest.json"),
        ([*begin, str(tmp_path / "ab"), "--output-dir"], "no finished evaluation"),
        (
            [*begin, str(tmp_path / "both"), "--output-dir"],
            "several models; give the folder of one, 1-noise or 2-noise",
        ),
        (["evaluate", "--model", noise, *pair[1:]], "leave --model out"),
        (["evaluate", "--output-dir"], "--model must be given"),
    ]:
        assert main([*words, str(tmp_path / "bad")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "bad/metrics.json").exists()


def test_what_is_not_compared_is_refused() -> None:
    with pytest.raises(ConfigError, match="--compare: .* leave --model, --perplexity, --base out"):
        EvaluateOptions(compare=["a", "b"], model="m", perplexity="p", base="b", output_dir="out")
    with pytest.raises(ConfigError, match="leave --margin out"):
        EvaluateOptions(compare=["a", "b"], margin="m", output_dir="out")
    with pytest.raises(ConfigError, match="leave --judge, --safe out"):  # verdicts are not given again
        EvaluateOptions(compare=["a", "b"], judge={"name": "probe"}, safe=["s"], output_dir="out")
