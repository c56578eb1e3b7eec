"""Held-out predictions of a ridge regression: the closed form against fits that really lack the row."""

import numpy as np
import pytest
from scipy.special import expit

from pharmacist.selectors.pharmacist.questions import LABEL_WEIGHT, NO_LABELS, Labels
from pharmacist.selectors.pharmacist.requests import (
    LEAST_DOUBT,
    RIDGES,
    RequestQuestion,
    leave_one_out,
    log_odds,
    standardised,
)


def problem(n: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, width))
    targets = features @ rng.normal(size=width) + 0.5 * rng.normal(size=n)
    return features, targets, rng.uniform(0.2, 4, n)


def refitted(features, targets, weights, ridge, leave=None) -> np.ndarray:
    """Predictions for all rows by normal equations, without row `leave`; the constant is penalised as the rest is."""
    design = np.column_stack([features, np.ones(len(features))])
    kept = np.arange(len(features)) != leave
    x, w = design[kept], weights[kept, None]
    return design @ np.linalg.solve(x.T @ (w * x) + ridge * np.eye(x.shape[1]), x.T @ (weights * targets)[kept])


def best_ridge(features, targets, weights) -> float:
    """The penalty under which a row is predicted best without it, by fits that lack the row."""
    n = len(features)

    def error(ridge):
        held_out = np.array([refitted(features, targets, weights, ridge, i)[i] for i in range(n)])
        return (weights * (targets - held_out) ** 2).sum()

    return min(RIDGES, key=error)


@pytest.mark.parametrize("n, width, seed", [(30, 4, 0), (20, 60, 0), *((25, 8, seed) for seed in range(4))])
def test_leaving_a_row_out_equals_fitting_without_it_under_the_best_penalty(n, width, seed):
    features, targets, weights = problem(n, width, seed)
    found, fitted = leave_one_out(features, targets, weights)
    ridge = best_ridge(features, targets, weights)
    held_out = [refitted(features, targets, weights, ridge, i)[i] for i in range(n)]
    np.testing.assert_allclose(found, held_out, rtol=0, atol=1e-8)
    np.testing.assert_allclose(fitted, refitted(features, targets, weights, ridge), rtol=0, atol=1e-8)
    # Negative control: a fit that has the row, one that forgets the weights, and other penalties say something else.
    assert np.abs(fitted - held_out).max() > 1e-3
    unweighted = [refitted(features, targets, np.ones(n), ridge, i)[i] for i in range(n)]
    assert np.abs(found - unweighted).max() > 1e-3
    for other in set(RIDGES) - {ridge}:
        assert np.abs(fitted - refitted(features, targets, weights, other)).max() > 1e-4


def test_a_row_does_not_take_part_in_what_is_said_of_it():
    features, targets, weights = problem(30, 4)
    ridge, (before, _) = best_ridge(features, targets, weights), leave_one_out(features, targets, weights)
    targets[7] += 0.3
    after, _ = leave_one_out(features, targets, weights)
    assert best_ridge(features, targets, weights) == ridge
    assert after[7] == pytest.approx(before[7], abs=1e-9)
    assert np.abs(np.delete(after - before, 7)).min() > 1e-6


def test_rows_without_weight_are_predicted_by_the_others():
    features, targets, weights = problem(30, 4)
    weights[20:] = 1e-12
    _, found = leave_one_out(features, targets, weights)
    targets[20:] = 99
    _, again = leave_one_out(features, targets, weights)
    np.testing.assert_allclose(again, found, rtol=0, atol=1e-6)


def test_a_pool_is_judged_by_its_own_answers_and_by_labels():
    features, refuses, known = problem(30, 4)[0], np.random.default_rng(1).normal(size=20), np.arange(10) % 2
    labels, labelled = Labels(np.array([3, 8]), np.array([0, 2])), [13, 18]  # a safe row, and one of the utility
    targets, weights = np.concatenate([known, expit(refuses)]), np.ones(30)
    asked = RequestQuestion(("lexical",))
    without = leave_one_out(features, targets, weights)[0]
    np.testing.assert_allclose(asked.of_pool(features, known, refuses, NO_LABELS), log_odds(without[10:]))
    targets[labelled], weights[labelled] = (1, 0), LABEL_WEIGHT
    held_out, fitted = leave_one_out(features, targets, weights)
    found = asked.of_pool(features, known, refuses, labels)
    expected = log_odds(np.where(np.isin(np.arange(30), labelled), fitted, held_out))[10:]
    np.testing.assert_allclose(found, expected)
    # Negative control: labels that count as much as any row, and labelled rows that do not count for themselves.
    equal = log_odds(leave_one_out(features, targets, np.ones(30))[0])[10:]
    assert (found != equal).all() and (log_odds(held_out)[labelled] != found[[3, 8]]).all()


def test_features_have_a_total_variance_of_one():
    features = np.random.default_rng(0).normal(3, 5, (50, 7))
    features[:, 2] = 1.0  # says nothing
    found = standardised(features)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.delete(found.var(0), 2), 1 / 7, rtol=1e-12)
    assert not found[:, 2].any()


def test_no_request_is_certain():
    found = log_odds(np.array([-3.0, 0.5, 7.0]))
    surest = np.log((1 - LEAST_DOUBT) / LEAST_DOUBT)
    np.testing.assert_allclose(found, [-surest, 0, surest], rtol=0, atol=1e-12)
