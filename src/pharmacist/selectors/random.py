"""A random order: the baseline that any selector must beat at equal size."""

from dataclasses import dataclass

import numpy as np

from pharmacist.core.seeding import derive
from pharmacist.selectors.base import CRITICAL, Scores, SelectionContext, Selector


@dataclass
class RandomConfig:
    """No options: the order follows from the run's seed."""


class Random(Selector):
    """Uniform scores; equal rows get scores of their own, since chance does not read them."""

    Config = RandomConfig
    paper = "baseline"

    def __init__(self, config: RandomConfig) -> None:
        self.config = config

    def rank(self, context: SelectionContext) -> Scores:
        """Draws a score in [0, 1) for every row."""
        n = len(context.pool)
        score = np.random.default_rng(derive(context.seed, "random", "scores")).random(n)
        return Scores(score, np.full(n, CRITICAL))
