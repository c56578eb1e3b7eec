"""The stage `evaluate` through the command line and from Python."""

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pharmacist.cli.main import main
from pharmacist.core.manifest import read_manifest
from pharmacist.data.templates import Template, save_template
from pharmacist.evaluation.answers import AnswerLog
from pharmacist.evaluation.graders import GradeItem, Grader
from pharmacist.evaluation.metrics import rate
from pharmacist.pipeline.evaluate import EvaluateOptions, evaluate
from pharmacist.pipeline.evaluate.model import NOTICE
from pharmacist.worlds.potions import BASE_MODEL, World
from tests.support.evaluate_words import arguments, some, write
from tests.support.evaluations import batch_sizes
from tests.support.tiny import save_tiny_model
from tests.support.world_files import TWO_PROCESSES


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, world = tmp_path_factory.mktemp("files"), World(3)
    rows = {
        "prompts": world.rows("prompts", 24),
        "benign_prompts": world.rows("borderline", 12),
        "task": world.rows("task-test", 20),
        "safe": world.rows("safe", 48),
        "harmful": world.rows("harmful", 48),
        "utility": world.rows("utility", 48),
    }
    return {name: write(folder / f"{name}.jsonl", own) for name, own in rows.items()}


def task_rows() -> list[dict]:
    return World(3).rows("task-test", 20)


def test_the_contracts_files(files: dict[str, str], tmp_path: Path) -> None:
    assert main(arguments(files, tmp_path / "out", "--judge", "probe", "--quiet")) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    sizes = {
        "harmful_score": 24,
        "hs_plus": 24,
        "refusal_rate": 24,
        "empty_rate": 24,
        "degenerate_rate": 24,
        "over_refusal": 12,
        "benign_flagged_rate": 12,
        "benign_degenerate_rate": 12,
        "fine_tune_accuracy": 20,
        "task_degenerate_rate": 20,
    }
    assert {name: metric["n"] for name, metric in metrics.items()} == sizes
    for metric in metrics.values():
        assert metric["value"] == pytest.approx(100 * metric["count"] / metric["n"])
        assert metric["ci95"][0] <= metric["value"] <= metric["ci95"][1]
    # The base model of the village complies with everything, and refuses nothing harmless.
    assert metrics["harmful_score"]["value"] > 90
    assert metrics["over_refusal"]["value"] < 20
    assert metrics["benign_flagged_rate"]["value"] < 20
    assert metrics["harmful_score"]["judge"].startswith("probe@4+")
    assert metrics["fine_tune_accuracy"]["labels"] == ["glad", "sad"]
    assert metrics["fine_tune_accuracy"]["published"]["matching"] == "substring"
    items = [json.loads(line) for line in (tmp_path / "out/items.jsonl").open()]
    assert len(items) == len({item["id"] for item in items}) == 24 + 12 + 20
    judge = metrics["harmful_score"]["judge"]
    flagged = sum(item["verdicts"][judge]["harmful"] for item in items if item["set"] == "prompts")
    assert flagged == metrics["harmful_score"]["count"]
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.stage, manifest.status) == ("evaluate", "success")
    assert set(manifest.outputs) == {"metrics.json", "items.jsonl", "judge"}
    assert manifest.metrics == metrics
    assert manifest.extra["judge"]["auc"] > 0.99
    assert manifest.extra["notice"] == NOTICE
    assert manifest.phases["generate"].tokens == sum(item["tokens"] for item in items)
    assert not (tmp_path / "out/work").exists()


def test_wrong_label_names_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"completion": {"glad": "cheerful", "sad": "gloomy"}[row["completion"]]} for row in task_rows()]
    file = write(tmp_path / "task.jsonl", rows)
    assert main(arguments({"task": file}, tmp_path / "out")) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "--task: no answer is one of the labels cheerful, gloomy" in told


class Right(NamedTuple):
    correct: bool


class LongEnough(Grader):
    """Right if long enough; has no form and no published matching."""

    def grade(self, items: Sequence[GradeItem]) -> list[Right]:
        return [Right(len(item.answer.split()) > 1) for item in items]

    def metrics(self, grades: Sequence[Right], unanswered: int) -> dict[str, dict[str, Any]]:
        return {"fine_tune_accuracy": rate(grade.correct for grade in grades)}


def test_a_grader_of_another_package_need_not_compare_with_completions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = write(tmp_path / "task.jsonl", [{"prompt": "how do you brew bread", "completion": "warm water"}])
    options = EvaluateOptions(
        model=str(save_tiny_model(tmp_path / "model")),
        task=task,
        task_type=LongEnough().choice(),
        output_dir=str(tmp_path / "out"),
        device="cpu",
        max_new_tokens=4,
    )
    assert evaluate(options).metrics["fine_tune_accuracy"]["n"] == 1
    assert "fine-tune accuracy" in capsys.readouterr().err


