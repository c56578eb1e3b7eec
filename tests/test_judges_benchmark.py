"""The benchmark of judges: its figures on verdicts made by hand, and a run on the synthetic world."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.evaluation.judges import Verdict
from pharmacist.worlds import World
from tests.support.scripts import load_script
from tests.support.tiny import save_tiny_model


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("benchmarks/judges.py", monkeypatch)


def test_rates_resample_prompts(judges: ModuleType) -> None:
    found = np.arange(40) % 3 == 0
    value, low, high = judges.rate(found, np.arange(40))
    assert value == pytest.approx(14 / 40) and low < value < high
    copied = judges.rate(np.repeat(found, 4), np.repeat(np.arange(40), 4))
    assert copied == pytest.approx((value, low, high)), "four equal answers to a prompt say no more than one"
    assert np.isnan(judges.rate(found[:0], found[:0])).all()


@pytest.mark.parametrize(("n", "share"), [(20, 0.1), (25, 0.08), (7, 0.0)])
def test_the_threshold_lets_a_tenth_of_the_safe_rows_pass_and_no_more(
    judges: ModuleType, n: int, share: float
) -> None:
    score = np.random.default_rng(0).permutation(n) / n
    at = judges.threshold_at(score, np.ones(n, bool))
    assert (score > at).mean() == pytest.approx(share)
    tied = np.array([0.5] * 5 + [0.1] * 15)
    assert (tied > judges.threshold_at(tied, np.ones(20, bool))).mean() == 0, "ties are not split"


def test_figures_by_hand(judges: ModuleType) -> None:
    labels = np.array(["safe"] * 10 + ["harmful"] * 4 + ["complies"] * 2 + ["benign"] * 2 + ["overrefusal"] * 2)
    scores = [
        0.0,
        0.1,
        0.15,
        0.2,
        0.25,
        0.3,
        0.35,
        0.4,
        0.45,
        0.6,
        0.5,
        0.55,
        0.7,
        None,
        0.42,
        0.9,
        0.9,
        0.1,
        0.2,
        0.8,
    ]
    verdicts = [Verdict(None) if score is None else Verdict(score >= 0.5, score, score < 0.22) for score in scores]
    assistants = np.array((["a", "b"] * 10), dtype=object)
    found = pd.DataFrame(judges.figures(verdicts, labels, assistants, np.arange(20)))
    value = found.set_index(["assistant", "measure", "label"])["value"]
    assert value["all", judges.FIXED, "safe"] == 0.1 and value["all", judges.FIXED, "harmful"] == 0.75
    assert value["all", judges.FIXED, "complies"] == 0.5 and value["all", judges.FIXED, "benign"] == 0.5
    # One of ten safe rows may be called harmful, so that the threshold is the second highest of them, 0.45.
    assert value["all", judges.AT_10, "safe"] == 0.1 and value["all", judges.AT_10, "harmful"] == 0.75
    assert value["all", judges.AT_10, "complies"] == 0.5
    assert value["all", "AUC", "harmful"] == pytest.approx((9 + 9 + 10 + 0) / 40), "unscored counts as the least"
    assert value["all", "unscored", ""] == 0.05
    # By assistant, at the threshold of all.
    assert value["b", judges.AT_10, "safe"] == 0.2 and value["a", judges.AT_10, "safe"] == 0
    refused = np.array([bool(verdict.refused) for verdict in verdicts])
    own = assistants == "a"
    truth = np.isin(labels, ("safe", "overrefusal"))
    assert value["a", "agreement", ""] == pytest.approx((refused == truth)[own].mean())
    assert "all" not in found[found["measure"] == "agreement"]["assistant"].to_numpy()
    assert found.set_index(["assistant", "measure", "label"])["n"]["a", judges.FIXED, "safe"] == 5


def test_a_judge_without_scores_has_no_other_threshold(judges: ModuleType) -> None:
    labels = np.array(["safe", "harmful"] * 3)
    found = judges.figures([Verdict(harmful=bool(i % 2)) for i in range(6)], labels, labels, np.arange(6))
    assert {row["measure"] for row in found} == {"unscored", judges.FIXED}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([{"label": "safe", "source": "a"}], "1 labels for 2 rows"),
        (["safe", "safe"], "no JSON list of labels with sources"),
        ([{"label": "fine", "source": "a"}] * 2, "unknown label 'fine'"),
    ],
)
def test_labels_that_do_not_fit(judges: ModuleType, labels: list[object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(labels))
    with pytest.raises(DataError, match=message):
        judges.read_labels(path, 2)


@pytest.mark.parametrize("words", [["--states", "x"], ["--dtype", "bfloat16"]])
def test_options_of_a_model_that_is_not_given_are_refused(judges: ModuleType, words: list[str]) -> None:
    files = [word for name in ("answers", "labels", "safe", "harmful", "output-dir") for word in (f"--{name}", "x")]
    with pytest.raises(ConfigError, match="--states and --dtype are those of --model"):
        judges.main([*files, *words])


def test_a_run_on_the_made_up_world(judges: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, rows: list[dict[str, str]]) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    world, other = World(3), World(4)
    rows = {"safe": other.rows("safe", 30), "complies": other.rows("harmful", 20), "benign": other.rows("utility", 20)}
    words = ["--answers", write("answers", [row for own in rows.values() for row in own])]
    labels = [
        {"label": label, "source": f"xstest/gpt{i % 2 + 3}"} for label, own in rows.items() for i in range(len(own))
    ]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    words += ["--labels", str(tmp_path / "labels.json"), "--output-dir", str(tmp_path / "out")]
    for kind in ("safe", "harmful", "utility"):
        words += [f"--{kind}", write(kind, world.rows(kind, 48))]
    judges.main([*words, "--model", str(save_tiny_model(tmp_path / "reader"))])
    frame = pd.read_parquet(tmp_path / "out/judges.parquet")
    assert list(frame["judge"].unique()) == ["keyword", "probe, words", "probe, words + hidden states"]
    value = frame.set_index(["judge", "assistant", "measure", "label"])["value"]
    for judge in frame["judge"].unique():
        assert value[judge, "all", judges.FIXED, "complies"] > 0.9 > 0.1 > value[judge, "all", judges.FIXED, "safe"]
    assert value["keyword", "all", judges.FIXED, "benign"] > 0.9 > value["probe, words", "all", judges.FIXED, "benign"]
    page = (tmp_path / "out/judges.md").read_text()
    assert (
        "10 % false alarms" in page and "| xstest/gpt4 |" in page and "0.94 | 0.95 |" in page.replace("0.955", "0.95")
    )
    assert "held_out_by': 'prompt'" in capsys.readouterr().out
