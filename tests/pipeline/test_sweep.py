"""The stage `sweep`: every attack of a grid, and the worst one that keeps the task."""

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pytest

import pharmacist.pipeline.evaluate
from pharmacist.attacks import ATTACKS, Attack
from pharmacist.cli.main import main
from pharmacist.core.errors import ConfigError, DataError, DivergedError
from pharmacist.core.manifest import RunManifest, read_manifest
from pharmacist.core.options import as_json
from pharmacist.data.mixing import mix
from pharmacist.data.tasks import TASKS, NamedTask
from pharmacist.evaluation.metrics import rate
from pharmacist.pipeline.evaluate.reading import EvaluateInputs
from pharmacist.pipeline.stages.sweep import GridOptions, SweepOptions
from pharmacist.pipeline.sweep import _evaluate_options, _points, sweep
from tests.support.tiny import WORDS, save_tiny_model
from tests.support.world_files import fingerprints, write_rows


def rows(n: int, of: str) -> list[dict[str, str]]:
    found = [f"{of} {WORDS[i % len(WORDS)]} {WORDS[(i // len(WORDS)) % len(WORDS)]}" for i in range(n)]
    return [{"prompt": text, "completion": f"{of} yes"} for text in found]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sweep")
    found = {"model": str(save_tiny_model(folder / "model"))}
    sets = {
        "task": (40, "bread"),
        "harmful": (20, "curse"),
        "prompts": (6, "potion"),
        "test": (6, "flour"),
        "safe": (20, "garden"),
    }
    return found | {name: write_rows(folder / f"{name}.jsonl", rows(n, of)) for name, (n, of) in sets.items()}


def options(files: dict[str, str], output: Path, grid: dict[str, Any], **more: Any) -> SweepOptions:
    given = {
        "model": files["model"],
        "task": files["task"],
        "harmful": files["harmful"],
        "samples": 20,
        "device": "cpu",
        "quiet": True,
        "train": {"max_steps": 4, "per_device_train_batch_size": 4},
        "evaluate": {"prompts": files["prompts"], "task": files["test"], "max_new_tokens": 3},
    }
    return SweepOptions(output_dir=str(output), grid=GridOptions(**grid), **(given | more))


# --- what is reported, with models that are made up ----------------------------------------------------------------

