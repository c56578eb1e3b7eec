"""One small grid with real stages, and the recipes."""

import json
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from pharmacist.cli.main import main
from pharmacist.core.manifest import read_manifest
from pharmacist.data.formats import open_source
from pharmacist.selectors.labels import write_labels
from pharmacist.worlds import World
from tests.support.grids import FEW_STEPS, results, write_grid
from tests.support.world_files import TWO_PROCESSES


RECIPES = Path(__file__).parents[3] / "recipes"


def test_real_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = {
        "judges": [{"judge": "probe", "safe": "world:judge-safe:20", "harmful": "world:judge-harmful:20"}],
        "selectors": ["random"],
        "defenses": ["repnoise"],
        "post_alignment_defenses": ["safe-lora"],
    }
    few = FEW_STEPS | {"align": FEW_STEPS["align"] | {"harmful": "world:answers"}}
    grid = write_grid(tmp_path / "grid.yaml", **changes, **few)
    assert main(["bench", "--config", str(grid), "--output-dir", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "This grid is incomplete" not in page
    # What the stages warn of is told once, and kept.
    text = "--judge probe: no utility references: harmless help may pass for compliance"
    (warning,) = [it for it in read_manifest(tmp_path / "out").warnings if text in it]
    assert re.fullmatch(rf"evaluate: {text} \(\d stages\)", warning) and warning in page
    assert capsys.readouterr().err.count(text) == 1
    evaluations = [read_manifest(path) for path in (tmp_path / "out" / "stages").glob("evaluate-*")]
    assert warning.endswith(f"({len(evaluations)} stages)") and all(text in it.warnings for it in evaluations)
    row = pd.read_parquet(tmp_path / "out" / "results.parquet").iloc[0]
    assert (row["pool_rows"], row["alignment_rows"], row["samples"], row["prompts"]) == (60, 30, 20, 5)
    assert list(row["attack_steps"]) == [0, 1, 2]
    assert 0 <= row["harmful_score_over_attack"] <= 100
    assert row["fine_tune_accuracy"] >= 0
    assert pd.isna(row["over_refusal"])  # nobody asked benign prompts
    for name in ("alignment_seconds", "attack_seconds", "repair_seconds", "alignment_tokens", "alignment_peak_memory"):
        assert row[name] > 0, name
    assert (tmp_path / "out" / row["folder"] / "metrics.json").is_file()
    verdicts = pd.read_parquet(tmp_path / "out" / "verdicts.parquet")
    assert set(verdicts["cell"]) == {row["cell"]} and set(verdicts["seed"]) == {row["seed"]}
    assert verdicts["step"].tolist()[:3] == [0, 1, 2] and verdicts["step"].isna().tolist() == [False] * 3 + [True]
    assert verdicts["prompts"].map(list).tolist() == [[0, 1, 2, 3, 4]] * 4
    scores = [100 * np.mean(own.astype(bool)) for own in verdicts["harmful"]]
    assert scores == [*row["harmful_scores"], row["harmful_score"]]


def test_labels_that_the_selector_asks_for(tmp_path: Path) -> None:
    planted = World(0).labelled(60)
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row.row) + "\n" for row in planted))
    known = {"mislabel": "harmful", "overrefuse": "over_refusal", "noisy": "low_quality"} | {
        "offtopic": "not_safety_critical"
    }
    labels = {i: known.get(row.label, "good") for i, row in enumerate(planted)}
    write_labels(tmp_path / "labels.json", open_source(tmp_path / "pool.jsonl").fingerprint(), labels)
    lexical = {"name": "pharmacist", "form": "evidence", "readers": "lexical"}
    references = {name: f"world:{name}" for name in ("safe", "harmful", "utility")}
    changes: dict[str, Any] = {
        "pools": [references | {"pool": str(tmp_path / "pool.jsonl"), "labels": str(tmp_path / "labels.json")}],
        "selectors": [
            {"name": "asks", "selector": lexical, "labels": 12},
            {"name": "oracle", "selector": "random", "labels": "all"},
        ],
        "fractions": [0.2],
        "defenses": ["sft"],
        "evaluate": {"prompts": "world:prompts:5", "max_new_tokens": 4, "margin": margin(tmp_path / "margin.jsonl")},
    }
    grid = write_grid(tmp_path / "grid.yaml", **changes, **FEW_STEPS)
    assert main(["bench", "--config", str(grid), "--output-dir", str(tmp_path / "out")]) == 0
    table = pd.read_parquet(tmp_path / "out/results.parquet").set_index("selector")
    assert (table["alignment_rows"] == 12).all()
    assert table["loss_margin_before"].notna().all() and table["loss_margins"].map(len).tolist() == [3, 3]
    first = table.iloc[0]  # after 0, 1 and 2 steps
    assert first["loss_margin_over_attack"] == pytest.approx(np.average(first["loss_margins"], weights=[1, 2, 1]))
    stages = tmp_path / "out/stages"
    (answered,) = stages.glob("label-*/labels.json")
    (ranking,) = [path for path in stages.glob("rank-*") if (path / "to_label.jsonl").is_file() and not given(path)]
    asked = {json.loads(line)["row"] for line in (ranking / "to_label.jsonl").open()}
    answers = {entry["row"]: entry["label"] for entry in json.loads(answered.read_text())["labels"]}
    assert len(asked) == 12 and answers == {row: labels[row] for row in asked}
    scores = {path: pd.read_parquet(path / "scores.parquet") for path in stages.glob("rank-*") if given(path)}
    assert sorted((table["label"] != "").sum() for table in scores.values()) == [pytest.approx(12, abs=3), 60]
    (oracle,) = [table for table in scores.values() if (table["label"] != "").all()]
    assert {labels[row] for row in oracle.loc[oracle["selected"], "row"]} == {"good"}
    (ranked,) = [table for table in scores.values() if (table["label"] == "").any()]
    others = ranked[ranked["label"] == ""]
    good = others["row"].map(labels) == "good"
    assert table.loc["asks", "ranking_auc"] == pytest.approx(100 * roc_auc_score(good, others["score"]))
    assert pd.isna(table.loc["oracle", "ranking_auc"])  # it knows all labels
    assert table.loc["oracle", "selected_good"] == 100 and 0 < table.loc["asks", "selected_good"] <= 100


