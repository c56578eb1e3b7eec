"""Quality and diversity: property 24's deduplication against a loop, any selector as the scorer."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from pharmacist.core.errors import ConfigError, UnknownNameError
from pharmacist.selectors import SELECTORS, deita
from pharmacist.selectors.deita import TOO_NEAR, too_near
from pharmacist.selectors.embeddings import unit
from tests.support import village
from tests.support.peers import ranked


POOL = village.pool(24)


def by_loop(x: np.ndarray, order: np.ndarray, threshold: float) -> np.ndarray:
    kept: list[int] = []
    for i in order:
        if all(x[i] @ x[j] <= threshold for j in kept):
            kept.append(i)
    return ~np.isin(np.arange(len(x)), kept)


@pytest.mark.parametrize("batch", [1, 7, 64, 1024])
def test_what_is_too_near_does_not_depend_on_the_batch(batch, monkeypatch):
    monkeypatch.setattr(deita, "_BATCH", batch)
    rng = np.random.default_rng(1)
    x, order = unit(rng.normal(size=(200, 3))), rng.permutation(200)
    near = too_near(x, order, 0.9)
    assert np.array_equal(near, by_loop(x, order, 0.9)) and 20 < near.sum() < 180
    kept = x[~near]
    assert (kept @ kept.T - np.eye(len(kept))).max() <= 0.9, "no two that are kept are near"
    assert ((x[near] @ kept.T).max(1) > 0.9).all(), "whatever is not kept is near one that is"


def test_a_refused_point_refuses_no_other():
    angles = np.array([0.0, 0.4, 0.8])  # each near the next, the ends not near each other
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert too_near(x, np.arange(3), 0.9).tolist() == [False, True, False]
    assert too_near(x, np.array([1, 0, 2]), 0.9).tolist() == [True, False, True]


def test_kept_rows_come_first_and_both_halves_in_the_scorers_order(tmp_path):
    plain = ranked(tmp_path / "a", {"name": "ifd"}, POOL).score
    found = ranked(tmp_path / "b", {"name": "deita", "threshold": 0.5}, POOL)
    near = found.signals["too_near"]
    assert np.array_equal(found.signals["quality"], plain) and 5 < near.sum() < 20
    assert found.score[near].max() <= 1 < found.score[~near].min()
    for half in (near, ~near):
        assert np.array_equal(np.argsort(found.score[half], kind="stable"), np.argsort(plain[half], kind="stable"))
    assert (found.reason[near] == TOO_NEAR).any() and (found.reason[~near] != TOO_NEAR).all()


@pytest.mark.parametrize("scorer", ["length", "perplexity", "perplexity+length"])
def test_a_threshold_of_one_leaves_the_scorers_order(tmp_path, scorer):
    plain = ranked(tmp_path / "a", {"name": scorer}, POOL).score
    found = ranked(tmp_path / "b", {"name": "deita", "scorer": scorer, "threshold": 1.0}, POOL)
    assert np.array_equal(np.argsort(found.score, kind="stable"), np.argsort(plain, kind="stable"))
    assert not found.signals["too_near"].any()


def test_copies_of_a_row_are_too_near(tmp_path):
    found = ranked(tmp_path, {"name": "deita"}, POOL)  # its last three rows repeat its first
    near = found.signals["too_near"]
    assert (near[:3] | near[-3:]).all(), "of two equal rows at most one is kept"


def test_it_needs_what_its_scorer_needs():
    build = lambda scorer: SELECTORS.build_from({"name": "deita", "scorer": scorer})  # noqa: E731
    assert build("classifier").needs == {"safe", "harmful", "embedder"} and build("length").needs == {"embedder"}
    with pytest.raises(UnknownNameError, match="unknown selector 'lenght'; did you mean 'length'"):
        build("lenght")
    with pytest.raises(ConfigError, match="deita cannot score for itself"):
        build("length+deita")
    with pytest.raises(ConfigError, match=r"threshold must lie in \[-1, 1\]"):
        SELECTORS.build_from({"name": "deita", "threshold": 2.0})


def test_the_bar_follows_the_comparisons(monkeypatch):
    """A batch is compared with all rows kept before: by rows alone the time left would come out far too short."""
    advanced = []
    monkeypatch.setattr(deita, "bar", lambda *_: nullcontext(SimpleNamespace(advance=advanced.append)))
    monkeypatch.setattr(deita, "_BATCH", 10)
    too_near(unit(np.random.default_rng(0).normal(size=(95, 3))), np.arange(95), 0.9)
    assert len(advanced) == 10 and sum(advanced) == pytest.approx(95)
    np.testing.assert_allclose(advanced, advanced[0] * np.arange(1, 11))
