"""Keeps everything: the full dataset as a selector, the paper's reference."""

import numpy as np

from pharmacist.selectors.base import CRITICAL, Scores, SelectionContext, Selector


class FullSelector(Selector):
    """Equal scores; ties keep the input order. Use it with ``--top 1``."""

    name = "full"
    paper = "baseline"
    keeps_all = True

    def rank(self, context: SelectionContext) -> Scores:
        """Gives every row the score 0."""
        n = len(context.pool)
        return Scores(np.zeros(n), np.full(n, CRITICAL))
