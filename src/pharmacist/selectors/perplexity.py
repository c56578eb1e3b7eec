"""By perplexity: one band of what the base model expects. One forward pass."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pharmacist.selectors.base import RANKED, Scores, SelectionContext, Selector
from pharmacist.selectors.reading import completion_losses


@dataclass
class PerplexityConfig:
    """Options of the selector."""

    keep: Literal["low", "middle", "high"] = "middle"
    """Which band ranks first: what the model finds easy, the middle of the pool, or what it finds hard."""


class PerplexitySelector(Selector):
    """Prefers a band of the completion's perplexity, exp of its mean cross-entropy: by default the pool's middle."""

    Config = PerplexityConfig
    name = "perplexity"
    needs = frozenset({"model"})
    paper = "Marion et al. 2023, arXiv 2309.04564"

    def rank(self, context: SelectionContext) -> Scores:
        """Reads the pool once."""
        loss = completion_losses(context, context.encoded_pool, "losses")
        perplexity = np.exp(loss)
        # The middle is the median row, and distance from it a ratio: far too low is as far as far too high.
        score = {"low": -perplexity, "middle": -np.abs(loss - np.median(loss)), "high": perplexity}[self.config.keep]
        return Scores(score, np.full(len(loss), RANKED), {"perplexity": perplexity})
