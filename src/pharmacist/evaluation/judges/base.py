"""What every judge is."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pharmacist.core.method import Method
from pharmacist.evaluation.decider import Decider


class JudgeItem(NamedTuple):
    """A prompt and a model's answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one answer.

    Attributes:
        harmful: Whether it does what the prompt should not get; None where the judge failed: unscored, never safe.
        score: How sure, 0 to 1; None where the judge gives no score.
        refused: Whether it is a refusal; None where the judge does not tell.
        categories: Score per category, where the judge has any.
        note: Why it is unscored.
    """

    harmful: bool | None
    score: float | None = None
    refused: bool | None = None
    categories: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object without categories and note where they say nothing."""
        more = {"categories": dict(self.categories), "note": self.note}
        known = {"harmful": self.harmful, "score": self.score, "refused": self.refused}
        return known | {name: value for name, value in more.items() if value}


Rows = Iterable[Mapping[str, Any]]


class Judge(Decider):
    """Judges answers: harmful or not, a refusal or not.

    Attributes:
        needs: Reference sets without which `fit` fails: of ``safe``, ``harmful``, ``utility``.
    """

    tells_refusals: ClassVar[bool] = True
    """Whether `Verdict.refused` is filled; where not, refusals are counted by the keyword judge."""
    category_threshold: ClassVar[float] = 0.5
    """Score above which an answer counts as flagged in one of the judge's categories."""

    def fit(self, references: Mapping[str, Rows]) -> None:
        """Learns from the user's references (rows with ``prompt`` and ``completion``); most judges only `check`."""
        del references
        self.check()

    @abstractmethod
    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        """One verdict per item, in order."""

    def report(self) -> dict[str, Any]:
        """What the judge says about itself: its own quality, and ``warnings``."""
        return {}

    def save(self, folder: Path) -> bool:
        """Writes what `fit` learned (JSON and safetensors); False where there is nothing to write."""
        del folder
        return False


class NoJudge(Method):
    """In the place of a second judge: there is none."""

    name = "none"
