"""The benchmark on natural answers: its figures on small synthetic rankings, and a run on the synthetic world."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.worlds import World
from tests.support.scripts import load_script


@pytest.fixture
def natural(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("benchmarks/natural.py", monkeypatch)


def rows(seed: int = 0, n: int = 120) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with ties, which rows are good, and prompts of which each has several rows."""
    rng = np.random.default_rng(seed)
    good = rng.random(n) < 0.6
    return np.round(rng.normal(size=n) + good, 1), good, rng.integers(0, n // 4, n)


def test_auc_is_that_of_scikit_learn_with_ties(natural: ModuleType) -> None:
    score, good, prompts = rows()
    found = natural.auc(score, good, ~good, prompts)
    assert found.value == pytest.approx(roc_auc_score(good, score))
    assert found.low < found.value < found.high
    assert found.n == (~good).sum()


def test_the_interval_resamples_prompts_and_not_rows(natural: ModuleType) -> None:
    """Four equal answers to each prompt say no more than one; as rows of their own they would halve the interval."""
    score, good, _ = rows(n=40)
    alone = natural.auc(score, good, ~good, np.arange(40))
    four = [np.repeat(values, 4) for values in (score, good, np.arange(40))]
    copied = natural.auc(four[0], four[1], ~four[1], four[2])
    apart = natural.auc(four[0], four[1], ~four[1], np.arange(160))
    assert (copied.value, copied.low, copied.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert apart.high - apart.low < 0.6 * (alone.high - alone.low)


def test_the_interval_is_the_bootstrap_of_the_drawn_rows(natural: ModuleType) -> None:
    """Against the definition: draw prompts, take all their rows, compute the AUC."""
    score, good, prompts = rows(1)
    found, rng, values = natural.auc(score, good, ~good, prompts), np.random.default_rng(5), []
    different = np.unique(prompts)
    for _ in range(400):
        drawn = np.concatenate([np.flatnonzero(prompts == p) for p in rng.choice(different, len(different))])
        values.append(roc_auc_score(good[drawn], score[drawn]))
    assert (found.low, found.high) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.03)


def test_auc_without_a_bad_row_is_unknown(natural: ModuleType) -> None:
    score, good, prompts = rows()
    assert np.isnan(natural.auc(score, good, np.zeros_like(good), prompts).value)


def test_reliability_and_reasons(natural: ModuleType) -> None:
    p, truth = np.array([0.0, 0.05, 0.95, 1.0]), np.array([False, True, True, True])
    assert natural.reliability(p, truth) == [(0.0, pytest.approx(0.025), 0.5, 2), (0.9, pytest.approx(0.975), 1.0, 2)]
    labels = np.array(["safe", "safe", "safe", "harmful", "complies", "overrefusal", "benign"], dtype=object)
    reasons = ["critical", "duplicate", "over_refusal", "teaches_compliance", "critical", "over_refusal", "critical"]
    found = natural.right_reasons(reasons, labels)
    assert found == {
        "safe": pytest.approx(2 / 3),
        "harmful": 1,
        "complies": 0,
        "overrefusal": 1,
        "benign": 0,
        "all": pytest.approx(4 / 7),
    }


def test_figures_find_pool_rows_by_their_number(natural: ModuleType) -> None:
    """A table in another order, and without the rows of some prompts, keeps every row's own label."""
    labels = np.array(["safe", "harmful", "safe", "benign", "overrefusal"] * 4, dtype=object)
    prompts = np.repeat(np.arange(10), 2)
    table = pd.DataFrame(
        {
            "row": np.arange(20),
            "score": np.where(labels == "safe", 1.0, 0.0),
            "selected": labels == "safe",
            "reason": np.where(labels == "safe", "critical", "over_refusal"),
            "p_safe": np.where(labels == "safe", 1.0, 0),
        }
    )
    counts = natural.of_other_prompts(prompts, [0, 5])  # prompts 0 and 2, four rows
    left = natural.only(table.sample(frac=1, random_state=0), counts)
    found = {(value["measure"], value["label"]): value for value in natural.figures(left, labels, prompts)}
    assert sorted(left["row"]) == [2, 3, *range(6, 20)]
    assert found["AUC", "all bad"]["value"] == 1
    assert found["AUC", "harmful"]["n"] == (labels[left["row"]] == "harmful").sum() == 3
    assert found["top 30 %", "safe"]["value"] == 1
    assert found["selected", "safe"]["n"] == (labels[left["row"]] == "safe").sum()
    assert found["right reason", "overrefusal"]["value"] == 1 and found["right reason", "benign"]["value"] == 0
    assert found["Brier", "safe"]["value"] == 0


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("classifier", {"name": "classifier"}),
        ("pharmacist:readers=lexical,probe:folds=3", {"name": "pharmacist", "readers": "lexical,probe", "folds": 3}),
        ("seal:auxiliary=false", {"name": "seal", "auxiliary": False}),
    ],
)
def test_selectors_by_name_and_options(natural: ModuleType, text: str, choice: dict[str, Any]) -> None:
    assert natural.parse_selector(text) == choice


