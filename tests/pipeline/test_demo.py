"""The demo, shortened: every stage runs, resumes, and the summary says what the stages' own files say."""

import json
import shutil
from pathlib import Path

import pytest

from pharmacist.cli.main import main
from pharmacist.core.config import from_mapping
from pharmacist.core.errors import ConfigError
from pharmacist.core.manifest import read_manifest
from pharmacist.core.mappings import merged
from pharmacist.pipeline import demo as module
from pharmacist.pipeline.bench.grid import expand
from pharmacist.pipeline.bench.options import BenchOptions
from pharmacist.pipeline.bench.results import collect
from pharmacist.pipeline.demo import ARMS, GRID, demo
from pharmacist.pipeline.stages.demo import DemoOptions


TRAIN = {"max_steps": 2, "per_device_train_batch_size": 4}
CHEAP = {"name": "pharmacist", "form": "evidence", "readers": "lexical"}
SHORT = merged(
    GRID,
    {
        "selectors": [own if isinstance(own, str) else own | {"selector": CHEAP} for own in GRID["selectors"]],
        "align": {"train": TRAIN},
        "attack": {"snapshots": [1], "train": TRAIN},
    },
)
"""Training so short that only the plumbing is tested."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    return demo(DemoOptions(output_dir=str(folder), rows=100, seeds=1, quiet=True), SHORT)


def test_the_summary_is_what_the_stages_measured(finished):
    summary = json.loads((finished.folder / "demo.json").read_text())
    assert summary == finished.summary
    assert summary["arms"] == list(ARMS) and summary["steps"] == [0, 1, 2]
    for arm in ARMS:
        for position, step in enumerate(summary["steps"]):
            folder = finished.folder / "evaluate" / f"{arm}-0" / f"step-{step}"
            metrics = json.loads((folder / "metrics.json").read_text())
            assert summary["curves"][arm][0][position] == metrics["harmful_score"]["value"]
        assert summary["fine_tune_accuracy"][arm] == [metrics["fine_tune_accuracy"]["value"]]
        manifest = read_manifest(finished.folder / "align" / f"{arm}-0")
        assert summary["alignment_seconds"][arm] == [manifest.phases["train"].seconds]
        assert manifest.counts["trained"] == (100 if arm == "full" else 30)
    assert summary["differences"]["core - full"]["mean"] == pytest.approx(
        summary["auc"]["core"]["mean"] - summary["auc"]["full"]["mean"]
    )
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert "mean over the attack" in page


def test_warnings_of_stages_besides_the_rankings_are_kept(finished):
    folders = [path.parent for path in (finished.folder / "stages").glob("evaluate-*/manifest.json")]
    own = {text for folder in folders for text in read_manifest(folder).warnings}
    warnings = read_manifest(finished.folder).warnings
    assert own and warnings and all(warning.startswith(("align", "attack", "evaluate")) for warning in warnings)
    assert any(text in warning for text in own for warning in warnings)


def test_the_table_keeps_its_names_where_no_rate_has_an_interval(finished, capsys):
    demo(DemoOptions(output_dir=str(finished.folder), rows=100, seeds=1), SHORT)  # finished: it only shows the result
    said = capsys.readouterr().err
    assert all(f"│ {arm}" in said for arm in ARMS) and said.count("(no interval: one value)") == 2


def test_every_stage_is_an_ordinary_run(finished):
    folders = ["rank", "rank-random-0", "align/core-0", "attack/core-0", "evaluate/core-0/step-2"]
    assert [read_manifest(finished.folder / name).stage for name in folders] == [
        "curate",
        "curate",
        "align",
        "attack",
        "evaluate",
    ]
    labels = finished.summary["ranking"]
    assert sum(labels["selected"].values()) == 30 and sum(row["rows"] for row in labels["reasons"]) == 100


def test_a_demo_resumes_without_repeating_stages(finished, tmp_path):
    """As after an interruption: what is finished stays, also where the demo as a whole is not."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder, symlinks=True)
    manifest = read_manifest(folder)
    manifest.model_copy(update={"status": "started"}).write(folder)
    before = (folder / "attack" / "full-0" / "manifest.json").read_bytes()
    shutil.rmtree((folder / "attack" / "core-0").resolve())
    summary = demo(DemoOptions(output_dir=str(folder), rows=100, seeds=1, quiet=True), SHORT).summary
    assert (folder / "attack" / "full-0" / "manifest.json").read_bytes() == before
    assert read_manifest(folder / "attack" / "core-0").status == "success"
    assert summary["curves"] == finished.summary["curves"], "an interrupted demo finds what an undisturbed one does"


def test_the_demo_is_its_grid(finished):
    pool = GRID["pools"][0] | {"rows": 100}
    grid = SHORT | {"pools": [pool], "seeds": [0], "quiet": True, "output_dir": str(finished.folder)}
    plan = expand(from_mapping(BenchOptions, grid, where="grid"), finished.folder.resolve())
    assert not plan.waiting(), "bench finds every stage finished"
    rows = {row.selector: row for row in collect(plan)}
    assert {arm: [row.harmful_scores] for arm, row in rows.items()} == finished.summary["curves"]
    assert rows["core"].ranking_auc == pytest.approx(100 * finished.summary["ranking"]["auc"])


def test_the_grid_of_the_demo_is_one_of_bench(tmp_path):
    assert (
        main(
            [
                "bench",
                "--config",
                str(Path(module.__file__).with_suffix(".yaml")),
                "--dry-run",
                "--output-dir",
                str(tmp_path),
            ]
        )
        == 0
    )


@pytest.mark.parametrize("wrong", [{"rows": 99}, {"mislabel": 0.6}, {"seeds": 0}, {"mislabel": 0.1, "pool": "clean"}])
def test_impossible_options(wrong, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DemoOptions(output_dir=str(tmp_path), **wrong)