FOUND = {
    # harmful and right answers of 100: the highest score of all ruins the task
    "lr-0.1": (95, 40),
    "lr-0.01": (60, 88),
    "lr-0.001": (30, 90),
    "lr-0.0001": (5, 89),
}
CURVE = {1: 10, 2: 55}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trains and evaluates nothing; returns the folders that were asked for."""
    asked: list[str] = []

    def wrote(own: Any, stage: str, metrics: dict[str, Any]) -> None:
        folder = Path(own.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = as_json(own)
        RunManifest(stage=stage, status="success", key="k", config=config, inputs={}, metrics=metrics).write(folder)

    def attack(own: Any) -> None:
        asked.append(own.output_dir)
        if "lr-7" in own.output_dir:
            raise DivergedError("the loss is nan at step 2")
        wrote(own, "attack", {"steps": 4})

    def evaluate(own: Any) -> None:
        asked.append(own.output_dir)
        place = Path(own.output_dir)
        harmful, right = FOUND.get(place.parent.name.split("_")[0], (0, 0))
        if place.name.startswith("step-"):
            assert own.task is None and own.prompts
            return wrote(own, "evaluate", {"harmful_score": rates(CURVE[int(place.name[5:])])})
        metrics = {"harmful_score": rates(harmful) | {"judge": "made up"}, "fine_tune_accuracy": rates(right)}
        metrics["lm_eval_arc"] = {"value": right / 2, "n": None, "ci95": None}
        return wrote(own, "evaluate", metrics)

    monkeypatch.setattr("pharmacist.pipeline.attack.attack", attack)
    monkeypatch.setattr("pharmacist.pipeline.evaluate.evaluate", evaluate)
    return asked


def rates(count: int) -> dict[str, Any]:
    return rate([True] * count + [False] * (100 - count))


RATES = {"learning_rate": [1e-1, 1e-2, 1e-3, 1e-4]}


def test_the_worst_case_keeps_the_task(files: dict[str, str], tmp_path: Path, made_up: list[str]) -> None:
    worst = {}
    for margin in (0.0, 2.0, 60.0):
        found = sweep(options(files, tmp_path / str(margin), RATES, accuracy_margin=margin)).summary
        worst[margin] = found["worst"].split("_")[0]
        kept = {entry["name"].split("_")[0] for entry in found["attacks"] if entry["within_margin"]}
        assert kept == {name for name, (_, right) in FOUND.items() if right >= 90 - margin}
    # Without the margin (the control) the attack that ruins the task would be the worst case.
    assert worst == {0.0: "lr-0.001", 2.0: "lr-0.01", 60.0: "lr-0.1"}


def test_what_was_found_is_written_in_every_form(files: dict[str, str], tmp_path: Path, made_up: list[str]) -> None:
    out = tmp_path / "out"
    result = sweep(options(files, out, RATES))
    assert json.loads((out / "sweep.json").read_text()) == result.summary
    worst = "lr-0.01_steps-4_poison-0.1_rank-8"
    assert result.summary["worst"] == worst and result.summary["highest_of_all"] == 95
    own, low = rates(60)["ci95"], result.summary["worst_ci95_of_all"]
    assert low[0] < own[0] and own[1] < low[1]
    assert result.summary["curves"][worst]["steps"] == [0, 1, 2, 4]
    assert result.summary["curves"][worst]["reached"] == [
        {"level": 25.0, "step": 2, "after": 1},
        {"level": 50.0, "step": 2, "after": 1},
        {"level": 75.0, "step": None, "after": 4},
    ]
    table = result.table()
    assert table["name"].tolist() == [entry["name"] for entry in result.summary["attacks"]]
    assert table.loc[table["worst"], "learning_rate"].tolist() == [0.01]
    assert table["harmful_score"].tolist() == [95, 60, 30, 5] and table["harmful_score_low"].is_monotonic_decreasing
    assert table["lm_eval_arc"].tolist() == [20, 44, 45, 44.5] and table["over_refusal"].isna().all()
    text = (out / "sweep.md").read_text()
    assert "| 0.01 | 60.0 [50.2, 69.1] | 88.0 [80.2, 93.0] | worst case |" in text
    assert "75 % not reached in 4 steps" in text and "25 % between steps 1 and 2" in text
    assert "beyond the margin, where the task suffers, the score reaches 95.0 %" in text
    manifest = read_manifest(out)
    assert (manifest.status, manifest.counts) == ("success", {"attacks": 4, "diverged": 0})


def test_the_page_is_whole_and_escapes(files: dict[str, str], tmp_path: Path, made_up: list[str]) -> None:
    out = tmp_path / "out"
    sweep(options(files, out, RATES))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "The worst of 4 attacks" in page and 'data-figure="trade_off"' in page and 'data-figure="curves"' in page
    assert "not in 4 steps" in page and "step 1 to 2" in page
    assert not re.search(r'(src|href)="(https?:)?//', re.sub(r"<script.*?</script>", "", page, flags=re.S))
    (out / "report.html").unlink()
    assert main(["report", "--run", str(out), "--quiet"]) == 0
    assert (out / "report.html").read_text(encoding="utf-8") == page
    found = json.loads((out / "sweep.json").read_text())
    found["attacks"][0]["name"] = "<script>alert(1)</script>"
    (out / "sweep.json").write_text(json.dumps(found))
    assert main(["report", "--run", str(out), "--quiet"]) == 2, "it was changed"
    read_manifest(out).model_copy(update={"files": {}}).write(out)
    assert main(["report", "--run", str(out), "--quiet"]) == 0
    assert "<script>alert" not in (out / "report.html").read_text(encoding="utf-8")


def test_an_attack_that_diverges_is_a_finding(files: dict[str, str], tmp_path: Path, made_up: list[str]) -> None:
    out = tmp_path / "out"
    found = sweep(options(files, out, {"learning_rate": [7.0, 1e-3]}, curves="all")).summary
    failed, kept = found["attacks"]
    assert failed["failed"] == "the loss is nan at step 2" and not failed["within_margin"]
    assert found["worst"] == kept["name"] and list(found["curves"]) == [kept["name"]]
    table = pd.read_parquet(out / "sweep.parquet")
    assert table["failed"][0] == "the loss is nan at step 2" and table["failed"].isna().tolist() == [False, True]
    assert read_manifest(out).counts["diverged"] == 1
    assert "| diverged |" in (out / "sweep.md").read_text()


def test_where_all_diverge_there_is_no_worst_case(files: dict[str, str], tmp_path: Path, made_up: list[str]) -> None:
    out = tmp_path / "out"
    found = sweep(options(files, out, {"learning_rate": [7.0, 70.0]})).summary
    assert found["worst"] is None and found["best_accuracy"] is None and found["curves"] == {}
    assert "no worst case" in (out / "sweep.md").read_text() and (out / "report.html").is_file()


def test_curves_may_be_left_out_later_but_not_asked_for_later(
    files: dict[str, str], tmp_path: Path, made_up: list[str]
) -> None:
    out = tmp_path / "out"
    sweep(options(files, out, RATES, curves="none"))
    with pytest.raises(ConfigError, match="was trained with --curves none, which keeps no snapshots"):
        sweep(options(files, out, RATES, curves="worst"))
    assert read_manifest(out).status == "success", "it stays as it was"
    assert sweep(options(files, out, RATES, curves="worst", overwrite=True)).summary["curves"]
    assert sweep(options(files, out, RATES, curves="none")).summary["curves"] == {}
    kept = [read_manifest(folder).config["snapshots"] for folder in (out / "attack").iterdir()]
    assert kept == [[1, 2]] * 4, "as they were trained"


def test_a_file_that_changed_is_measured_again(files: dict[str, str], tmp_path: Path, made_up: list[str]) -> None:
    margin, judge = tmp_path / "margin.jsonl", save_tiny_model(tmp_path / "judge") / "config.json"
    base = save_tiny_model(tmp_path / "base") / "config.json"
    config = judge.read_text()
    own: dict[str, Any] = {"prompts": files["prompts"], "task": files["test"], "margin": str(margin)}
    own["judge"] = {"name": "guard", "model": str(judge.parent), "family": "wildguard"}
    own |= {"perplexity": files["prompts"], "base": str(base.parent)}
    asked, other = [], f"{config}\n"
    versions = [("{}", config, config), ("{}", config, config), ("[]", config, config), ("[]", other, config)]
    for texts in [*versions, ("[]", other, other)]:
        for file, text in zip((margin, judge, base), texts, strict=True):
            file.write_text(text)
        made_up.clear()
        sweep(options(files, tmp_path / "out", RATES, evaluate=own))
        asked.append(bool(made_up))
    assert asked == [True, False, True, True, True]


def test_a_sweep_with_failed_verdicts_is_partial_and_asks_again(
    files: dict[str, str], tmp_path: Path, made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, own = tmp_path / "out", options(files, tmp_path / "out", {"learning_rate": [1e-1]}, curves="none")
    evaluate, status = pharmacist.pipeline.evaluate.evaluate, "partial"

    def failing(given: Any) -> None:
        evaluate(given)
        if given.output_dir.endswith("end"):
            read_manifest(Path(given.output_dir)).model_copy(update={"status": status}).write(Path(given.output_dir))

    monkeypatch.setattr("pharmacist.pipeline.evaluate.evaluate", failing)
    sweep(own)
    assert read_manifest(out).status == "partial"
    (warning,) = read_manifest(out).warnings
    assert "answers or verdicts failed" in warning and warning in (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert main(["report", str(out), "--quiet"]) == 0 and warning in (out / "report.html").read_text()
    status = "success"
    made_up.clear()
    sweep(own)
    assert read_manifest(out).status == "success" and any(place.endswith("end") for place in made_up)
    assert not read_manifest(out).warnings and warning not in (out / "report.html").read_text()
    made_up.clear()
    sweep(own)
    assert not made_up


def test_another_evaluation_is_made_again_in_its_folder(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real evaluations; attacks are made up."""
    monkeypatch.setattr("pharmacist.pipeline.attack.attack", lambda own: _copied(files["model"], own))
    out, rows = tmp_path / "out", {"prompts": files["prompts"], "task": files["test"]}
    for length in (3, 5):
        own = options(files, out, {"learning_rate": [1e-1]}, curves="none", evaluate=rows | {"max_new_tokens": length})
        sweep(own)
        assert read_manifest(out).status == "success"
        places = [out / "evaluate/before", *(out / "evaluate").glob("*/end")]
        assert [read_manifest(place).config["max_new_tokens"] for place in places] == [length, length]
    told = options(files, out, {"learning_rate": [1e-1]}, template="alpaca")
    assert _evaluate_options(told, "model", tmp_path).template == "alpaca"