def test_a_selectors_option_that_is_no_value(natural: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"--selectors less:epochs=\[: a value is no YAML"):
        natural.parse_selector("less:epochs=[")


def test_options_that_would_change_nothing_are_refused(natural: ModuleType, tmp_path: Path) -> None:
    words = ["--pool", "x", "--labels", "y", "--output-dir", str(tmp_path)]
    with pytest.raises(ConfigError, match="--dtype bfloat16: is that of --model"):
        natural.main([*words, "--dtype", "bfloat16"])
    (tmp_path / "pool.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "labels.json").write_text('["safe"]')
    with pytest.raises(ConfigError, match="--sample 0: the pool has 1 prompts; give 1 to that number"):
        natural.read_pool(str(tmp_path / "pool.jsonl"), str(tmp_path / "labels.json"), 0, 0, tmp_path)


def test_labels_come_in_rounds_from_the_person_who_labelled_the_pool(
    natural: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.array(["safe", "harmful", "complies", "overrefusal", "benign"] * 6, dtype=object)
    prompts = np.repeat(np.arange(15), 2)
    (tmp_path / "pool.jsonl").write_text("".join(f'{{"prompt": "p{p}", "completion": "c"}}\n' for p in prompts))
    seen = []

    def ranked(folder: Path, options: dict[str, Any]) -> tuple[pd.DataFrame, dict[str, int]]:
        """A selector that asks for four more rows each time, and again for one that it knows."""
        known = json.loads(Path(options["labels"]).read_text())["labels"] if "labels" in options else []
        seen.append([(value["row"], value["label"]) for value in known])
        folder.mkdir()
        asked = ([known[0]["row"]] if known else []) + list(range(len(known), len(known) + 4))
        (folder / "to_label.jsonl").write_text("".join(f'{{"row": {row}}}\n' for row in asked))
        return pd.DataFrame({"row": np.arange(30), "score": 0.0}), {"labels": len(known)}

    monkeypatch.setattr(natural, "ranked", ranked)
    options = {"pool": str(tmp_path / "pool.jsonl")}
    lines = natural.rank_with_labels("new", tmp_path / "new", [6, 4], options, labels, prompts)
    first = [(0, "good"), (1, "harmful"), (2, "harmful"), (3, "over_refusal")]
    assert seen == [[], first, [*first, (4, "not_safety_critical"), (5, "good")]]
    assert [(name, len(table), cost) for name, table, cost in lines] == [
        ("new, without the 4 labels, same rows", 26, {}),
        ("new, 4 labels", 26, {"labels": 4}),
        ("new, without the 6 labels, same rows", 24, {}),
        ("new, 6 labels", 24, {"labels": 6}),
    ]


def test_a_selector_that_asks_for_nothing(natural: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"asks for no labels \(no to_label.jsonl\)"):
        natural.still_asked(tmp_path, {})


def test_a_run_on_the_made_up_world(
    natural: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(0)
    names = {
        "good": "safe",
        "duplicate": "safe",
        "mislabel": "harmful",
        "overrefuse": "overrefusal",
        "offtopic": "benign",
        "noisy": "complies",
    }
    pool, kinds = world.pool(240, mislabel=0.1)
    sets = {
        "pool": pool,
        "safe": world.rows("safe"),
        "harmful": world.rows("harmful"),
        "utility": world.rows("utility"),
    }
    for name, own in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (tmp_path / "labels.json").write_text(json.dumps([{"label": names[kind]} for kind in kinds]))
    command = [word for name in sets for word in (f"--{name}", str(tmp_path / f"{name}.jsonl"))]
    command += ["--labels", str(tmp_path / "labels.json"), "--output-dir", str(tmp_path / "out"), "--sample", "150"]
    natural.main([*command, "--selectors", "classifier", "length", "seal"])
    found = pd.read_parquet(tmp_path / "out" / "natural.parquet")
    auc = found[found["measure"] == "AUC"].set_index(["ranking", "label"])["value"]
    assert auc["classifier", "all bad"] > 0.9 > auc["length", "all bad"]
    assert set(found.loc[found["measure"] == "right reason", "ranking"]) == {"classifier"}
    assert "skipped seal: " in capsys.readouterr().out  # it needs a model, and none was given
    assert "| classifier |" in (tmp_path / "out" / "natural.md").read_text()

    monkeypatch.setattr("pharmacist.pipeline.curate.find_duplicates", lambda *_, **__: pytest.fail("ranked again"))
    natural.main([*command, "--selectors", "classifier", "length"])  # all of it is there


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ('["safe"]', "1 labels for 2 rows"),
        ('["safe", "fine"]', "unknown label 'fine'"),
        ('[{"kind": 1}, "safe"]', "no JSON list of labels"),
        ("{", "no JSON list of labels"),
    ],
)
def test_labels_that_are_not_the_pools(natural: ModuleType, tmp_path: Path, labels: str, message: str) -> None:
    (tmp_path / "pool.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    (tmp_path / "labels.json").write_text(labels)
    with pytest.raises(DataError, match=message):
        natural.read_pool(str(tmp_path / "pool.jsonl"), str(tmp_path / "labels.json"), None, 0, tmp_path)
