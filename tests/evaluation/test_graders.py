import math
import time
from dataclasses import dataclass, field

import pytest

from pharmacist.core.errors import DataError, UnknownNameError
from pharmacist.evaluation.graders import GRADERS, Grade, GradeItem, Grader, detect_grader
from pharmacist.evaluation.graders.base import Matching
from pharmacist.evaluation.graders.number import published_number, readings


TARGETS = {
    "classification": ["positive", "negative", "positive", "negative"],
    "exact": ["the oven is warm", "water the seeds in spring", "no"],
    "number": ["2 + 3 = 5. The final answer is: 5", "so 1,200\n#### 1200", "The final answer is:  0.4"],
}


def prepared(name: str, targets: list[str]) -> Grader:
    task = GRADERS.build(name, {})
    task.prepare([{"prompt": "x", "completion": target} for target in targets])
    return task


def graded(task: Grader, targets: list[str], answers: list[str]) -> list[Grade]:
    return task.grade([GradeItem("x", *pair) for pair in zip(targets, answers, strict=True)])


def test_every_kind_is_looked_at() -> None:
    assert sorted([*TARGETS, "win-rate"]) == GRADERS.names()


@pytest.mark.parametrize("name", TARGETS)
def test_gold_is_right_and_silence_wrong(name: str) -> None:
    task, targets = prepared(name, TARGETS[name]), TARGETS[name]
    assert graded(task, targets, targets) == [Grade(True, True)] * len(targets)
    assert graded(task, targets, [f"  {target}\n" for target in targets]) == [Grade(True, True)] * len(targets)
    assert graded(task, targets, [""] * len(targets)) == [Grade(False, False, name == "exact")] * len(targets)
    assert task.grade([]) == []


@pytest.mark.parametrize("name", TARGETS)
def test_the_kind_is_found_from_the_targets(name: str) -> None:
    assert detect_grader(TARGETS[name]) == name


def test_labels_that_do_not_repeat_are_texts() -> None:
    assert detect_grader(["#### Step 1", "#### Step 2"]) == "exact"
    assert detect_grader(["a", "b", "c"]) == "exact"
    assert detect_grader(["same", "same", "same"]) == "exact"


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_of_another_kind_is_named_by_its_row_in_the_file(name: str) -> None:
    rows = [{"prompt": "x", "completion": text, "row": 7 + i} for i, text in enumerate([TARGETS[name][0], " "])]
    with pytest.raises(DataError, match="--task: row 8 has"):
        GRADERS.build(name, {}).prepare(rows)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'classification'"):
        GRADERS.get("clasification")


def test_naming_both_labels_is_right_only_for_published_matching() -> None:
    task = prepared("classification", ["positive", "negative"])
    answers = ["positive", "Positive", "positive.", "positive or negative", "not positive", "negative", "posit"]
    grades = graded(task, ["positive"] * len(answers), answers)
    assert [grade.correct for grade in grades] == [True, True, True, False, False, False, False]
    assert [grade.published for grade in grades] == [True, True, True, True, True, False, False]
    accuracy = task.metrics(grades, unanswered=2)["fine_tune_accuracy"]
    assert (accuracy["count"], accuracy["n"], accuracy["unanswered"]) == (3, 7, 2)
    assert (accuracy["published"]["count"], accuracy["published"]["matching"]) == (5, "substring")
    assert accuracy["labels"] == ["negative", "positive"]
    assert [grade.form for grade in grades] == [True, True, True, False, False, True, False]
    assert accuracy["without_form"] == 3


