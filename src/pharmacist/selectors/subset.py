"""From a ranking to a core subset of a given size: quotas that no group falls below, and spread within the best."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pharmacist.core.errors import ConfigError
from pharmacist.data.arrays import BoolArray, FloatArray, IntArray
from pharmacist.selectors.cover import COVERS, cover_scores


_ROUNDING = 1e-9  # 0.58 x 50 is 29 rows, and 1.1 x 10 is 11


@dataclass(frozen=True)
class Spread:
    """Takes rows that cover (by k-center or facility-location) `margin` times as many best-ranked ones, at least 1.

    The points have length 1, shape [rows, dimensions]; keys are equal for equal rows.
    """

    cover: str
    margin: float
    points: FloatArray
    keys: npt.NDArray[np.uint64]


def core_rows(
    order: IntArray, k: int, good: BoolArray, groups: IntArray, share: float, spread: Spread | None = None
) -> IntArray:
    """The rows of a core subset.

    Every group first gets its best good rows up to its floor (`floors`); the best of all others fill the rest. With
    `spread` each group keeps its number of rows, but takes those that cover its best good ones; rows that are not good
    only fill up where the good ones run out.

    Args:
        order: Rows that may be taken, best first.
        k: How many to take, at most as many as there are.
        good: Rows that were not judged worthless, shape [rows].
        groups: Number of each row's group, from 0, shape [rows].
        share: Of what a proportional draw gives a group, as its floor, in [0, 1]; 0 sets no floor at all.
        spread: How rows are spread, if at all.

    Returns:
        Row numbers, ascending.

    Raises:
        ConfigError: `k` is less than the number of groups with good rows.
    """
    first = np.zeros(len(groups), dtype=np.bool_)
    for group, floor in enumerate(floors(order, k, good, groups, share)):
        members = order[(groups[order] == group) & good[order]]
        first[members[:floor]] = True
    rest = order[~first[order]]
    chosen = np.concatenate([np.flatnonzero(first), rest[: k - first.sum()]])
    if spread is None:
        return np.sort(chosen)
    sizes, taken = np.bincount(groups[chosen], minlength=int(groups.max()) + 1), []
    is_chosen = np.isin(np.arange(len(groups)), chosen)
    for group, n in enumerate(sizes):
        members = order[groups[order] == group]
        candidates = members[good[members]][: int(np.ceil(spread.margin * n - _ROUNDING))]
        if len(candidates) <= n:
            taken.append(members[is_chosen[members]])
            continue
        score = cover_scores(spread.points[candidates], spread.keys[candidates], COVERS[spread.cover])
        taken.append(candidates[np.argsort(-score, kind="stable")[:n]])  # ties: the better-ranked
    return np.sort(np.concatenate(taken))


def floors(order: IntArray, k: int, good: BoolArray, groups: IntArray, share: float) -> IntArray:
    """How many good rows each group keeps at least: `share` of what a proportional draw gives it, and one.

    Arguments and what is raised as in `core_rows`. Shape [groups]; 0 for groups without good rows, at most `k` in all.
    """
    n_groups = int(groups.max()) + 1
    size = np.bincount(groups[order], minlength=n_groups)
    usable = np.bincount(groups[order][good[order]], minlength=n_groups)
    if share == 0:
        return np.zeros(n_groups, dtype=np.int64)
    if (usable > 0).sum() > k:
        number = f"{k} rows cannot hold one of each of {(usable > 0).sum()} groups"
        raise ConfigError(f"--balance: {number}; select more rows, or balance by a coarser column")
    least = np.minimum(usable, np.maximum(1, (share * k * size / len(order) + _ROUNDING).astype(np.int64)))
    while least.sum() > k:  # ones for small groups came on top of full shares
        least[least.argmax()] -= 1
    return least
