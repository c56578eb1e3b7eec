"""What the answers to the questions say together: closed forms against sums written out, shares of a pool, Platt."""

import itertools

import numpy as np
import pytest
from scipy.special import expit, logit

from pharmacist.readers.question import calibration, quality
from pharmacist.selectors.pharmacist.questions import (
    ANSWERS,
    QUESTIONS,
    TYPICAL,
    UNKNOWN,
    answers_to,
    class_log_posterior,
    pool_priors,
    safe_log_odds,
    with_priors,
)
from pharmacist.selectors.pharmacist.references import CLASSES


ODDS = np.random.default_rng(0).normal(scale=3, size=(40, len(QUESTIONS)))


def test_every_combination_of_answers_belongs_to_exactly_one_class():
    """Or probabilities would not sum to 1, whatever the answers."""
    for answers in itertools.product((0, 1), repeat=len(QUESTIONS)):
        fits = [((row == UNKNOWN) | (row == answers)).all() for row in ANSWERS[:, : len(QUESTIONS)]]
        assert sum(fits) == 1, answers
    for column, question in enumerate((*QUESTIONS, TYPICAL)):
        assert (answers_to(question, np.arange(len(CLASSES))) == ANSWERS[:, column]).all()


def test_posteriors_are_sums_over_all_answers():
    expected = np.zeros((len(ODDS), len(CLASSES)))
    for row, log_odds in enumerate(ODDS):
        for answers in itertools.product((0, 1), repeat=len(QUESTIONS)):
            chance = np.prod([expit(odds if yes else -odds) for odds, yes in zip(log_odds, answers, strict=True)])
            known = ANSWERS[:, : len(QUESTIONS)]
            expected[row, int(np.flatnonzero(((known == UNKNOWN) | (known == answers)).all(1))[0])] += chance
    found = class_log_posterior(ODDS)
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-12)
    np.testing.assert_allclose(np.exp(found).sum(1), 1, rtol=0, atol=1e-12)
    assert found.min() < -5 and expected[:, 0].max() > 0.5, "not all alike"