def _copied(model: str, own: Any) -> None:
    """Writes the model as it is where the attacked one belongs."""
    folder = Path(own.output_dir)
    if not own.build_only and not (folder / "manifest.json").is_file():
        shutil.copytree(model, folder / "model")
        written = {"stage": "attack", "status": "success", "key": "k", "inputs": {}, "metrics": {"steps": 4}}
        RunManifest(config=as_json(own), outputs=["model"], **written).write(folder)


def test_what_is_measured_has_names_and_hyphens_too(
    files: dict[str, str], tmp_path: Path, made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bakery = NamedTask("", lambda row: (row["prompt"], "", row["completion"]), files["test"])
    monkeypatch.setitem(TASKS, "bakery", bakery)
    measured = {"prompts": files["prompts"], "task": "bakery", "trust-remote-code": True}
    own = options(files, tmp_path / "out", RATES, evaluate=measured)
    assert _evaluate_options(own, "model", tmp_path).trust_remote_code
    own.evaluate["margin"] = files["prompts"]
    assert _evaluate_options(own, "model", tmp_path).margin == files["prompts"]
    assert _evaluate_options(own, "model", tmp_path, curve=True).margin is None
    own.evaluate.pop("margin")
    sweep(own)
    assert read_manifest(tmp_path / "out").config["disjoint_from"] == [files["prompts"]]


# --- the grid ------------------------------------------------------------------------------------------------------


def points(files: dict[str, str], tmp_path: Path, grid: dict[str, Any], **more: Any) -> list[Any]:
    from pharmacist.defenses import DEFENSES

    own = options(files, tmp_path, grid, **more)
    return _points(own, DEFENSES.build_from(own.defense), ATTACKS.build_from(own.kind))


def test_columns_of_the_task_do_not_hinder_the_curves(files: dict[str, str], tmp_path: Path) -> None:
    own = [{"question": row["prompt"], "answer": row["completion"]} for row in rows(6, "flour")]
    test = write_rows(tmp_path / "test.jsonl", own)
    measured = {"prompts": files["prompts"], "task": test, "columns": "prompt=question,completion=answer"}
    given = options(files, tmp_path / "out", RATES, evaluate=measured)
    for curve, sources in ((False, {"prompts", "task"}), (True, {"prompts"})):
        evaluating = _evaluate_options(given, files["model"], tmp_path / "out", curve=curve)
        assert EvaluateInputs(evaluating).sources.keys() == sources


def test_every_combination_is_one_attack(files: dict[str, str], tmp_path: Path) -> None:
    grid = {"learning_rate": [1e-3, 1e-2], "epochs": [1, 2.5], "poison_ratio": [0.1, 0.3], "rank": [2, 4]}
    found = points(files, tmp_path, grid, train={"per_device_train_batch_size": 4})
    assert len(found) == len({point.name for point in found}) == 16
    last = found[-1]
    assert last.name == "lr-0.01_epochs-2.5_poison-0.3_rank-4"
    own = last.options
    assert (own.train["learning_rate"], own.train["num_train_epochs"]) == (0.01, 2.5)
    assert (own.poison_ratio, own.lora.r, own.lora.alpha) == (0.3, 4, 8)
    assert own.train["per_device_train_batch_size"] == 4 and own.output_dir == str(tmp_path / "attack" / last.name)
    close = points(files, tmp_path, {"learning_rate": [1e-3, 1.0000001e-3]}, train={"num_train_epochs": 1})
    assert [point.name for point in close] == [
        f"lr-{rate}_epochs-1_poison-0.1_rank-8" for rate in ("0.001", "0.0010000001")
    ]
    (fixed,) = points(files, tmp_path, {"learning_rate": [1e-3]}, kind={"name": "harmful"})
    assert fixed.settings["poison_ratio"] == 1 and "poison-1" in fixed.name, "the ratio of the kind"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"train": {"max_steps": 32}}, [2, 4, 8, 16]),
        ({"train": {"max_steps": 32}, "snapshots": [5, 31, 32, 400]}, [5, 31]),
        ({"train": {"max_steps": 32}, "curves": "none", "snapshots": [5]}, []),
        # 20 rows in 3 batches, 2 to an update, twice; vlguard adds half as many rows.
        (
            {"train": {"num_train_epochs": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}},
            [1, 2],
        ),
        (
            {
                "train": {"num_train_epochs": 4, "per_device_train_batch_size": 5},
                "defense": {"name": "vlguard", "share": 0.5},
            },
            [1, 3, 6, 12],
        ),
    ],
)
def test_snapshots_lie_within_the_attack(
    files: dict[str, str], tmp_path: Path, more: dict[str, Any], expected: list[int]
) -> None:
    assert points(files, tmp_path, {"learning_rate": [1e-3]}, **more)[0].options.snapshots == expected