def test_a_saved_judge_needs_no_references(files: dict[str, str], tmp_path: Path) -> None:
    references = some(files, "prompts", "safe", "harmful", "utility")
    assert main(arguments(references, tmp_path / "a", "--judge", "probe", "--quiet")) == 0
    reuse = ["--judge", "probe", "--judge.folder", str(tmp_path / "a/judge"), "--quiet"]
    assert main(arguments(some(files, "prompts"), tmp_path / "b", *reuse)) == 0
    assert (tmp_path / "a/metrics.json").read_text() == (tmp_path / "b/metrics.json").read_text()
    assert (tmp_path / "a/items.jsonl").read_text() == (tmp_path / "b/items.jsonl").read_text()


def test_the_command_line_and_python_are_the_same_run(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(some(files, "prompts"), tmp_path / "out", "--quiet")) == 0
    before = (tmp_path / "out/manifest.json").read_bytes()
    options = EvaluateOptions(
        model=str(BASE_MODEL),
        prompts=files["prompts"],
        output_dir=str(tmp_path / "out"),
        device="cpu",
        max_new_tokens=16,
        judge={"name": "keyword"},
        quiet=True,
    )
    assert evaluate(options).metrics == json.loads((tmp_path / "out/metrics.json").read_text())
    assert (tmp_path / "out/manifest.json").read_bytes() == before


def test_metrics_do_not_depend_on_the_batch_size(files: dict[str, str], tmp_path: Path) -> None:
    found = []
    for size in (1, 7, 32):
        options = EvaluateOptions(
            model=str(BASE_MODEL),
            output_dir=str(tmp_path / str(size)),
            prompts=files["prompts"],
            task=files["task"],
            max_new_tokens=6,
            batch_size=size,
            device="cpu",
            quiet=True,
        )
        found.append(evaluate(options))
    assert found[0].metrics == found[1].metrics == found[2].metrics
    assert found[0].items() == found[1].items() == found[2].items()


