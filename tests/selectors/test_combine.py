import numpy as np
import pytest
from scipy.special import log_softmax

from pharmacist.selectors.evidence.combine import (
    FEWEST_PER_CLASS,
    class_balance,
    fit_combination,
    log_loss,
    log_odds,
    quality,
)


def reader(labels, strength, seed, n_classes=3):
    """Log-probabilities that favour the true class by about `strength` nats."""
    logits = np.random.default_rng(seed).normal(size=(len(labels), n_classes))
    return log_softmax(logits + strength * np.eye(n_classes)[labels], axis=1)


LABELS = np.repeat([0, 1, 2], [40, 60, 30])


def test_log_odds_equal_the_closed_form():
    p = np.array([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [1e-12, 0.5, 0.5 - 1e-12]])
    np.testing.assert_allclose(log_odds(np.log(p)), np.log(p[:, 0] / (1 - p[:, 0])), atol=1e-9)
    np.testing.assert_allclose(log_odds(np.log(p), 1), np.log(p[:, 1] / (1 - p[:, 1])), atol=1e-9)
    # Where 1 - p rounds to 0 the odds are still finite and ordered.
    extreme = log_softmax(np.array([[100.0, 0, 0], [200.0, 0, 0]]), axis=1)
    np.testing.assert_allclose(log_odds(extreme), np.array([100, 200]) - np.log(2), atol=1e-9)


def test_a_class_of_probability_zero_is_a_class_that_is_missing():
    two = log_softmax(np.random.default_rng(0).normal(size=(5, 2)), axis=1)
    three = np.concatenate([two, np.full((5, 1), -np.inf)], axis=1)
    np.testing.assert_allclose(log_odds(three), log_odds(two), atol=1e-12)


def test_classes_weigh_the_same_whatever_their_size():
    balance = class_balance(LABELS, 3)
    assert balance.sum() == pytest.approx(1)
    for k in range(3):
        assert balance[LABELS == k].sum() == pytest.approx(1 / 3)
    uniform = np.full((len(LABELS), 3), -np.log(3))
    assert log_loss(uniform, LABELS) == pytest.approx(np.log(3))
    p = np.log(np.array([[0.8, 0.2], [0.4, 0.6], [0.5, 0.5]]))
    expected = -(np.log(0.8) / 2 + (np.log(0.6) + np.log(0.5)) / 4)
    assert log_loss(p, np.array([0, 1, 1])) == pytest.approx(expected)


def penalised(weights, bias, readers, labels):
    """The objective, written again from its definition: one row at a time."""
    names, total = list(readers), 0.0
    for k in range(3):
        rows = np.flatnonzero(labels == k)
        for row in rows:
            logits = sum(weights[name] * readers[name][row] for name in names) + bias
            total += -(logits[k] - np.log(np.exp(logits).sum())) / len(rows) / 3
    equal = 1 / len(names)
    return total + 0.02 * sum((w - equal) ** 2 for w in weights.values()) + 0.05 * (np.asarray(bias) ** 2).sum()


def test_the_fit_minimises_its_objective():
    readers = {"a": reader(LABELS, 1.5, 0), "b": reader(LABELS, 0.7, 1)}
    fit = fit_combination(readers, LABELS)
    assert fit.fitted
    best = penalised(fit.weights, fit.bias, readers, LABELS)
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1e-2, 0.3):
        for _ in range(20):
            step = rng.normal(size=5) * scale
            weights = {name: max(0.0, fit.weights[name] + d) for name, d in zip("ab", step, strict=False)}
            assert penalised(weights, fit.bias + step[2:], readers, LABELS) > best
    assert best < penalised({"a": 0.5, "b": 0.5}, np.zeros(3), readers, LABELS)


def test_the_better_reader_weighs_more_and_noise_weighs_nothing_much():
    readers = {"good": reader(LABELS, 2.5, 0), "noise": reader(LABELS, 0.0, 1)}
    fit = fit_combination(readers, LABELS)
    assert fit.weights["good"] > 4 * max(fit.weights["noise"], 0.05)
    combined = fit.log_posterior(readers)
    np.testing.assert_allclose(np.exp(combined).sum(1), 1, atol=1e-12)
    mean = log_softmax((readers["good"] + readers["noise"]) / 2, axis=1)
    assert log_loss(combined, LABELS) < log_loss(mean, LABELS)
    # Negative control: on shuffled labels there is nothing to learn, and nothing is claimed.
    shuffled = np.random.default_rng(0).permutation(LABELS)
    fit = fit_combination(readers, shuffled)
    assert log_loss(fit.log_posterior(readers), shuffled) > 0.9 * np.log(3)
    assert 0.35 < quality(fit.log_posterior(readers), shuffled, ("s", "h", "u"))["auc_safe_against_rest"] < 0.65


def test_an_overconfident_reader_is_calibrated():
    honest = reader(LABELS, 1.5, 2)
    fit = fit_combination({"loud": log_softmax(6 * honest, axis=1)}, LABELS)
    assert fit.weights["loud"] < 0.6
    assert log_loss(fit.log_posterior({"loud": log_softmax(6 * honest, axis=1)}), LABELS) < log_loss(
        6 * honest, LABELS
    )


def test_with_few_references_weights_are_equal():
    labels = np.repeat([0, 1, 2], [FEWEST_PER_CLASS, FEWEST_PER_CLASS, FEWEST_PER_CLASS - 1])
    fit = fit_combination({"a": reader(labels, 3, 0), "b": reader(labels, 0, 1)}, labels)
    assert not fit.fitted and fit.weights == {"a": 0.5, "b": 0.5} and not fit.bias.any()
    labels = np.append(labels, 2)
    assert fit_combination({"a": reader(labels, 3, 0), "b": reader(labels, 0, 1)}, labels).fitted


def test_exchangeable_classes_stay_exchangeable():
    half = np.repeat([0, 1], 30)
    labels = np.concatenate([half, np.full(30, 2)])
    p = reader(labels, 1.0, 0)
    # Classes 0 and 1 get the same probability everywhere, and both have the same rows.
    p[30:60] = p[:30]
    p[:, 1] = p[:, 0]
    p = log_softmax(p, axis=1)
    posterior = fit_combination({"a": p, "b": p}, labels).log_posterior({"a": p, "b": p})
    np.testing.assert_allclose(posterior[:, 0], posterior[:, 1], rtol=0, atol=1e-6)


def test_quality_on_a_case_by_hand():
    p = np.log(np.array([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))
    found = quality(p, np.array([0, 0, 1, 1, 2]), ("safe", "harmful", "utility"))
    assert found["auc_safe_against"] == {"harmful": 0.75, "utility": 1.0}
    assert found["auc_safe_against_rest"] == pytest.approx(5 / 6)
    assert found["recall"] == {"safe": 0.5, "harmful": 0.5, "utility": 1.0}
