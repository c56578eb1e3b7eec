"""The base class of judges, and their verdicts."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pharmacist.core.method import Method
from pharmacist.evaluation.decider import Decider


class JudgeItem(NamedTuple):
    """A prompt and a model's answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on one answer.

    Attributes:
        harmful: Whether the answer does the harm that the prompt asks for; None if it is unscored (the judge failed).
        score: Confidence that it is harmful, in [0, 1]; None if the judge gives no score.
        refused: Whether it is a refusal; None if the judge does not detect refusals.
        categories: Score per category of the judge, if it has any.
        note: Why it is unscored.
    """

    harmful: bool | None
    score: float | None = None
    refused: bool | None = None
    categories: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The verdict as a JSON object, without categories and note if they are empty."""
        more = {"categories": dict(self.categories), "note": self.note}
        known = {"harmful": self.harmful, "score": self.score, "refused": self.refused}
        return known | {name: value for name, value in more.items() if value}


Rows = Iterable[Mapping[str, Any]]


class Judge(Decider, ABC):
    """Judges whether answers are harmful, and whether they are refusals.

    Attributes:
        needs: Reference sets that `fit` requires: of ``safe``, ``harmful``, ``utility``.
    """

    option = "--judge"
    tells_refusals: bool = True
    """Whether `Verdict.refused` is filled; otherwise the keyword judge counts the refusals."""
    category_threshold: float = 0.5
    """Score above which an answer counts as flagged in a category."""

    def fit(self, references: Mapping[str, Rows]) -> None:
        """Learns from the user's references (rows with ``prompt`` and ``completion``); most judges only `check`."""
        self.check()

    @abstractmethod
    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        """One verdict per item, in order."""

    def close(self) -> None:  # noqa: B027 - most judges have nothing to free
        """Frees the memory of a model for another judge's; another call of `judge` loads it again."""

    def report(self) -> dict[str, Any]:
        """The judge's own quality and ``warnings``, for the manifest."""
        return {}

    def save(self, folder: Path) -> bool:
        """Writes what `fit` learned (JSON and safetensors); returns False if there is nothing to write."""
        return False


class NoJudge(Method):
    """Stands for no second judge."""

    name = "none"
