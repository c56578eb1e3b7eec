"""Core subsets: exact size, floors of groups, spread within the best; each against what happens without."""

import numpy as np
import pytest

from pharmacist.core.errors import ConfigError
from pharmacist.selectors.cover import COVERS
from pharmacist.selectors.embeddings import unit
from pharmacist.selectors.subset import Spread, core_rows, floors


N = 200
RNG = np.random.default_rng(0)
ORDER = RNG.permutation(N)
ALL = np.ones(N, dtype=bool)
ONE = np.zeros(N, dtype=np.int64)
THREE = np.repeat([0, 1, 2], [120, 76, 4])
"""Groups of 120, 76 and 4 rows."""
LAST = np.argsort(THREE != 1, kind="stable")
"""An order whose best rows are all of the second group."""


@pytest.mark.parametrize("k", [1, 7, 60, N])
def test_without_quotas_it_is_the_top(k):
    assert core_rows(ORDER, k, ALL, ONE, 0.0).tolist() == sorted(ORDER[:k])
    assert core_rows(ORDER, k, ALL, THREE, 0.0).tolist() == sorted(ORDER[:k]), "share 0 sets no floor"


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("k", [3, 20, 60, N])
def test_no_group_vanishes_and_the_size_is_exact(k, share):
    chosen = core_rows(LAST, k, ALL, THREE, share)
    kept = np.bincount(THREE[chosen], minlength=3)
    fair = np.floor(share * k * np.array([120, 76, 4]) / N)
    assert len(chosen) == len(set(chosen)) == k and (kept >= 1).all()
    assert (kept[1:] >= fair[1:]).all() and kept[0] >= fair[0] - 2, "small groups' ones come out of the largest floor"
    if k == 60:
        assert np.bincount(THREE[core_rows(LAST, k, ALL, THREE, 0.0)], minlength=3).tolist() == [0, 60, 0]


@pytest.mark.parametrize("large", [0, 2, 4])
def test_ones_for_small_groups_come_out_of_the_largest_floor(large):
    sizes = np.ones(5, dtype=int)
    sizes[large] = 96
    found = floors(np.arange(100), 6, np.ones(100, dtype=bool), np.repeat(np.arange(5), sizes), 1.0)
    assert found.sum() == 6 and found[large] == 2 and (np.delete(found, large) == 1).all()


def test_a_share_of_one_is_a_proportional_draw():
    kept = np.bincount(THREE[core_rows(LAST, 100, ALL, THREE, 1.0)], minlength=3)
    assert kept.tolist() == [60, 38, 2]


def test_each_group_keeps_its_best():
    chosen = core_rows(ORDER, 30, ALL, THREE, 0.5)
    place = np.empty(N, dtype=int)
    place[ORDER] = np.arange(N)
    for group in range(3):
        mine, left = place[chosen[THREE[chosen] == group]], np.setdiff1d(np.flatnonzero(THREE == group), chosen)
        assert mine.max() < place[left].min()


def test_rounding_costs_no_row():
    assert floors(ORDER, 50, ALL, ONE, 0.58).tolist() == [29]
    points = unit(np.eye(N)[:, :12])
    spread = Spread("k-center", 1.1, points, np.arange(N, dtype=np.uint64))
    chosen = core_rows(np.arange(N), 10, np.arange(N) < 12, ONE, 0.0, spread)
    assert len(chosen) == 10 and set(chosen) <= set(range(11)), "1.1 x 10 rows, not 12"


def test_rows_judged_worthless_are_not_drawn_in():
    good = THREE != 2
    chosen = core_rows(LAST, 40, good, THREE, 0.5)
    assert len(chosen) == 40 and (THREE[chosen] != 2).all() and (THREE[chosen] == 0).sum() == 12
    good = ALL.copy()
    good[np.flatnonzero(THREE == 2)[1:]] = False
    assert (THREE[core_rows(LAST, N // 2, good, THREE, 1.0)] == 2).sum() == 1


def test_more_groups_than_rows_are_told():
    with pytest.raises(ConfigError, match="2 rows cannot hold one of each of 3 groups"):
        core_rows(ORDER, 2, ALL, THREE, 0.5)
    many = np.arange(N) // 2
    assert floors(ORDER, 100, ALL, many, 1.0).sum() <= 100


@pytest.mark.parametrize("cover", list(COVERS))
def test_spread_rows_cover_the_best_better_than_the_very_best_do(cover):
    x = unit(RNG.normal(size=(N, 4)))
    order = np.argsort(-x[:, 0])  # a ranking that prefers one corner
    chosen = core_rows(order, 40, ALL, ONE, 0.0, Spread(cover, 2.0, x, np.arange(N, dtype=np.uint64)))
    best = order[:80]
    assert len(chosen) == 40 and set(chosen) <= set(best) and set(chosen) != set(order[:40])
    radius = lambda rows: (1 - x[best] @ x[rows].T).min(1).max()  # noqa: E731
    assert radius(chosen) < 0.8 * radius(order[:40])


def test_spread_keeps_quotas_and_takes_no_worthless_row_while_there_are_good_ones():
    x, keys = unit(RNG.normal(size=(N, 4))), np.arange(N, dtype=np.uint64)
    good = RNG.random(N) < 0.5
    spread = Spread("k-center", 3.0, x, keys)
    plain, spaced = (core_rows(ORDER, 60, good, THREE, 0.5, way) for way in (None, spread))
    assert np.bincount(THREE[plain]).tolist() == np.bincount(THREE[spaced]).tolist() and len(spaced) == 60
    for group in (0, 1):
        assert good[spaced[THREE[spaced] == group]].all()
    assert not good[plain].all()
    everything = core_rows(ORDER, N, good, THREE, 0.5, spread)
    assert everything.tolist() == list(range(N))
    assert core_rows(ORDER, 60, ALL, ONE, 0.0, Spread("k-center", 1.0, x, keys)).tolist() == sorted(ORDER[:60])
