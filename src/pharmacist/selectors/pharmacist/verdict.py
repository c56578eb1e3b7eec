"""The verdict: scores and reasons of a pool's rows from the answers to the questions."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from pharmacist.selectors.base import CRITICAL, Scores
from pharmacist.selectors.pharmacist import trust
from pharmacist.selectors.pharmacist.evidence import Answers, Labels
from pharmacist.selectors.pharmacist.questions import (
    QUESTIONS,
    REFUSES,
    RISKY,
    WHOLE,
    class_log_posterior,
    pool_priors,
    safe_log_odds,
    with_priors,
)
from pharmacist.selectors.pharmacist.references import CLASSES, REASONS


FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_REASONS = np.array(list(REASONS.values()))


def verdict(answers: Answers, labels: Labels, inverse: IntArray, learned: dict[str, Any]) -> Scores:
    """Scores, reasons and what is to be known about them.

    Args:
        answers: Of the pool's distinct rows.
        labels: What a person said of some of them.
        inverse: For each row of the pool, which of the distinct ones it is; shape [rows of the pool].
        learned: `Evidence.report`.
    """
    posterior = class_log_posterior(answers.log_odds, answers.typical)
    shares = pool_priors(posterior[inverse])
    p = np.exp(with_priors(posterior, shares))
    p[labels.rows] = np.eye(len(CLASSES))[labels.classes]
    read = _REASONS[posterior.argmax(1)]
    ordered = both(safe_log_odds(posterior), _clarity(answers.log_odds, read == CRITICAL), read)
    score, reasons = honoured(ordered, read, labels.rows, labels.classes)
    signals: dict[str, npt.NDArray[Any]] = {f"p_{name}": p[:, number] for number, name in enumerate(CLASSES[:4])} | {
        "p_corrupted": p[:, 4:].sum(1)
    }
    signals |= {question: expit(answers.log_odds[:, number]) for number, question in enumerate(QUESTIONS)}
    signals |= answers.by_reader
    report = learned | {
        "shares": {name: float(share) for name, share in zip(CLASSES, shares, strict=True)},
        "distance": answers.distance,
        "near": answers.near,
        "cannot_see": _unseen(learned),
    }
    if answers.labels_held_out is not None:
        report["labels"] = trust.gain(*answers.labels_held_out, labels.classes == 0)
    warnings = trust.warnings(report, reasons[inverse])
    telling = _telling(answers.log_odds, labels)
    of_rows = {name: values[inverse] for name, values in signals.items()}
    return Scores(score[inverse], reasons[inverse], of_rows, report, warnings, telling[inverse])


def both(evidence: FloatArray, second: FloatArray, reason: npt.NDArray[np.str_]) -> FloatArray:
    """Evidence throws out faults, it and a second measure order the rest.

    Rows whose reason is critical come first, by the sum of both, each standardised over those rows; the others follow
    by evidence alone, standardised over them. One row's score means little without its pool.

    Args:
        evidence: Log-odds of the safe class, shape [rows].
        second: `_clarity`, or the twins' contrast (loss under the other twin less that under the safe one), shape
            [rows].
        reason: Shape [rows].
    """
    critical = reason == CRITICAL
    score = np.empty(len(reason))
    score[~critical] = _standardised(evidence[~critical])
    score[critical] = _standardised(evidence[critical]) + _standardised(second[critical])
    if critical.any() and not critical.all():
        # A constant for all critical rows: lifts the lowest of them just above the best of the others.
        score[critical] += max(0.0, score[~critical].max() - score[critical].min() + 1e-6)
    return score


def _clarity(log_odds: FloatArray, critical: npt.NDArray[np.bool_]) -> FloatArray:
    """How clearly a critical row answers the two questions that make it so, shape [rows].

    That a row has no fault is not all: the clearer refusals of clearer requests harden a model more.
    """
    result = np.zeros(len(critical))
    for question in (RISKY, REFUSES):
        result[critical] += _standardised(log_odds[critical, QUESTIONS.index(question)])
    return result


def honoured(
    score: FloatArray, reason: npt.NDArray[np.str_], rows: IntArray, classes: IntArray
) -> tuple[FloatArray, npt.NDArray[np.str_]]:
    """Scores and reasons with what a person said of some rows: good ones above all that was merely read, bad ones
    below it.

    Args:
        score: Shape [rows of the pool].
        reason: Shape [rows of the pool].
        rows: The labelled ones.
        classes: Index into `CLASSES` of each.
    """
    score, reason = score.copy(), reason.astype(_REASONS.dtype)
    score[rows] = np.where(classes == 0, score.max() + 1, score.min() - 1)
    reason[rows] = _REASONS[classes]
    return score, reason


def _telling(log_odds: FloatArray, labels: Labels) -> FloatArray:
    """How much a label of each row would teach: the entropy of the answers, question by question, in nats; a row that
    has a label teaches nothing more.
    """
    p = expit(log_odds).clip(1e-12, 1 - 1e-12)
    entropy: FloatArray = -(p * np.log(p) + (1 - p) * np.log1p(-p)).sum(1)
    entropy[labels.rows] = -1.0
    return entropy


def _unseen(learned: dict[str, Any]) -> list[str]:
    """Reasons that cannot be given, since no reference answers their question by no."""
    return [] if WHOLE in learned["questions"] else [REASONS["corrupted"]]


def _standardised(values: FloatArray) -> FloatArray:
    if not len(values):
        return values
    sample = np.sort(values)  # the sums are then the same in whatever order the rows came
    scale = sample.std()
    result: FloatArray = (values - sample.mean()) / (scale if scale > 0 else 1.0)
    return result
