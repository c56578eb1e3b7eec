"""Is a request harmful? What references say of it, and how the pool itself answers this request and similar ones.

Word statistics and small models can hardly tell a harmful request from one that merely looks so. But a pool is full of
answers, and most of them are right: where other answers to the same or similar requests decline, the request is likely
to be harmful, and where they help, it is not. So a refusal among helpful answers stands out as an over-refusal, and
help among refusals as compliance, as a wrong label stands out in confident learning (Northcutt et al. 2021). No row
takes part in what is said of its own request.
"""

from dataclasses import dataclass

import numpy as np

from pharmacist.selectors.base import FloatArray


RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_CHUNK = 16384
LEAST_DOUBT = 0.02
"""No request is surer than that to be harmful or harmless."""


@dataclass(frozen=True)
class LeaveOneOut:
    """Predictions of a ridge regression for every row: of the one that lacks it, and of that on all rows; and the
    penalty whose held-out predictions were best.
    """

    held_out: FloatArray
    fitted: FloatArray
    ridge: float


def leave_one_out(features: FloatArray, targets: FloatArray, weights: FloatArray) -> LeaveOneOut:
    """Ridge regression with held-out predictions in closed form, the penalty chosen by them.

    With the hat matrix H of a weighted ridge regression, the prediction for row i by the regression without it is
    t_i - (t_i - f_i) / (1 - H_ii) (Allen 1974). A constant is added to the features; weights are positive.
    """
    starts = range(0, len(features), _CHUNK)

    def design(start: int) -> FloatArray:
        part = features[start : start + _CHUNK]
        return np.concatenate([part, np.ones((len(part), 1))], axis=1)

    width = features.shape[1] + 1
    gram, moments = np.zeros((width, width)), np.zeros(width)
    for start in starts:
        part, own = design(start), slice(start, start + _CHUNK)
        weighted = part * weights[own, None]
        gram += weighted.T @ part
        moments += weighted.T @ targets[own]
    values, vectors = np.linalg.eigh(gram)
    inverse = 1 / (values.clip(min=0)[:, None] + np.array(RIDGES))
    coefficients = inverse * (vectors.T @ moments)[:, None]
    fitted_by, leverage_by = (np.zeros((len(features), len(RIDGES))) for _ in range(2))
    for start in starts:
        own, rotated = slice(start, start + _CHUNK), design(start) @ vectors
        fitted_by[own], leverage_by[own] = rotated @ coefficients, rotated**2 @ inverse
    leverage = (weights[:, None] * leverage_by).clip(max=1 - 1e-9)
    held_out_by = targets[:, None] - (targets[:, None] - fitted_by) / (1 - leverage)
    best = int(np.argmin([np.sum(weights * (targets - held_out) ** 2) for held_out in held_out_by.T]))
    return LeaveOneOut(held_out_by[:, best], fitted_by[:, best], RIDGES[best])


def standardised(features: FloatArray) -> FloatArray:
    """Features with mean 0 and a total variance of 1."""
    deviation = features.std(0)
    scale = np.where(deviation > 1e-12, deviation, np.inf) * np.sqrt(features.shape[1])
    result: FloatArray = (features - features.mean(0)) / scale
    return result


def log_odds(probability: FloatArray) -> FloatArray:
    """Log-odds of predictions that may lie outside [0, 1], shape [rows]."""
    p = probability.clip(LEAST_DOUBT, 1 - LEAST_DOUBT)
    result: FloatArray = np.log(p / (1 - p))
    return result
