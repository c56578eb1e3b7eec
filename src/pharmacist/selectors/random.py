"""A random order: the baseline that any selector must beat at equal size."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from pharmacist.core.seeding import derive
from pharmacist.selectors.base import CRITICAL, FloatArray, Scores, SelectionContext, Selector


if TYPE_CHECKING:
    import datasets


@dataclass
class RandomConfig:
    """The order follows from the run's seed."""

    draw: int = 0
    """Which of several orders of one seed."""


class RandomSelector(Selector):
    """Uniform scores drawn by content, whatever the order of the input; each copy of a row draws anew."""

    Config = RandomConfig
    name = "random"
    paper = "baseline"
    chance = True

    def rank(self, context: SelectionContext) -> Scores:
        """Draws a score in [0, 1) for every row."""
        score = draws(
            context.pool.dataset, derive(context.seed, "random", "scores", *filter(None, [self.config.draw]))
        )
        return Scores(score, np.full(len(score), CRITICAL))


def draws(rows: "datasets.Dataset", seed: int) -> FloatArray:
    """Uniform numbers in [0, 1) by content, whatever the order of the rows; each copy of a row draws anew.

    Args:
        rows: Canonical rows (`data.records`).
        seed: Of the stream.
    """
    copies, drawn = Counter[int](), np.empty(len(rows))
    batches = rows.select_columns(["prompt", "completion"]).iter(4096)
    pairs = (pair for batch in batches for pair in zip(batch["prompt"], batch["completion"], strict=True))
    for position, pair in enumerate(pairs):
        key = xxhash.xxh3_64_intdigest("\x1f".join(pair).encode("utf-8", "surrogatepass"), seed=seed)
        copy = xxhash.xxh3_64_intdigest(key.to_bytes(8, "big"), seed=copies[key])
        copies[key] += 1
        drawn[position] = (copy >> 11) / 2**53
    return drawn
