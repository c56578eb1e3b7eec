"""Orders in which points cover each other, greedily: k-center and facility location."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pharmacist.core.progress import track
from pharmacist.core.typed import AtLeast1, Checked
from pharmacist.data.arrays import FloatArray
from pharmacist.selectors.base import Scores, SelectionContext, Selector
from pharmacist.selectors.embeddings import check_room, pool_keys, pool_points


BLOCK = 2048
"""Rows compared with each other at most."""


@dataclass
class CoverConfig(Checked):
    """Options of selectors that compare the rows of a pool with each other."""

    block: AtLeast1 = BLOCK
    """Number of rows compared with each other. A larger pool is split by content into blocks of about this size, which
    are ordered separately and merged by what each row added; the cost then grows linearly with the pool."""


def k_center_radii(points: FloatArray, weights: FloatArray | None = None) -> FloatArray:
    """Farthest-first traversal: each point's distance from those before it when its turn comes, shape [points].

    Begins with the point nearest to the mean, which gets twice the largest distance from it; then always the point
    farthest from all before it, the first of equals. The first k points lie within twice the least possible radius of
    everything (Gonzalez 1985). A copy changes no distance, so weights are not read.
    """
    norms = (points**2).sum(1)

    def squared_from(point: FloatArray) -> FloatArray:
        return np.asarray((norms + point @ point - 2 * points @ point).clip(min=0))

    at, left = int(squared_from(points.mean(0)).argmin()), np.full(len(points), np.inf)
    radii = np.empty(len(points))
    for step in range(len(points)):
        radii[at] = left[at]
        left = np.minimum(left, squared_from(points[at]))
        left[at] = -1.0  # never again
        if step == 0:
            radii[at] = 4 * max(left.max(), 0.0)
        at = int(left.argmax())
    return np.sqrt(radii)


def facility_location_gains(points: FloatArray, weights: FloatArray) -> FloatArray:
    """Greedy facility location: what each point adds to sum_i w_i max_{j in S} s_ij when its turn comes.

    s is the cosine, on a scale from 0 to 1. Lazily: a gain never grows as S does, so a point whose gain from earlier
    is below another's present one need not be asked. The first k points reach at least 1 - 1/e of the best possible
    sum of k (Nemhauser et al. 1978).

    Points have length 1, and each stands for so many rows. The gains, shape [points], decrease along the greedy order,
    whose ties are broken by position.
    """
    similarity = (1 + (points @ points.T).clip(-1, 1)) / 2
    best = np.zeros(len(weights))
    # (minus gain, point, how many were chosen when it was computed); a gain of this very round is never asked twice.
    waiting = [(-gain, j, -1) for j, gain in enumerate((weights @ similarity).tolist())]
    heapq.heapify(waiting)
    gains, last, chosen = np.empty(len(weights)), np.inf, 0
    while waiting:
        negative, j, when = heapq.heappop(waiting)
        if when != chosen:
            gain = float(weights @ np.maximum(similarity[j] - best, 0))  # the matrix is symmetric, and rows are faster
            heapq.heappush(waiting, (-gain, j, chosen))
            continue
        last = min(last, -negative)  # rounding must not turn two of them round
        gains[j] = last
        best = np.maximum(best, similarity[j])
        chosen += 1
    return gains


Cover = Callable[[FloatArray, FloatArray], FloatArray]
COVERS: dict[str, Cover] = {"k-center": k_center_radii, "facility-location": facility_location_gains}


def cover_scores(points: FloatArray, keys: npt.NDArray[np.uint64], cover: Cover, block: int = BLOCK) -> FloatArray:
    """What every row adds to those before it, block by block; blocks depend on content alone.

    Copies add nothing: the first of equal rows (by their keys) gets the score, the others 0. Points have length 1.
    """
    _, first, copies = np.unique(keys, return_index=True, return_counts=True)  # in the order of the keys
    score, blocks = np.zeros(len(keys)), -(-len(first) // block)
    for number in track(range(blocks), "ordering rows"):
        rows = first[number::blocks]
        score[rows] = cover(points[rows], copies[number::blocks].astype(np.float64))
    return score


class Coverage(Selector):
    """Base of the selectors that take rows in the order in which they cover the pool, by geometry alone."""

    Config = CoverConfig
    needs = frozenset({"embedder"})
    covers = True

    def check_room(self, rows: int, folder: Path) -> None:
        check_room(rows, folder)

    def rank(self, context: SelectionContext) -> Scores:
        """Reads the pool once; a row's score is what its cover gives it when its turn comes."""
        points, keys = pool_points(context), pool_keys(context)
        with context.run.phase("order"):
            return Scores(cover_scores(points, keys, COVERS[self.name], self.config.block))


class KCenterSelector(Coverage):
    """Chooses, one after the other, the row farthest from all rows chosen before; the score is this distance.

    Looks at geometry alone: outliers, damaged rows among them, come early.
    """

    name = "k-center"
    paper = "Gonzalez 1985; as core sets: Sener and Savarese 2018, arXiv 1708.00489"


class FacilityLocationSelector(Coverage):
    """Chooses, one after the other, the row that makes the rows chosen so far most similar to the pool.

    The score is what it adds to those before it. Nearness is the cosine on a scale from 0 to 1; geometry alone counts.
    """

    name = "facility-location"
    paper = "Nemhauser et al. 1978; for training data: Wei et al. 2015, PMLR 37"