def test_what_is_typical_moves_the_safe_class_alone():
    plain, typical = class_log_posterior(ODDS), np.random.default_rng(1).normal(scale=2, size=len(ODDS))
    found = class_log_posterior(ODDS, typical)
    np.testing.assert_allclose(np.exp(found).sum(1), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(safe_log_odds(found), safe_log_odds(plain) + typical, rtol=0, atol=1e-9)
    others, before = found[:, 1:], plain[:, 1:]
    np.testing.assert_allclose(others - others[:, :1], before - before[:, :1], rtol=0, atol=1e-9)
    np.testing.assert_allclose(class_log_posterior(ODDS, np.zeros(len(ODDS))), plain, rtol=0, atol=1e-9)


def test_log_odds_of_safe_rows_do_not_saturate():
    found = safe_log_odds(class_log_posterior(np.array([[100.0] * 4, [200.0] * 4, [-300.0] * 4])))
    np.testing.assert_allclose(found[:2], [100 - np.log(4), 200 - np.log(4)], atol=1e-9)
    assert np.isfinite(found).all() and found[2] < -1000
    p = np.exp(class_log_posterior(ODDS)[:, 0])
    np.testing.assert_allclose(safe_log_odds(class_log_posterior(ODDS)), logit(p), atol=1e-8)


# --- shares of the classes in a pool --------------------------------------------------------------------------------


def mixture(shares: np.ndarray, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """True classes, and log-probabilities of Gaussian classes at equal shares, which are exact."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(len(shares), n, p=shares)
    points = rng.normal(size=(n, len(shares))) + 2.0 * np.eye(len(shares))[truth]
    return truth, with_priors(2.0 * points, np.full(len(shares), 1 / len(shares)))


def test_shares_of_a_mixture_are_found():
    shares = np.array([0.5, 0.3, 0.1, 0.1])
    truth, posterior = mixture(shares, 6000)
    found = pool_priors(posterior, doubt=0.0)
    assert np.abs(found - np.bincount(truth) / len(truth)).max() < 0.02
    # The naive share, a mean of posteriors at equal shares, is not it.
    assert np.abs(np.exp(posterior).mean(0) - shares).max() > 0.04
    # With the right shares posteriors are calibrated: of rows with p, a share of p is of the class.
    p = np.exp(with_priors(posterior, found))[:, 0]
    for low in np.arange(0.1, 0.9, 0.2):
        where = (p >= low) & (p < low + 0.2)
        assert abs((truth[where] == 0).mean() - p[where].mean()) < 0.06


@pytest.mark.parametrize("doubt", [0.0, 0.1, 2.0])
def test_shares_satisfy_the_kkt_conditions(doubt):
    """Maximise mean log sum_k s_k L_k + (doubt / K) sum_k log s_k with sum s = 1: the gradient is 1 + doubt, s > 0."""
    _, posterior = mixture(np.array([0.6, 0.2, 0.15, 0.05]), 400)
    shares = pool_priors(posterior, doubt=doubt, steps=5000)
    assert shares.sum() == pytest.approx(1, abs=1e-12) and shares.min() > 0
    likelihood = np.exp(posterior)
    gradient = (likelihood / (likelihood @ shares)[:, None]).mean(0) + doubt / 4 / shares
    np.testing.assert_allclose(gradient, 1 + doubt, rtol=0, atol=1e-6)
    # Negative control: equal shares do not satisfy them.
    equal = (likelihood / likelihood.mean(1, keepdims=True)).mean(0)
    assert np.abs(equal - 1).max() > 0.1


def test_the_order_of_the_rows_changes_no_share():
    _, posterior = mixture(np.array([0.6, 0.2, 0.15, 0.05]), 500)
    found = pool_priors(posterior)
    for seed in range(5):
        assert np.array_equal(pool_priors(np.random.default_rng(seed).permutation(posterior)), found)


def test_doubt_keeps_rare_classes():
    _, posterior = mixture(np.array([0.7, 0.3, 0.0, 0.0]), 500)
    assert pool_priors(posterior, doubt=0.0)[2:].max() < 0.01 < 0.1 / 4 / 1.1 <= pool_priors(posterior)[2:].min()


# --- calibration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope, offset", [(0.5, 0.0), (2.0, 1.0)])
def test_calibration_finds_slope_and_offset(slope, offset):
    rng = np.random.default_rng(0)
    truth = logit(rng.uniform(0.02, 0.98, 40000))
    answers = (rng.uniform(size=40000) < expit(truth)).astype(int)
    found = calibration((truth - offset) / slope, answers)
    assert found == (pytest.approx(slope, rel=0.05), pytest.approx(offset, abs=0.08))


def test_both_answers_weigh_the_same():
    rng = np.random.default_rng(0)
    answers = np.repeat([0, 1], [3000, 300])
    held_out = rng.normal(size=3300) + 2 * answers
    rare = calibration(held_out, answers)
    equal = calibration(held_out[-600:], answers[-600:])
    assert rare == (pytest.approx(2, rel=0.1), pytest.approx(-2, rel=0.15))
    assert equal == (pytest.approx(2, rel=0.2), pytest.approx(-2, rel=0.3))


def test_log_odds_that_mislead_are_ignored():
    rng = np.random.default_rng(0)
    answers = np.repeat([0, 1], 100)
    assert calibration(rng.normal(size=200) - 3 * answers, answers) == (0.0, 0.0)
    for seed in range(20):
        slope, _ = calibration(np.random.default_rng(seed).normal(size=200), answers)
        assert slope >= 0


def test_quality_on_a_case_by_hand():
    p = np.array([0.9, 0.4, 0.5, 0.1])
    found = quality(logit(p), np.array([1, 1, 0, 0]))
    assert found["auc"] == 0.75 and found["yes_found"] == 0.5 and found["no_found"] == 1.0
    expected = -(np.log(0.9 * 0.4) / 2 + np.log(0.5 * 0.9) / 2) / 2
    assert found["log_loss"] == pytest.approx(expected)