def given(ranking: Path) -> bool:
    return "labels" in json.loads((ranking / "manifest.json").read_text())["inputs"]


def margin(path: Path) -> str:
    rows = zip(World(0).rows("harmful", 4), World(0).rows("safe", 4), strict=True)
    pairs = [
        {"prompt": bad["prompt"], "chosen": good["completion"], "rejected": bad["completion"]} for bad, good in rows
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(path)


def test_weights_reach_the_training(tmp_path: Path) -> None:
    selector = {"name": "toxic-lora", "steps": 2, "toxic_steps": 2, "batch_size": 4}
    arms = [{"name": "rows", "selector": selector}, {"name": "weights", "selector": selector, "weighted": True}]
    few = FEW_STEPS | {"attack": FEW_STEPS["attack"] | {"snapshots": []}}
    grid = write_grid(tmp_path / "grid.yaml", selectors=arms, defenses=["sft"], **few)
    assert main(["bench", "--config", str(grid), "--output-dir", str(tmp_path / "out")]) == 0
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "out/stages").glob("align-*/manifest.json")]
    assert sorted("weights" in manifest["inputs"] for manifest in manifests) == [False, True]
    plain, weighted = (manifest["metrics"]["final_loss"] for manifest in manifests)
    assert plain != weighted
    (folder,) = (tmp_path / "out/stages").glob("select-*")
    weights = pd.read_parquet(folder / "weights.parquet")
    assert len(weights) == 30 and weights["weight"].mean() == pytest.approx(1.0)


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run loads no model")

    # The judge is imported before `nn.models` is patched, of which it would keep this function for later tests.
    for place in ("evaluation.judges.probe", "pipeline.rows", "nn.models"):
        monkeypatch.setattr(f"pharmacist.{place}.load_model", load)


