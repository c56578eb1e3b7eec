"""Facility location: rows that stand for as many others as they can."""

from pathlib import Path

import numpy as np

from pharmacist.selectors.base import RANKED, Scores, SelectionContext, Selector
from pharmacist.selectors.cover import COVERS, CoverConfig, cover_scores
from pharmacist.selectors.embeddings import check_room, pool_keys


class FacilityLocation(Selector):
    """Prefers, one after the other, the row that brings the pool nearest to the rows selected so far.

    Nearness is the cosine on a scale from 0 to 1. Looks at geometry alone.
    """

    Config = CoverConfig
    needs = frozenset({"embedder"})
    paper = "Nemhauser et al. 1978; for training data: Wei et al. 2015, PMLR 37"

    def __init__(self, config: CoverConfig) -> None:
        self.config = config

    def check_room(self, rows: int, folder: Path) -> None:
        """All points are held at once."""
        check_room(rows, folder)

    def rank(self, context: SelectionContext) -> Scores:
        """Reads the pool once; a row's score is what it adds to those before it."""
        points, keys = context.points, pool_keys(context)
        with context.run.phase("order"):
            score = cover_scores(points, keys, COVERS["facility-location"], self.config.block)
        return Scores(score, np.full(len(score), RANKED))
