"""By length: a baseline that many rankings secretly are."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pharmacist.selectors.base import RANKED, Scores, SelectionContext, Selector


@dataclass
class LengthConfig:
    """Options of the selector."""

    keep: Literal["longest", "shortest"] = "longest"
    """Which completions rank first."""


class LengthSelector(Selector):
    """Prefers long (or short) completions, in characters. Needs neither model nor references."""

    Config = LengthConfig
    name = "length"
    paper = "Zhao et al. 2024, arXiv 2402.04833 (longest)"

    def rank(self, context: SelectionContext) -> Scores:
        """Counts the characters of every completion."""
        batches = context.pool.dataset.select_columns(["completion"]).iter(4096)
        characters = np.array([len(text) for batch in batches for text in batch["completion"]], dtype=np.int64)
        score = characters.astype(np.float64) * (1 if self.config.keep == "longest" else -1)
        return Scores(score, np.full(len(score), RANKED), {"characters": characters})
