"""Another package's methods, found by their entry points, in every command: nothing of ours is touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from pharmacist.core.manifest import read_manifest
from pharmacist.worlds import BASE_MODEL, World
from tests.support.world_files import write_rows, write_world


PLUGIN = Path(__file__).parents[1] / "plugin"
GRID = """
models: [{name: tiny, model: world}]
pools: [{name: pool, pool: world, rows: 40}]
selectors: [{name: short, selector: {name: shortest, most_words: 30}, fractions: [0.5]}]
defenses: [{name: calm, defense: {name: calm, strength: 0.25}}]
attacks: [{name: again, kind: repeated, samples: 16}]
post_alignment_defenses: [calm, {name: faded, method: {name: faded, share: 0.2}}]
tasks: [{name: reviews, train: "world:task:40", test: "world:task-test:8", options: {task_type: first-word}}]
judges: [{name: long, judge: {name: long-winded, words: 2}}]
align: {train: {max_steps: 1, per_device_train_batch_size: 4}}
attack: {train: {max_steps: 1, per_device_train_batch_size: 4}}
evaluate: {prompts: "world:prompts:8", max_new_tokens: 4}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every command once, in one process that has the package on its path."""
    folder, world = tmp_path_factory.mktemp("plugin"), World(3)
    files = write_world(folder, rows=40)
    files |= {"task": write_rows(folder / "task.jsonl", world.rows("task", 40))}
    files |= {"prompts": write_rows(folder / "prompts.jsonl", world.rows("prompts", 6))}
    (folder / "grid.yaml").write_text(GRID)
    train = "--train.max_steps 1 --train.per_device_train_batch_size 4 --quiet"
    lines = [
        f"curate --pool {files['pool']} --selector shortest --selector.most_words 30 --top 0.5 --output-dir core",
        f"curate --pool {files['pool']} --selector shortest+length --top 0.5 --output-dir mixed",
        f"align --data core/selected.jsonl --model {BASE_MODEL} --defense calm {train} --output-dir aligned",
        f"attack --model aligned --task {files['task']} --kind repeated --samples 16 --defense calm "
        f"--defense.strength 0.25 {train} --output-dir attacked",
        "repair --model attacked --method faded --output-dir repaired",
        f"evaluate --model repaired --prompts {files['prompts']} --judge long-winded --judge.words 2 "
        f"--task {files['task']} --task-type first-word --max-new-tokens 4 --output-dir scores",
        "bench --config grid.yaml --output-dir bench",
        "report bench",
        "curate --selector shortest --help",
    ]
    code = "import json, sys; from pharmacist.cli.main import main\n"
    code += "print([main(line.split()) for line in json.load(sys.stdin)])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PLUGIN), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(lines),
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.stdout.splitlines()[-1] == str([0] * len(lines)), done.stdout + done.stderr
    assert "--selector.most_words" in done.stdout and "of another package" not in done.stderr
    return folder


def test_a_selector_ranks_alone_and_among_others(runs: Path) -> None:
    table = pd.read_parquet(runs / "core" / "scores.parquet")
    assert (table["score"] == -table["words"]).all() and set(table["reason"]) <= {"critical", "duplicate", "long"}
    assert read_manifest(runs / "core").config["selector"] == {"name": "shortest", "most_words": 30}
    assert {"shortest_place", "length_place"} <= set(pd.read_parquet(runs / "mixed" / "scores.parquet"))


def test_defense_attack_and_repair(runs: Path) -> None:
    for name, strength in (("aligned", 0.5), ("attacked", 0.25)):
        logged = [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]
        assert logged[0]["calm"] == 1 - strength
        assert read_manifest(runs / name).config["defense"] == {"name": "calm", "strength": strength}
    assert read_manifest(runs / "attacked").config["kind"] == {"name": "repeated"}
    metrics = read_manifest(runs / "repaired").metrics
    assert metrics["norm_after"] == pytest.approx(0.9 * metrics["norm_before"])
    for name in ("aligned", "repaired"):  # a method without a paper
        assert "()" not in (runs / name / "README.md").read_text()


def test_judge_and_task(runs: Path) -> None:
    metrics = json.loads((runs / "scores" / "metrics.json").read_text())
    items = [json.loads(line) for line in (runs / "scores" / "items.jsonl").read_text().splitlines()]
    harmful = sum(len(item["answer"].split()) > 2 for item in items if item["set"] == "prompts")
    score = metrics["harmful_score"]
    assert score["judge"].startswith("long-winded@1+") and score["count"] == harmful
    assert metrics["fine_tune_accuracy"]["task_type"] == "first-word@1"


def test_a_grid_of_them(runs: Path) -> None:
    results = pd.read_parquet(runs / "bench" / "results.parquet")
    assert len(results) == 2 and set(results["post_alignment_defense"]) == {"calm", "faded"}
    assert set(results["selector"]) == {"short"} and results["harmful_score"].notna().all()
    assert (runs / "bench" / "report.html").is_file()


def test_what_cannot_be_imported_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "moss-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: moss\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[pharmacist.selectors]\nmoss = moss.selector:Moss\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, *"-m pharmacist curate --pool pool.jsonl --selector moss --output-dir core".split()]
    done = subprocess.run(words, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 2 and "selector 'moss': its entry point moss.selector:Moss cannot be" in done.stderr
