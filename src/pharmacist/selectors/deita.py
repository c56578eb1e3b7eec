"""Deita's recipe: the best rows by a quality score, none of them too near to a better one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from scipy.stats import rankdata

from pharmacist.core.errors import ConfigError
from pharmacist.core.progress import bar
from pharmacist.core.typed import Checked
from pharmacist.data.arrays import BoolArray, FloatArray, IntArray
from pharmacist.selectors.base import RANKED, Scores, SelectionContext
from pharmacist.selectors.embeddings import check_room, pool_keys, pool_points
from pharmacist.selectors.mix import Composite


TOO_NEAR = "near_a_better_row"
"""The reason of rows that resemble a row with a better score."""
_BATCH = 1024


@dataclass
class DeitaConfig(Checked):
    """Options of the selector."""

    scorer: str = "ifd"
    """Selector, with its default options, that says how good a row is; several selectors are combined as a+b."""
    threshold: Annotated[float, Ge(-1), Le(1)] = 0.9
    """Cosine similarity above which a row is too similar to a better row that is kept; 1 keeps all rows, in the
    scorer's order."""


class DeitaSelector(Composite):
    """Prefers rows of high quality that no better row resembles; quality is any other selector's score."""

    Config = DeitaConfig
    name = "deita"
    needs = frozenset({"embedder"})
    paper = "Liu et al. 2024, arXiv 2312.15685"

    def __post_init__(self) -> None:
        from pharmacist.selectors import SELECTORS

        if self.name in self.config.scorer.split("+"):
            raise ConfigError("selector.scorer: deita cannot score for itself; name another selector")
        self.parts = {self.config.scorer: SELECTORS.build(self.config.scorer, {})}
        super().__post_init__()

    def check_room(self, rows: int, folder: Path) -> None:
        check_room(rows, folder)
        super().check_room(rows, folder)

    def rank(self, context: SelectionContext) -> Scores:
        """Reads the pool for its points, lets the scorer rank it, then goes down the ranking."""
        points, keys = pool_points(context), pool_keys(context)
        scored = self.parts[self.config.scorer].rank(context)
        with context.run.phase("order"):
            near = too_near(points, np.lexsort((keys, -scored.score)), self.config.threshold)
        # Ranks, not scores: kept rows lie in (1, 2], the others in (0, 1], both in the scorer's order.
        rank = rankdata(scored.score) / len(near)
        return Scores(
            np.where(near, rank, 1 + rank),
            np.where(near & (scored.reason == RANKED), TOO_NEAR, scored.reason),
            {"quality": scored.score, "too_near": near, **scored.signals},
            scored.report,
            scored.warnings,
        )


def too_near(points: FloatArray, order: IntArray, threshold: float) -> BoolArray:
    """Which points (of length 1) have a cosine above the threshold to a better point that is itself kept.

    `order` is best first; from a threshold of 1 on nothing is too near.
    """
    near = np.zeros(len(points), dtype=np.bool_)
    if threshold >= 1:
        return near
    kept = np.empty(0, dtype=np.int64)
    starts = range(0, len(order), _BATCH)
    comparisons = sum(start + _BATCH for start in starts)
    with bar("thinning rows", len(order)) as progress:  # follows the comparisons, which grow with the rows kept before
        for start in starts:
            batch = order[start : start + _BATCH]
            here, refused = points[batch], np.zeros(len(batch), dtype=np.bool_)
            for first in range(0, len(kept), _BATCH):
                refused |= (here @ points[kept[first : first + _BATCH]].T).max(1) > threshold
            # Within the batch one by one, so that a point that was refused refuses no other.
            close = here @ here.T > threshold
            for i in range(len(batch)):
                refused[i] = refused[i] or bool((close[i, :i] & ~refused[:i]).any())
            near[batch] = refused
            kept = np.concatenate([kept, batch[~refused]])
            progress.advance(len(order) * (start + _BATCH) / comparisons)
    return near
