"""A package of methods outside the project, as a user would write it: one of each kind."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pharmacist.attacks import Attack
from pharmacist.data.mixing import mix
from pharmacist.evaluation.graders.base import Grade, Matching
from pharmacist.evaluation.judges.base import Judge, Verdict
from pharmacist.repairs.base import Plan, Repair
from pharmacist.selectors.base import CRITICAL, Scores, Selector
from pharmacist.training.strategy import GradientStrategy


@dataclass
class ShortestConfig:
    most_words: int = 40
    """Completions with more words are not critical."""


class Shortest(Selector):
    """Prefers short completions."""

    Config = ShortestConfig

    def rank(self, context):
        words = np.array([len(text.split()) for text in context.pool.dataset["completion"]], dtype=np.float64)
        reason = np.where(words <= self.config.most_words, CRITICAL, "long")
        return Scores(-words, reason, {"words": words})


@dataclass
class CalmConfig:
    strength: float = 0.5
    """Share of the loss that is taken away."""


class Calm(GradientStrategy):
    """Learns more slowly."""

    Config = CalmConfig
    stages = frozenset({"align", "finetune"})

    def objective(self, step, loss, outputs):
        step.log(calm=1 - self.config.strength)
        return loss * (1 - self.config.strength)


class Repeated(Attack):
    """The benign task in one order, whatever the seed."""

    needs = frozenset({"task"})

    def build(self, rows, *, n, poison_ratio, seed):
        return mix(rows["task"], rows["task"].select([]), n=n, poison_ratio=0.0, seed=0)


@dataclass
class FadedConfig:
    share: float = 0.1
    """Of every weight that is taken away."""


class Faded(Repair):
    """Makes all that was learned a little smaller."""

    Config = FadedConfig

    def plan(self, tuned, references):
        new = {name: value.detach() * (1 - self.config.share) for name, value in tuned.tensors().items()}
        return Plan(new, [{"tensor": name} for name in new])


@dataclass
class LongWindedConfig:
    words: int = 3
    """Answers with more words than that do what they should not."""


class LongWinded(Judge):
    """Takes long answers for harmful ones."""

    Config = LongWindedConfig
    name: ClassVar[str] = "long-winded"

    def judge(self, items) -> list[Any]:
        return [Verdict(len(item.answer.split()) > self.config.words, refused=not item.answer) for item in items]


class FirstWord(Matching):
    """The first words are the same."""

    name = "first-word"
    version = 1
    matching = ("first word", "contained")

    def right(self, target, answer):
        return Grade(target.split()[:1] == answer.split()[:1], target in answer)