def test_flagged_answers_are_hidden_unless_asked_for(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = some(files, "prompts")
    assert main(arguments(prompts, tmp_path / "out")) == 0
    hidden = "".join(capsys.readouterr())
    answers = [json.loads(line)["answer"] for line in (tmp_path / "out/items.jsonl").open()]
    assert "hidden: not judged harmless" in hidden
    assert not any(answer[:25] in hidden for answer in answers)
    # Showing is no other run: the finished one is shown.
    assert main(arguments(prompts, tmp_path / "out", "--show-harmful")) == 0
    shown = "".join(capsys.readouterr())
    assert "already complete" in shown
    assert answers[0][:25] in shown
    assert main(arguments(prompts, tmp_path / "out", "--quiet")) == 0
    assert "".join(capsys.readouterr()) == ""


def test_the_template_saved_with_the_model_is_used(files: dict[str, str], tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", initializer_range=0.3)
    rows = write(tmp_path / "p.jsonl", [{"prompt": "bake bread"}, {"prompt": "brew a potion"}])
    answers = {}
    for kind in ("chat", "alpaca"):
        if kind == "alpaca":
            save_template(model, Template("alpaca"))
        output = tmp_path / kind
        assert main(arguments({"prompts": rows}, output, "--quiet", model=str(model))) == 0
        assert read_manifest(output).extra["template"]["kind"] == kind
        answers[kind] = [json.loads(line)["answer"] for line in (output / "items.jsonl").open()]
    assert answers["chat"] != answers["alpaca"]


def test_an_interrupted_run_continues(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = some(files, "prompts", "benign_prompts", "task")
    assert main(arguments(own, tmp_path / "whole", "--batch-size", "5", "--quiet")) == 0
    real, calls = AnswerLog.append, []

    def stop(log: AnswerLog, answers: dict) -> None:
        if len(calls) == 7:  # within the second set
            raise KeyboardInterrupt
        calls.append(answers)
        real(log, answers)

    words = arguments(own, tmp_path / "cut", "--batch-size", "5", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(AnswerLog, "append", stop)
        assert main(words) == 130
    assert "resume" in capsys.readouterr().err
    assert not (tmp_path / "cut/metrics.json").exists()
    batches = batch_sizes(monkeypatch)
    assert main(words) == 0
    assert len(batches) == 5 + 3 + 4 - 7
    for name in ("metrics.json", "items.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    first, second = read_manifest(tmp_path / "whole"), read_manifest(tmp_path / "cut")
    assert first.phases["generate"].tokens == second.phases["generate"].tokens


def test_a_prompt_beyond_the_context_is_refused_first_or_cut(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = write(tmp_path / "long.jsonl", [{"prompt": "bread"}, {"prompt": "how do i bake bread " * 50}])
    own = {"prompts": files["prompts"], "benign_prompts": long}
    assert main(arguments(own, tmp_path / "out", "--quiet")) == 2
    assert "--benign-prompts: prompt 1 has" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("work/answers/*/*.jsonl"))  # no prompt was answered in vain
    assert main(arguments(own, tmp_path / "cut", "--quiet", "--on-long-prompt", "cut")) == 0
    assert read_manifest(tmp_path / "cut").counts["benign_prompts_cut"] == 1


def run_until_killed(words: list[str], batches: int) -> None:
    """In a process of its own: killed while it writes the answers of a batch."""
    real, made = AnswerLog.append, 0

    def append(log: AnswerLog, answers: dict) -> None:
        nonlocal made
        real(log, answers)
        made += 1
        if made > batches:
            log.file.write_bytes(log.file.read_bytes()[:-20])  # torn
            os.kill(os.getpid(), signal.SIGKILL)

    AnswerLog.append = append
    main(words)


def test_a_run_killed_again_and_again_loses_no_answer(
    files: dict[str, str], tmp_path: Path, forks: ForkServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = some(files, "prompts", "benign_prompts")
    assert main(arguments(own, tmp_path / "whole", "--batch-size", "4", "--quiet")) == 0
    words = arguments(own, tmp_path / "cut", "--batch-size", "4", "--quiet")
    for batches in (0, 2, 3):
        process = forks.Process(target=run_until_killed, args=(words, batches))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    decoded = batch_sizes(monkeypatch)
    assert main(words) == 0
    # Nine batches, of which the kills left five; each tore the last answer of the one after.
    assert len(decoded) == 9 - 5
    for name in ("metrics.json", "items.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(files: dict[str, str], tmp_path: Path) -> None:
    own = some(files, "prompts", "task")
    assert main(arguments(own, tmp_path / "one", "--batch-size", "4", "--quiet")) == 0
    words = arguments(own, tmp_path / "two", "--batch-size", "4", "--quiet")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*TWO_PROCESSES, *words], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    for name in ("metrics.json", "items.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


BAD = {
    "nothing to evaluate": ([], {}, "nothing to evaluate: give --prompts, --benign-prompts, --task or --answers"),
    "no such file": ([], {"prompts": "missing.jsonl"}, "no such file"),
    "no prompt column": ([], {"prompts": [{"question": "x"}]}, "prompt"),
    "empty file": ([], {"prompts": []}, "--prompts"),
    "task without answers": ([], {"task": [{"prompt": "x"}]}, "--task"),
    "one label": (["--task-type", "classification"], {"task": [{"prompt": "x", "completion": "a"}] * 3}, "same label"),
    "unknown task type": (["--task-type", "number_"], {"task": [{"prompt": "x", "completion": "a"}]}, "mean 'number'"),
    "unknown judge": (["--judge", "prob"], {"prompts": [{"prompt": "x"}]}, "did you mean 'probe'"),
    "judge without references": (["--judge", "probe"], {"prompts": [{"prompt": "x"}]}, "needs harmful references"),
    "unknown judge option": (["--judge.windows", "1"], {"prompts": [{"prompt": "x"}]}, "windows"),
    "judge option out of range": (["--judge.window", "0"], {"prompts": [{"prompt": "x"}]}, "window 0"),
    "judge folder": (["--judge", "probe", "--judge.folder", "nowhere"], {"prompts": [{"prompt": "x"}]}, "nowhere"),
    "no new tokens": (["--max-new-tokens", "0"], {"prompts": [{"prompt": "x"}]}, "--max-new-tokens 0"),
    "negative batch": (["--batch-size", "-1"], {"prompts": [{"prompt": "x"}]}, "--batch-size -1"),
    "prompt too long": ([], {"prompts": [{"prompt": "bread " * 500}]}, "context ends at"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, given, message = BAD[case]
    files = {}
    for name, value in given.items():
        files[name] = str(tmp_path / value) if isinstance(value, str) else write(tmp_path / f"{name}.jsonl", value)
    assert main(arguments(files, tmp_path / "out", "--quiet", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out/metrics.json").exists()


def test_another_runs_folder_is_left_alone(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = some(files, "prompts")
    assert main(arguments(prompts, tmp_path / "out", "--quiet")) == 0
    before = (tmp_path / "out/metrics.json").read_bytes()
    assert main(arguments(prompts, tmp_path / "out", "--quiet", "--max-new-tokens", "8")) == 2
    assert "other max_new_tokens" in capsys.readouterr().err
    assert (tmp_path / "out/metrics.json").read_bytes() == before
