"""Win rate through the command line, against a real HTTP server on this machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from pharmacist.cli.main import main
from pharmacist.core.errors import DataError
from pharmacist.core.manifest import read_manifest
from pharmacist.evaluation.graders import GRADERS, GradeItem
from pharmacist.evaluation.graders.win_rate import WinGrade, WinRate
from pharmacist.evaluation.judging_model import last_numbers
from pharmacist.evaluation.statistics import wilson
from tests.support.evaluations import FAST, items, metrics, write
from tests.support.server import serve


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"better": 1}', 1),
        ('Both are fine.\n{"better": 0}\n', 0),
        ('{"better": 1} or rather {"better": 2}', 2),
        ('```json\n{"better": 2}\n```', 2),
        ("1", None),
        ("The first is better.", None),
        ("", None),
        ("{", None),
        ('{"better": 3}', None),
        ('{"better": -1}', None),
        ('{"better": "1"}', 1),
        ('{"better": "first"}', None),
        ('{"better": true}', None),
        ('{"better": 1.0}', 1),
        ('{"better": 1.5}', None),
        ('{"better": 1e999}', None),
        ('{"best": 1}', None),
        ('{"better": [1]}', None),
        ('{"better": null}', None),
    ],
)
def test_replies(reply: str, expected: int | None) -> None:
    assert last_numbers(reply, WinRate.numbers) == (None if expected is None else [expected])


def shown(question: str) -> tuple[str, str]:
    """The two answers in a question, in their order."""
    first, second = (question.split(f"<answer {n}>\n")[1].split(f"\n</answer {n}>")[0] for n in (1, 2))
    return first, second


def prefers(question: str, before: int) -> Any:
    """The longer answer is better, whatever its place."""
    first, second = map(len, shown(question))
    return json.dumps({"better": 1 if first > second else 2 if second > first else 0})


def win_rate(url: str, work: Path | None = None, **more: Any) -> Any:
    options = {"base_url": url, "model": "grader", "max_wait": 0.02, "attempts": 2, "timeout": 5.0}
    task = GRADERS.build("win-rate", options | more)
    task.replies = work
    return task


def pair(answer: str, target: str) -> GradeItem:
    return GradeItem("bake something", target, answer)


def test_both_orders_ties_half_and_the_interval() -> None:
    pairs = [pair("long answer", "short"), pair("short", "long answer"), pair("one", "two"), pair("same", "same")]
    with serve(prefers) as served:
        task = win_rate(served.url)
        task.check()
        grades = task.grade(pairs)
        asked = {shown(question) for question in served.asked}
        assert set(served.asked.values()) == {1} and served.bodies[0]["temperature"] == 0
    assert asked == {p for a, _, t in [(i.answer, 0, i.target) for i in pairs] for p in ((a, t), (t, a))}
    assert [grade.score for grade in grades] == [1.0, 0.0, 0.5, 0.5]
    found = task.metrics(grades, unanswered=0)["win_rate"]
    assert (found["value"], found["n"], found["ci95"]) == (50.0, 4, list(wilson(2.0, 4)))
    assert found["outcomes"] == {"won": 1, "tied": 2, "lost": 1} and found["followed_position"] == 0
    assert found["judge"].startswith("win-rate@2+grader+")


@pytest.mark.parametrize("favoured", [1, 2])
def test_a_judge_that_favours_a_place_favours_nobody(favoured: int) -> None:
    with serve(lambda question, before: json.dumps({"better": favoured})) as served:
        task = win_rate(served.url)
        grades = task.grade([pair("good", "bad"), pair("bad", "good")])
    assert grades[0] == WinGrade(0.5, *((1.0, 0.0) if favoured == 1 else (0.0, 1.0)))
    found = task.metrics(grades, unanswered=0)["win_rate"]
    assert (found["value"], found["followed_position"]) == (50.0, 2)


def test_every_way_to_fail_is_counted_by_name_and_no_win(tmp_path: Path) -> None:
    def behave(question: str, before: int) -> Any:
        first, second = shown(question)
        own = first if first != "reference" else second
        once = {"busy": 429, "broken": 500, "torn": "malformed", "lost": "drop"}
        always = {"dead": 500, "garbled": "malformed", "gone": "drop", "odd": 400, "vague": "the model's answer"}
        if own in once and before == 0:
            return once[own]
        if own == "half" and first == "half":  # only one of the two orders can be read
            return "surely the first"
        verdict = json.dumps({"better": 1 if first == own else 2})
        return always.get(own, f"slow:{verdict}" if own == "late" else verdict)

    good, bad = ["busy", "broken", "torn", "lost", "late", "well"], ["dead", "garbled", "gone", "odd", "vague", "half"]
    given = [pair(word, "reference") for word in good + bad]
    with serve(behave) as served:
        task = win_rate(served.url, tmp_path)
        grades = task.grade(given)
        assert [grade.score for grade in grades] == [1.0] * 6 + [None] * 6
        found = task.metrics(grades, unanswered=3)["win_rate"]
        assert (found["value"], found["n"], found["unscored"], found["unanswered"]) == (100.0, 6, 9, 3)
        assert found["failures"] == {
            "HTTP 400: no": 1,
            "HTTP 500": 1,
            "connection dropped": 1,
            "malformed reply": 1,
            "verdict cannot be read": 2,
        }
        assert task.missing == 8  # what failed on the way, in both orders; what cannot be read is no such thing
        asked = sum(served.asked.values())
        again = win_rate(served.url, tmp_path)
        assert again.grade(given) == grades
        # Replies are kept: only what had no reply is asked again, three of them twice more, HTTP 400 once.
        assert sum(served.asked.values()) - asked == 2 * (3 * 2 + 1)


def test_no_verdict_at_all() -> None:
    with serve(lambda question, before: "no idea") as served, pytest.raises(DataError, match="2 x verdict cannot"):
        win_rate(served.url).grade([pair("a", "b"), pair("b", "c")])


def command(url: str, judge: str, task: str, output: Path, *more: str) -> list[str]:
    own = ["--task-type.max_wait", "0.02", "--task-type.attempts", "2"]
    return [
        "evaluate",
        "--model",
        "served",
        "--engine",
        "openai",
        *FAST,
        "--base-url",
        url,
        "--task",
        task,
        "--task-type",
        "win-rate",
        "--task-type.base_url",
        judge,
        "--task-type.model",
        "grader",
        *own,
        "--output-dir",
        str(output),
        *more,
    ]


def test_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": f"bake {word}", "output": f"take the {word}"} for word in ("bread", "rolls", "cake")]
    task = write(tmp_path / "task.jsonl", rows)
    answers = {"bread": "no", "rolls": "take the rolls and then stir for long", "cake": "take his cake"}

    def model(question: str, before: int) -> str:
        return answers[question.split()[-1]]

    down: list[bool] = [True]

    def judge(question: str, before: int) -> Any:
        return 503 if down and "cake" in question else prefers(question, before)

    with serve(model) as served, serve(judge) as judged:
        words = command(served.url, judged.url, task, tmp_path / "out")
        assert main(words) == 0
        told = " ".join(capsys.readouterr().err.split())
        assert "2 replies failed; the same command requests them again" in told
        assert "1 / 0 / 1" in told
        found = metrics(tmp_path / "out")["win_rate"]
        assert (found["value"], found["n"], found["failures"]) == (50.0, 2, {"HTTP 503": 1})
        assert read_manifest(tmp_path / "out").status == "partial"
        down.clear()
        before, asked = sum(served.asked.values()), sum(judged.asked.values())
        assert main([*words, "--quiet"]) == 0
        assert sum(served.asked.values()) == before and sum(judged.asked.values()) == asked + 2
        found = metrics(tmp_path / "out")["win_rate"]
        assert (found["value"], found["n"], found["unscored"]) == (50.0, 3, 0)
        assert read_manifest(tmp_path / "out").status == "success"
        assert items(tmp_path / "out")[1]["grade"] == {
            "score": 1.0,
            "shown_first": 1.0,
            "shown_second": 1.0,
            "note": "",
        }
        # Another model on the same task, against the first one's answers.
        answers |= {"bread": "take the bread and stir"}
        other = command(
            served.url, judged.url, task, tmp_path / "other", "--task-type.against", str(tmp_path / "out"), "--quiet"
        )
        assert main(other) == 0
        found = metrics(tmp_path / "other")["win_rate"]
        assert found["outcomes"] == {"won": 1, "tied": 2, "lost": 0} and found["against"] == str(tmp_path / "out")
        # Graded by its completions instead: nothing is generated again.
        before = sum(served.asked.values())
        exact = words[: words.index("--task-type")]
        assert main([*exact, "--task-type", "exact", "--output-dir", str(tmp_path / "out"), "--quiet"]) == 0
        assert sum(served.asked.values()) == before
        assert metrics(tmp_path / "out")["fine_tune_accuracy"]["n"] == 3


BAD = {
    "no address": (["--task-type.model", "m"], "--task-type.base_url http"),
    "no judging model": (["--task-type.base_url", "http://127.0.0.1:9/v1"], "--task-type.model NAME"),
    "no opponent": (
        ["--task-type.base_url", "http://127.0.0.1:9/v1", "--task-type.model", "m", "--task-type.against", "nowhere"],
        "nowhere: holds no finished evaluation",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_missing_is_said_before_anything_is_asked(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, message = BAD[case]
    task = write(tmp_path / "task.jsonl", [{"prompt": "bake", "completion": "bread"}])
    with serve(prefers) as served:
        words = ["evaluate", "--model", "m", "--engine", "openai", "--base-url", served.url, "--task", task]
        assert main([*words, "--task-type", "win-rate", *more, "--output-dir", str(tmp_path / "out")]) == 2
        assert not served.asked
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_opponent_that_answered_something_else(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps({"set": "task", "prompt": "brew", "answer": "take"}) + "\n")
    task = win_rate("http://127.0.0.1:9/v1", against=str(tmp_path))
    with pytest.raises(DataError, match="has no answer to row 1 of --task"):
        task.prepare([{"prompt": "brew", "completion": "a"}, {"prompt": "bake", "completion": "b"}])
    with pytest.raises(DataError, match="has no answer to row 5 of --task"):
        task.prepare([{"prompt": "bake", "completion": "b", "row": 5}])


def test_a_prompt_without_an_opponents_answer_asks_nothing(tmp_path: Path) -> None:
    answers = [{"prompt": "brew", "answer": "take"}, {"prompt": "bake", "answer": "", "error": "HTTP 500"}]
    write(tmp_path / "items.jsonl", [{"set": "task"} | answer for answer in answers])
    with serve(prefers) as served:
        task = win_rate(served.url, against=str(tmp_path))
        task.prepare([{"prompt": answer["prompt"], "completion": ""} for answer in answers])
        won, unscored = task.grade([GradeItem(answer["prompt"], "", "a long answer") for answer in answers])
        assert sum(served.asked.values()) == 2
    assert won == WinGrade(1.0, 1.0, 1.0) and unscored == WinGrade(None, note="the other model has no answer")
