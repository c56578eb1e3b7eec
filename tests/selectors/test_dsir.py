"""Properties of DSIR (21): hashed importance of words, smoothing, and drawing in proportion to it."""

from collections import Counter

import numpy as np
import pytest

from pharmacist.core.errors import DataError
from pharmacist.data.records import to_dataset
from pharmacist.selectors.baselines import draws
from pharmacist.selectors.dsir import log_ratio, ngram_counts
from tests.support import village
from tests.support.peers import ranked


EXACT = {"name": "dsir", "resample": False}


def dsir(root, pool, safe, **options):
    return ranked(root, {**EXACT, **options}, pool, {"safe": safe})


def test_words_and_pairs_are_counted_in_lower_case():
    counts = ngram_counts(["Sorry, I cannot.", "i"], 10**6).toarray()
    assert counts.sum(1).tolist() == [5 + 4, 1] and (counts >= 0).all()  # sorry , i cannot . and their pairs
    assert counts[0][counts[1] > 0] == 1, "one letter is a word, whatever its case"
    assert ngram_counts(["怎样酿造"], 10**6).sum() == 4 + 3, "letters of a script without spaces, and their pairs"


def test_a_pool_like_the_references_has_no_importance(tmp_path):
    rows = village.rows("safe", 12)
    same = dsir(tmp_path / "a", rows, rows)
    assert np.array_equal(same.score, np.zeros(12))
    other = dsir(tmp_path / "b", rows, village.rows("utility", 12))
    assert np.abs(other.score).max() > 1


def test_importance_is_that_of_a_hand_count(tmp_path):
    pool = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}]
    safe = [{"prompt": "a", "completion": "b"}] * 8
    found = dsir(tmp_path, pool, safe, smoothing=0.25)
    grams = [["a", "b", "a b"], ["a", "c", "a c"]]
    raw, target = Counter(grams[0] + grams[1]), Counter(grams[0] * 8)
    expected = [sum(np.log(0.75 * (target[g] / 24) / (raw[g] / 6) + 0.25) for g in row) for row in grams]
    np.testing.assert_allclose(found.score, expected, rtol=1e-12)
    assert found.score[0] > 0 > found.score[1] >= 2 * np.log(0.25)
    per_word = dsir(tmp_path / "w", pool, safe, smoothing=0.25, per_word=True)
    np.testing.assert_allclose(per_word.score, found.score / 3, rtol=1e-12)


def test_smoothing_bounds_what_an_unknown_word_costs():
    unseen = log_ratio(np.array([5.0, 0.0]), np.array([5.0, 5.0]), 0.1)
    assert unseen[1] == pytest.approx(np.log(0.1)) and unseen[0] > 0
    assert np.array_equal(log_ratio(np.array([5.0, 0.0]), np.array([5.0, 5.0]), 1.0), [0, 0])


def test_importance_adds_up_over_parts_but_for_the_pair_at_the_border():
    weights = np.random.default_rng(0).normal(size=10**6)
    weigh = lambda text: float((ngram_counts([text], 10**6) @ weights)[0])  # noqa: E731
    whole, parts = weigh("bake bread in an oven"), weigh("bake bread") + weigh("in an oven")
    border = weigh("bread in") - weigh("bread") - weigh("in")
    assert whole == pytest.approx(parts + border, abs=1e-12) and abs(border) > 0.01


def test_safe_rows_rank_above_the_others(tmp_path):
    pool = village.rows("safe", 10, seed=1) + village.rows("utility", 10, seed=2) + village.rows("noise", 10, seed=3)
    score = dsir(tmp_path, pool, village.rows("safe", 12)).score
    assert score[:10].min() > score[10:].max()


def test_resampling_draws_rows_in_proportion_to_their_importance(tmp_path):
    pool = [{"prompt": "a", "completion": text} for text in ("b b", "b c", "c c")]
    safe = [{"prompt": "a", "completion": "b"}] * 8
    options = {"resample": True, "smoothing": 0.3}
    importance = dsir(tmp_path / "i", pool, safe, **options).signals["log_importance"]
    expected = np.exp(importance) / np.exp(importance).sum()
    assert expected.min() > 0.005
    rows, drawn = to_dataset(pool), np.zeros(3)
    for seed in range(3000):
        drawn[(importance - np.log(-np.log(draws(rows, seed)))).argmax()] += 1
    chi_square = ((drawn - 3000 * expected) ** 2 / (3000 * expected)).sum()
    assert chi_square < 13.8  # two degrees of freedom: p < 0.001
    uniform = ((drawn - 1000) ** 2 / 1000).sum()
    assert uniform > 100


def test_drawn_and_exact_scores_differ_by_the_seed_alone(tmp_path):
    a, b = (ranked(tmp_path / name, {"name": "dsir"}, seed=seed) for name, seed in (("a", 0), ("b", 1)))
    assert np.array_equal(a.signals["log_importance"], b.signals["log_importance"])
    assert (a.score != b.score).all() and np.isfinite(a.score).all()
    exact = dsir(tmp_path / "c", None, village.references()["safe"])
    assert np.array_equal(exact.score, a.signals["log_importance"])


def test_too_few_references_are_refused(tmp_path):
    with pytest.raises(DataError, match="--safe: 7 rows are left, at least 8 are needed"):
        dsir(tmp_path, None, village.rows("safe", 7))


def test_rows_without_words_are_scored_too(tmp_path):
    pool = village.pool(6) + [{"prompt": "…", "completion": "—"}]
    for per_word in (False, True):
        found = dsir(tmp_path / str(per_word), pool, village.rows("safe", 8), per_word=per_word)
        assert np.isfinite(found.score).all() and len(found.score) == 7
