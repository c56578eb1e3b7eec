"""The base classes of graders."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from pharmacist.core.errors import DataError
from pharmacist.core.method import Method
from pharmacist.evaluation.decider import Decider


class GradeItem(NamedTuple):
    """A prompt, its right or reference answer, and a model's answer to it."""

    prompt: str
    target: str
    answer: str


class Grade(NamedTuple):
    """Whether an answer is right.

    Attributes:
        correct: Whether it is right by the strict matching of this package.
        published: Whether it is right by the looser matching of published evaluations, for comparison with their
            figures.
        form: Whether it has the form of an answer (one of the labels, a number).
    """

    correct: bool
    published: bool
    form: bool = True


class Grader(Decider, ABC):
    """Grades answers; its grades are named tuples whose fields are written to ``items.jsonl``."""

    option = "--task-type"

    @classmethod
    def fits(cls, targets: Sequence[str]) -> bool:
        """Whether ``auto`` should choose this grader for these targets; False if it must be chosen by name."""
        return False

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027 - some have nothing to learn
        """Checks all rows (``prompt``, ``completion``) and learns from them, such as the labels.

        Raises:
            DataError: The rows are not of this kind.
        """

    @abstractmethod
    def grade(self, items: Sequence[GradeItem]) -> list[Any]:
        """One grade per item, in order."""

    @abstractmethod
    def metrics(self, grades: Sequence[Any], unanswered: int) -> dict[str, dict[str, Any]]:
        """Metrics from the grades of all answers; `unanswered` is the number of prompts without one."""


def row_number(row: Mapping[str, Any], position: int) -> int:
    """Number of a row in its source, or its position if the row has no number."""
    return position if row.get("row") is None else int(row["row"])


class Matching(Grader):
    """Grades an answer as right or wrong by comparing it with its target."""

    matching: ClassVar[tuple[str, str]]
    """Names of the strict and the published matching."""

    def problem(self, target: str) -> str:
        """Why a target is not of this kind, and the remedy; empty if it is."""
        return ""

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for position, row in enumerate(rows):
            if problem := self.problem(row["completion"]):
                raise DataError(f"--task: row {row_number(row, position)} {problem}")

    @abstractmethod
    def right(self, target: str, answer: str) -> Grade:
        """Whether an answer is right."""

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        return [self.right(item.target, item.answer) for item in items]

    def metrics(self, grades: Sequence[Grade], unanswered: int) -> dict[str, dict[str, Any]]:
        """``fine_tune_accuracy``, together with the accuracy by the published matching."""
        from pharmacist.evaluation.metrics import rate  # with scikit-learn, for which ``--help`` must not wait

        strict, published = self.matching
        accuracy = rate(grade.correct for grade in grades) | {"matching": strict, "task_type": self.label}
        accuracy |= {"unanswered": unanswered} if unanswered else {}
        accuracy |= {
            "without_form": sum(not grade.form for grade in grades),
            "published": rate(grade.published for grade in grades) | {"matching": published},
        }
        return {"fine_tune_accuracy": accuracy | self.report()}

    def report(self) -> dict[str, Any]:
        """What the grader learned about the targets, for the metric."""
        return {}


class Auto(Method):
    """Chooses classification, exact or number by the completions."""
