"""Combines the readers' class log-probabilities into one calibrated posterior. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp
from sklearn.metrics import roc_auc_score


FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

FEWEST_PER_CLASS = 16
"""With fewer references in some class, weights are not fitted but equal."""
_SHRINKAGE = 0.02
_BIAS_SHRINKAGE = 0.05


@dataclass(frozen=True)
class Combination:
    """log p(k) = log softmax_k( sum_r weight_r * log p_r(k) + bias_k ).

    Attributes:
        weights: Reader -> weight, not negative.
        bias: Per class, shape [classes].
        fitted: False where references were too few and the weights are equal.
    """

    weights: dict[str, float]
    bias: FloatArray
    fitted: bool

    def log_posterior(self, readers: Mapping[str, FloatArray]) -> FloatArray:
        """Combines readers' log-probabilities, each of shape [rows, classes]; the same shape."""
        logits = sum(weight * readers[name] for name, weight in self.weights.items()) + self.bias
        combined: FloatArray = log_softmax(logits, axis=1)
        return combined


def class_balance(labels: IntArray, n_classes: int) -> FloatArray:
    """Weights per row that give every class the same total; they sum to 1, shape [rows]."""
    counts = np.bincount(labels, minlength=n_classes)
    balance: FloatArray = (1.0 / (counts * (counts > 0).sum()).clip(min=1))[labels]
    return balance


def log_loss(log_posterior: FloatArray, labels: IntArray) -> float:
    """Class-balanced cross-entropy in nats."""
    balance = class_balance(labels, log_posterior.shape[1])
    return float(-(balance * log_posterior[np.arange(len(labels)), labels]).sum())


def fit_combination(out_of_fold: Mapping[str, FloatArray], labels: IntArray) -> Combination:
    """Fits reader weights and class biases to out-of-fold predictions, shrunk towards the plain mean.

    Minimises the class-balanced cross-entropy plus a ridge on the distance from equal weights, so that few references
    change little.

    Args:
        out_of_fold: Reader -> log-probabilities of references it was not trained on, shape [references, classes].
        labels: True class, shape [references].
    """
    names = list(out_of_fold)
    stacked = np.stack([out_of_fold[name] for name in names])
    n_readers, _, n_classes = stacked.shape
    equal = np.full(n_readers, 1.0 / n_readers)
    if np.bincount(labels, minlength=n_classes).min() < FEWEST_PER_CLASS:
        return Combination(dict(zip(names, equal.tolist(), strict=True)), np.zeros(n_classes), fitted=False)
    balance = class_balance(labels, n_classes)
    target = np.eye(n_classes)[labels]

    def objective(parameters: FloatArray) -> tuple[float, FloatArray]:
        weights, bias = parameters[:n_readers], parameters[n_readers:]
        log_posterior = log_softmax(np.tensordot(weights, stacked, 1) + bias, axis=1)
        loss = -(balance * (target * log_posterior).sum(1)).sum()
        loss += _SHRINKAGE * ((weights - equal) ** 2).sum() + _BIAS_SHRINKAGE * (bias**2).sum()
        residual = balance[:, None] * (np.exp(log_posterior) - target)
        gradient = np.concatenate([(stacked * residual).sum((1, 2)), residual.sum(0)])
        gradient[:n_readers] += 2 * _SHRINKAGE * (weights - equal)
        gradient[n_readers:] += 2 * _BIAS_SHRINKAGE * bias
        return float(loss), gradient

    start = np.concatenate([equal, np.zeros(n_classes)])
    bounds = [(0.0, None)] * n_readers + [(None, None)] * n_classes
    options = {"ftol": 1e-12, "gtol": 1e-9}
    best = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return Combination(dict(zip(names, best.x[:n_readers].tolist(), strict=True)), best.x[n_readers:], fitted=True)


def log_odds(log_posterior: FloatArray, column: int = 0) -> FloatArray:
    """The log-odds log p - log(1 - p) of one class, computed without ever forming 1 - p; shape [rows]."""
    others = np.delete(log_posterior, column, axis=1)
    odds: FloatArray = log_posterior[:, column] - logsumexp(others, axis=1)
    return odds


def quality(log_posterior: FloatArray, labels: IntArray, classes: tuple[str, ...]) -> dict[str, object]:
    """How well held-out references are told apart: AUC of safe against each class, accuracy, cross-entropy."""
    odds = log_odds(log_posterior)
    safe = labels == 0
    auc = {
        name: float(roc_auc_score(safe[safe | (labels == k)], odds[safe | (labels == k)]))
        for k, name in enumerate(classes)
        if k > 0
    }
    right = log_posterior.argmax(1) == labels
    recall = {name: float(right[labels == k].mean()) for k, name in enumerate(classes)}
    return {
        "auc_safe_against": auc,
        "auc_safe_against_rest": float(roc_auc_score(safe, odds)),
        "recall": recall,
        "log_loss": log_loss(log_posterior, labels),
    }