def test_a_label_with_a_slash_counts_whole() -> None:
    task = prepared("classification", ["World", "Sci/Tech", "World", "Sci/Tech"])
    # A published matcher asked for "sci", which no answer with the label's own name equals.
    grades = graded(task, ["Sci/Tech"] * 3, ["Sci/Tech", "sci", "sci/tech"])
    assert grades == [(True, True, True), (False, False, False), (True, True, True)]


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("classification", ["a", " "], "row 1 has an empty label"),
        ("classification", ["a", "A."], "same label"),
        ("exact", ["x", "\n"], "row 1 has an empty target"),
        ("number", ["5", "five"], "row 1 has no number"),
    ],
)
def test_targets_that_do_not_fit_are_refused(name: str, targets: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(name, targets)


@pytest.mark.parametrize(
    ("text", "ours", "published"),
    [
        ("The final answer is: 72", 72, 72),
        ("The final answer is:  1248", 1248, 1248),
        ("The final answer is:7", 7, 7),  # no space after the marker: the published rule takes the last number instead
        ("first 3. The final answer is: 10 apples out of 12", 10, 10),
        ("The final answer is: 1,234.5", 1234.5, 1234.5),
        ("It is 5-3", 3, -3),  # a hyphen is no sign
        ("x = -3", -3, -3),
        ("he has 4 of 9.", 9, 9),
        ("$.40", 0.4, 40),
        ("3 + 4\n#### 7 and 2 left over", 7, 2),
        ("no digits at all", None, math.inf),
        ("", None, math.inf),
        ("The final answer is: unknown, maybe 6", 6, 6),
        ("The final answer is:", None, math.inf),
        ("#### 5 is wrong, so\n#### 7", 7, 7),
        ("The final answer is: 3. No: The final answer is: 4", 4, 3),
        ("#### 4\nThe final answer is:", 4, 4),
        (r"so \boxed{8{,}000}, as 2 cases show", 8000, 2),
        (r"\boxed{-8\,000}", -8000, 0),
        ("it is \N{MINUS SIGN}5", -5, 5),
        ("-$5", -5, 5),
        ("$-5", -5, -5),
        (r"\$-5.50", -5.5, -5.5),
        ("\N{EN DASH}\N{EURO SIGN}12,50", -12.5, 1250),
        ("pages 3\N{EN DASH}5", 5, 5),
        ("1,234,567.89", 1234567.89, 1234567.89),
        ("1.234.567,89", 1234567.89, 0.56789),
        ("1 234 567", 1234567, 567),
        ("1\N{NARROW NO-BREAK SPACE}234,5", 1234.5, 2345),
        ("1'234", 1234, 234),
        ("12,34,567", 1234567, 1234567),
        ("3,5", 3.5, 35),
        ("1,2,3", 3, 123),
        ("0,125", 0.125, 125),
        ("1.5e3", 1500, 3),
        ("\N{ARABIC-INDIC DIGIT SEVEN}", 7, 7),
        ("#### Step 2: multiply\n4*5 = 20. So she has 20 apples.", 20, 20),
        ("#### 1. Compute\n4*5 = 20\n#### 2) Answer\nShe has 20.", 20, 20),
        ("#### **(2) Answer**\nShe has 20.", 20, 20),
        ("#### **18** of 20", 18, 20),
        ("#### US$18.\nIt costs 20", 18, 20),
        (r"\boxed{2,\!125}", 2125, 125),
        ("- $5", -5, 5),
        ("-US$5", -5, 5),
        ("10 - $5", 5, 5),
        ("they are:\n- $5", 5, 5),
    ],
)
def test_final_numbers(text: str, ours: float | None, published: float) -> None:
    assert next(iter(readings(text)), None) == ours
    if "1.234.567" not in text:  # which the published rule tears apart
        assert published_number(text) == published


@pytest.mark.parametrize(
    ("target", "answer", "right"),
    [
        ("#### 8000", "8.000", True),
        ("#### 8000", "8 000 apples", True),
        ("#### 8", "8.000", True),
        ("#### 1.234", "1,234", True),
        ("#### 8000", "8.0", False),
        ("#### 8000", "80.00", False),
        ("#### 1234567", "1.234.56", False),
        ("#### 5", "-5", False),
        ("#### -5", "-$5", True),
        ("#### 5", "5\n#### 6", False),
        ("#### 300", "it is 10 200 300", True),
        ("#### 200", "it is 10 200 300", False),
        ("#### 1,200", "1.2", False),
        ("#### 1,200", "1,200", True),
    ],
)
def test_numbers_in_the_writing_of_other_places(target: str, answer: str, right: bool) -> None:
    (grade,) = graded(prepared("number", [target, "#### 1"]), [target], [answer])
    assert (grade.correct, grade.form) == (right, True)


def test_a_long_answer_is_searched_in_no_time() -> None:
    for part in ("1,11", ",11", "1 111 ", "####", "-$", "1.111", r"\boxed{", "1,"):
        start = time.process_time()
        readings(part * 20_000)
        assert time.process_time() - start < 10, part


@pytest.mark.parametrize(
    "answer",
    [
        "**positive**",
        "__Positive__",
        "*positive*.",
        "`positive`",
        '"positive"',
        "\u201cPositive.\u201d",
        "<b>positive</b>",
        r"\boxed{positive}",
        r"$\boxed{\text{Positive}}$",
        "# Positive",
        "- positive",
        "> **positive**",
        "```\npositive\n```",
        "```text\npositive```",
        "<answer>positive</answer>",
        "~~positive~~",
    ],
)
def test_labels_in_markup(answer: str) -> None:
    task = prepared("classification", ["positive", "negative", "positive"])
    (grade,) = graded(task, ["positive"], [answer])
    assert grade == (True, True, True)
    assert graded(task, ["negative"], [answer])[0].correct is False


def test_labels_that_look_like_markup_stay_apart() -> None:
    labels = ["-1", "1", "c", "c#", "c++", "*", "_a"]
    task = prepared("classification", labels)
    for label in labels:
        right = [graded(task, [target], [label])[0].correct for target in labels]
        assert right == [target == label for target in labels], label


@dataclass
class NearConfig:
    similarity: float = 0.8
    words: list[str] = field(default_factory=list)


class Near(Matching):
    Config = NearConfig
    version = 2
    matching = ("near", "contained")

    def right(self, target: str, answer: str) -> Grade:
        return Grade(target == answer, target in answer)


def test_a_grader_with_other_options_has_another_label() -> None:
    assert Near().label == Near(similarity=0.8, words=[]).label == "near@2"
    assert len({Near().label, Near(similarity=0.5).label, Near(similarity=0.6).label, Near(words=["a"]).label}) == 4
