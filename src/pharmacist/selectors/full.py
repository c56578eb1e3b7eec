"""Keeps everything: the full dataset as a selector, the paper's reference."""

from dataclasses import dataclass

import numpy as np

from pharmacist.selectors.base import CRITICAL, Scores, SelectionContext, Selector


@dataclass
class FullConfig:
    """No options."""


class Full(Selector):
    """Equal scores; ties keep the input order. Use it with ``--top 1``."""

    Config = FullConfig
    paper = "baseline"

    def __init__(self, config: FullConfig) -> None:
        self.config = config

    def rank(self, context: SelectionContext) -> Scores:
        """Gives every row the score 0."""
        n = len(context.pool)
        return Scores(np.zeros(n), np.full(n, CRITICAL))
