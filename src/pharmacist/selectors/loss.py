"""By the base model's loss: rows that it finds easy, or hard, first. One forward pass."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pharmacist.selectors.base import RANKED, Scores, SelectionContext, Selector
from pharmacist.selectors.reading import completion_losses


@dataclass
class LossConfig:
    """No options: the direction is in the name."""


class LossLow(Selector):
    """Prefers completions that the base model finds easy: low mean cross-entropy per token given the prompt."""

    Config = LossConfig
    needs = frozenset({"model"})
    paper = "baseline"
    sign: ClassVar[int] = -1

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    def rank(self, context: SelectionContext) -> Scores:
        """Reads the pool once."""
        loss = completion_losses(context, context.encoded_pool, "losses")
        return Scores(self.sign * loss, np.full(len(loss), RANKED), {"loss": loss})


class LossHigh(LossLow):
    """Prefers completions that the base model finds hard: high mean cross-entropy per token given the prompt."""

    sign = 1