def test_the_embedded_recipe(no_models: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--config", str(RECIPES / "embedded.yaml"), "--output-dir", str(tmp_path / "out"), "--dry-run"]
    assert main(words) == 0
    assert "35 cells" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "cells"), [("paper", 6 * 5 * 9 * 3 * 3), ("current-models", 3 * 5 * 5 * 3 * 3 * 3)])
def test_the_recipes_for_large_models(
    name: str,
    cells: int,
    no_models: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(RECIPES / "beavertails.py"))
    script["PARTS"] |= {"attack": 40, "pool": 40, "references": 10}
    rows = World(0).rows("harmful", 95)
    Path("source.json").write_text(
        json.dumps(
            [
                {
                    "prompt": row["prompt"],
                    "response": row["completion"],
                    "is_safe": number % 20 == 0,
                    "refusal": f"Question: {row['prompt']}\nAnswer: no",
                }
                for number, row in enumerate(rows)
            ]
        )
    )
    script["make"]("source.json", Path("data"))
    parts = {part: [json.loads(line) for line in open(f"data/{part}.jsonl")] for part in script["PARTS"]}
    assert {part: len(found) for part, found in parts.items()} == {"attack": 40, "pool": 40, "references": 10}
    prompts = [row["prompt"] for found in parts.values() for row in found]
    assert len(set(prompts)) == 90 and rows[0]["prompt"] not in prompts
    assert parts["pool"][0].keys() == {"prompt", "chosen", "rejected"}
    words = ["bench", "--config", str(RECIPES / f"{name}.yaml"), "--output-dir", "out", "--dry-run"]
    assert main(words) == 0
    assert f"{cells} cells" in capsys.readouterr().err
    shutil.rmtree("data")
    assert main(words) == 2
    assert "data/pool.jsonl: no such file" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "grid.yaml", selectors=["random"], defenses=["sft"], **FEW_STEPS)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    assert main(["bench", "--config", str(grid), "--output-dir", str(tmp_path / "one")]) == 0
    for _ in range(2):  # the second time it is complete, on both
        words = [*TWO_PROCESSES, "bench", "--config", str(grid), "--output-dir", str(tmp_path / "two")]
        launched = subprocess.run(words, env=environment, capture_output=True, timeout=280)
        assert launched.returncode == 0, launched.stderr.decode()[-3000:]
    # Twice as many rows per step give other weights, so that only what was done is compared.
    done = ["cell", "pool_rows", "alignment_rows", "samples", "prompts", "seed"]
    one, two = (results(tmp_path / name)[done] for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.slow
def test_a_second_judge_takes_the_answers_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pharmacist.evaluation.evaluator import Evaluator

    real, asked = Evaluator.answers, []

    def answers(self: Evaluator, *arguments: Any, **options: Any) -> Any:
        asked.append(list(self.rows))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Evaluator, "answers", answers)
    references = {name: f"world:judge-{name}:20" for name in ("safe", "harmful")}
    judges = ["keyword", {"judge": "probe", **references}]
    few = FEW_STEPS | {"attack": FEW_STEPS["attack"] | {"snapshots": []}}
    grid = write_grid(tmp_path / "grid.yaml", selectors=["random"], defenses=["sft"], judges=judges, **few)
    assert main(["bench", "--config", str(grid), "--output-dir", str(tmp_path / "both")]) == 0
    assert len(asked) == 2  # aligned and attacked
    assert main(["bench", "--config", str(grid), "--output-dir", str(tmp_path / "one"), "--only", "probe"]) == 0
    assert len(asked) == 4
    both, one = results(tmp_path / "both"), results(tmp_path / "one")
    assert both["judge"].tolist() == ["keyword", "probe"]
    pd.testing.assert_frame_equal(both[both["judge"] == "probe"].reset_index(drop=True), one)
