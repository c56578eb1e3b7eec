"""k-center: rows that leave no row far from a selected one."""

from pathlib import Path

import numpy as np

from pharmacist.selectors.base import RANKED, Scores, SelectionContext, Selector
from pharmacist.selectors.cover import COVERS, CoverConfig, cover_scores
from pharmacist.selectors.embeddings import check_room, pool_keys


class KCenter(Selector):
    """Prefers, one after the other, the row farthest from all before it.

    Looks at geometry alone: outliers, damaged rows among them, come early.
    """

    Config = CoverConfig
    needs = frozenset({"embedder"})
    paper = "Gonzalez 1985; as core sets: Sener and Savarese 2018, arXiv 1708.00489"

    def __init__(self, config: CoverConfig) -> None:
        self.config = config

    def check_room(self, rows: int, folder: Path) -> None:
        """All points are held at once."""
        check_room(rows, folder)

    def rank(self, context: SelectionContext) -> Scores:
        """Reads the pool once; a row's score is its distance from those before it."""
        points, keys = context.points, pool_keys(context)
        with context.run.phase("order"):
            score = cover_scores(points, keys, COVERS["k-center"], self.config.block)
        return Scores(score, np.full(len(score), RANKED))
