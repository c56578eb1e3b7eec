"""The demo, shortened: every stage runs, resumes, and the summary says what the stages' own files say."""

import json

import pytest

from pharmacist.core.errors import ConfigError
from pharmacist.core.manifest import read_manifest
from pharmacist.pipeline import demo as module
from pharmacist.pipeline.demo import ARMS, DemoOptions, demo


@pytest.fixture(scope="module")
def short():
    """Training so short that only the plumbing is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", (0, 1, 2))
        patch.setattr(module, "ALIGN", {"max_steps": 2, "per_device_train_batch_size": 4})
        patch.setattr(module, "ATTACK", {"max_steps": 2, "per_device_train_batch_size": 4})
        patch.setattr(module, "SELECTOR", {"name": "pharmacist", "form": "evidence", "readers": "lexical"})
        yield


@pytest.fixture(scope="module")
def finished(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    return demo(DemoOptions(output_dir=str(folder), rows=100, seeds=1, quiet=True))


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


@pytest.mark.slow
def test_an_interrupted_demo_continues_without_repeating_stages(finished, short, tmp_path, monkeypatch):
    from pharmacist.pipeline import attack as attack_module

    original, calls = attack_module.attack, []

    def interrupted(options):
        calls.append(options.output_dir)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(options)

    options = DemoOptions(output_dir=str(tmp_path / "run"), rows=100, seeds=1, quiet=True)
    monkeypatch.setattr(attack_module, "attack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo(options)
    before = (tmp_path / "run" / "attack" / "full-0" / "manifest.json").read_bytes()
    monkeypatch.setattr(attack_module, "attack", original)
    summary = demo(options).summary
    assert (tmp_path / "run" / "attack" / "full-0" / "manifest.json").read_bytes() == before
    assert summary["curves"] == finished.summary["curves"], "an interrupted demo finds what an undisturbed one does"


@pytest.mark.parametrize("wrong", [{"rows": 99}, {"mislabel": 0.6}, {"seeds": 0}])
def test_impossible_options(wrong, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DemoOptions(output_dir=str(tmp_path), **wrong)
