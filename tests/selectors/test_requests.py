"""Held-out predictions of a ridge regression: the closed form against fits that really lack the row."""

import numpy as np
import pytest

from pharmacist.selectors.pharmacist.requests import LEAST_DOUBT, RIDGES, leave_one_out, log_odds, standardised


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


@pytest.mark.parametrize("n, width", [(30, 4), (20, 60)])
def test_leaving_a_row_out_equals_fitting_without_it(n, width):
    features, targets, weights = problem(n, width)
    found = leave_one_out(features, targets, weights)
    held_out = [refitted(features, targets, weights, found.ridge, i)[i] for i in range(n)]
    np.testing.assert_allclose(found.held_out, held_out, rtol=0, atol=1e-8)
    np.testing.assert_allclose(found.fitted, refitted(features, targets, weights, found.ridge), rtol=0, atol=1e-8)
    # Negative control: a fit that has the row, and one that forgets the weights, say something else.
    assert np.abs(found.fitted - held_out).max() > 1e-3
    unweighted = [refitted(features, targets, np.ones(n), found.ridge, i)[i] for i in range(n)]
    assert np.abs(found.held_out - unweighted).max() > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_the_penalty_has_the_best_held_out_predictions(seed):
    features, targets, weights = problem(25, 8, seed)
    errors = {}
    for ridge in RIDGES:
        held_out = np.array([refitted(features, targets, weights, ridge, i)[i] for i in range(25)])
        errors[ridge] = (weights * (targets - held_out) ** 2).sum()
    assert leave_one_out(features, targets, weights).ridge == min(errors, key=errors.get)


def test_a_row_does_not_take_part_in_what_is_said_of_it():
    features, targets, weights = problem(30, 4)
    before = leave_one_out(features, targets, weights)
    targets[7] += 0.3
    after = leave_one_out(features, targets, weights)
    assert after.ridge == before.ridge
    assert after.held_out[7] == pytest.approx(before.held_out[7], abs=1e-9)
    assert np.abs(np.delete(after.held_out - before.held_out, 7)).min() > 1e-6


def test_rows_without_weight_are_predicted_by_the_others():
    features, targets, weights = problem(30, 4)
    weights[20:] = 1e-12
    found = leave_one_out(features, targets, weights)
    targets[20:] = 99
    again = leave_one_out(features, targets, weights)
    np.testing.assert_allclose(again.fitted, found.fitted, rtol=0, atol=1e-6)


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