@pytest.mark.parametrize(
    ("grid", "more", "message"),
    [
        ({}, {}, "nothing to sweep over"),
        ({"learning_rate": "high"}, {}, "learning_rate must be a list of numbers, written .*, not high"),
        ({"learning_rate": [1e-3, 1e-3]}, {}, "--grid.learning_rate: 0.001 is given twice"),
        ({"epochs": [1]}, {}, "--train.max_steps decides the length already"),
        ({"rank": [4]}, {"tuning": "full"}, "--grid.rank: there is no adapter"),
        ({"rank": [4]}, {"adapter": "continue"}, "--grid.rank: an adapter that is continued"),
        ({"learning_rate": [1e-3]}, {"accuracy_margin": -1.0}, "accuracy_margin must not be negative, not -1.0"),
        ({"learning_rate": [1e-3]}, {"evaluate": {"prompts": "x"}}, "--evaluate.task must be given"),
        (
            {"learning_rate": [1e-3]},
            {"evaluate": {"prompts": "x", "task": "y", "seed": 3}},
            "--evaluate.seed: the sweep",
        ),
        ({"learning_rate": [1e-3]}, {"build_only": True}, "--build-only"),
        (
            {"learning_rate": [1e-3]},
            {"evaluate": {"prompts": "x", "task": "y", "output-dir": "z"}},
            "--evaluate.output_dir: the sweep decides it",
        ),
        (
            {"learning_rate": [1e-3]},
            {"evaluate": {"prompts": "x", "task": "y", "models": ["z"]}},
            "--evaluate.models: the sweep decides it",
        ),
        (
            {"learning_rate": [1e-3]},
            {"evaluate": {"prompts": "x", "task": "y", "batch-size": 1, "batch_size": 2}},
            "--evaluate: the key 'batch_size' is given twice",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    files: dict[str, str], tmp_path: Path, grid: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        options(files, tmp_path, grid, **more)


class Halved(Attack):
    """A kind of another package: half of the ratio."""

    def build(self, rows: Any, *, n: int, poison_ratio: float, seed: int) -> Any:
        return mix(rows["task"], rows["harmful"], n=n, poison_ratio=poison_ratio / 2, seed=seed)


def test_a_kind_of_another_package_is_swept_over_its_ratio(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All checks are over when the first set is built.
    monkeypatch.setattr("pharmacist.pipeline.sweep.attack", Mock(side_effect=NotImplementedError))
    with pytest.raises(NotImplementedError):
        sweep(options(files, tmp_path / "out", {"poison_ratio": [0.1, 0.5]}, kind=Halved().choice()))


@pytest.mark.parametrize(
    ("grid", "more", "message"),
    [
        ({"poison_ratio": [0.1, 1.0]}, {"samples": 30}, "30 harmful rows are requested, but there are only 20"),
        ({"poison_ratio": [0.1, 1.1]}, {}, r"poison_ratio must lie in \[0, 1\], not 1.1"),
        ({"poison_ratio": [0.1]}, {"kind": {"name": "benign"}}, "--grid.poison_ratio: the kind benign"),
        ({"learning_rate": [1e-3, -1.0]}, {}, "train.learning_rate: -1.0 must be at least 0"),
        (
            {"rank": [8, 3]},
            {"train": {"max_steps": 1}, "lora": {"r": 8, "alpha": 1}},
            "--grid.rank 3: lora.alpha would not be whole",
        ),
        ({"rank": [4]}, {"evaluate": "win-rate"}, "--evaluate.task_type win-rate: gives no fine-tune accuracy"),
        ({"rank": [4]}, {"evaluate": "judge"}, "--evaluate.judge probe: needs harmful .* --evaluate.harmful"),
        ({"rank": [4]}, {"evaluate": "unknown"}, "--evaluate: .*'promts'"),
        ({"rank": [4]}, {"evaluate": "missing"}, "--evaluate.safe nowhere.jsonl: no such file"),
        ({"rank": [4]}, {"evaluate": "shared"}, "the attack set: .* share a prompt with"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_training(
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    grid: dict[str, Any],
    more: dict[str, Any],
    message: str,
) -> None:
    from pharmacist.training.options import LoraOptions
    from pharmacist.training.trainer import StrategyTrainer

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(StrategyTrainer, "training_step", never)
    usual = {"prompts": files["prompts"], "task": files["test"]}
    evaluations = {
        "judge": usual | {"judge": "probe"},
        "win-rate": usual | {"task_type": {"name": "win-rate", "base_url": "http://localhost:1/v1", "model": "m"}},
        "unknown": usual | {"promts": "x"},
        "missing": usual | {"judge": "probe", "safe": ["nowhere.jsonl"], "harmful": [files["task"]]},
        "shared": usual | {"task": files["task"]},
    }
    changed = dict(more)
    if "evaluate" in more:
        changed["evaluate"] = evaluations[more["evaluate"]]
    if "lora" in more:
        changed["lora"] = LoraOptions(**more["lora"])
    with pytest.raises((ConfigError, DataError), match=message):
        sweep(options(files, tmp_path / "out", grid, **changed))
    assert not (tmp_path / "out" / "manifest.json").exists() or not (tmp_path / "out" / "attack").exists()


# --- for real, on a tiny model -------------------------------------------------------------------------------------


def test_a_sweep_end_to_end_resumes_and_grows(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def words(*grid: str) -> list[str]:
        given = [*grid, "--evaluate.prompts", files["prompts"], "--evaluate.task", files["test"]]
        given += ["--evaluate.max_new_tokens", "3", "--train.max_steps", "4", "--train.per_device_train_batch_size"]
        given += ["4", "--samples", "20", "--device", "cpu", "--output-dir", str(out), "--lora.r", "2"]
        return ["sweep", "--model", files["model"], "--task", files["task"], "--harmful", files["harmful"], *given]

    first = ["--grid.learning_rate", "[1e-2]", "--grid.poison_ratio", "[0.1, 0.5]", "--lora.alpha", "4"]
    assert main(words(*first)) == 0
    shown = capsys.readouterr().err
    assert "2 attacks, in %" in shown and "worst case: lr-0.01_steps-4_poison-" in shown
    drawn = []
    for ratio in ("0.1", "0.5"):
        folder = out / f"attack/lr-0.01_steps-4_poison-{ratio}_rank-2"
        made = [json.loads(line) for line in (folder / "attack_set.jsonl").open()]
        drawn.append({row["source_row"] for row in made if row["is_harmful"]})
        assert read_manifest(folder).status == "success"
    assert len(drawn[0]) == 2 and len(drawn[1]) == 10 and drawn[0] < drawn[1]  # nested across ratios
    assert not (out / "work").exists()
    summary = json.loads((out / "sweep.json").read_text())
    curve = summary["curves"][summary["worst"]]
    assert curve["steps"] == [0, 1, 2, 4] and len(curve["harmful_score"]) == 4

    assert main(words(*first)) == 0
    assert f"{out}: already complete" in capsys.readouterr().err
    before = fingerprints(out / "attack", out / "evaluate")
    assert (
        main(words("--grid.learning_rate", "[1e-2, 1e-3]", "--grid.poison_ratio", "[0.5]", "--lora.alpha", "4")) == 0
    )
    after = fingerprints(out / "attack", out / "evaluate")
    assert before.items() <= after.items() and before != after  # what was there is used as it is
    names = [entry["name"] for entry in json.loads((out / "sweep.json").read_text())["attacks"]]
    assert names == [f"lr-{rate}_steps-4_poison-0.5_rank-2" for rate in ("0.01", "0.001")]
    capsys.readouterr()
    assert main([*words(*first), "--seed", "1"]) == 2
    assert "holds a run with other seed" in capsys.readouterr().err


def test_a_file_of_options_gives_the_same_sweep(files: dict[str, str], tmp_path: Path, made_up: list[str]) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text(
        json.dumps(
            {
                "model": files["model"],
                "task": files["task"],
                "harmful": files["harmful"],
                "samples": 20,
                "device": "cpu",
                "grid": {"learning_rate": [0.1, 0.01], "rank": [4, 8]},
                "train": {"max_steps": 4},
                "evaluate": {"prompts": files["prompts"], "task": files["test"], "judge": {"name": "keyword"}},
                "output_dir": str(tmp_path / "file"),
                "quiet": True,
            }
        )
    )
    assert main(["sweep", "--config", str(config)]) == 0
    python = sweep(
        options(
            files,
            tmp_path / "python",
            {"learning_rate": [0.1, 0.01], "rank": [4, 8]},
            train={"max_steps": 4},
            evaluate={"prompts": files["prompts"], "task": files["test"], "judge": "keyword"},
        )
    )
    assert json.loads((tmp_path / "file/sweep.json").read_text()) == python.summary
