"""Distance between a pool and the references, and how far answers learned from references are trusted there."""

import numpy as np

from pharmacist.data.arrays import FloatArray
from pharmacist.readers.question import FAR, compared, told_apart
from pharmacist.readers.states import PARTS
from pharmacist.readers.views import States, Texts, View, Words
from pharmacist.selectors.pharmacist.questions import PERTINENT, QUESTIONS, REFUSES, RISKY, WHOLE


NEAR = 0.75
"""AUC of telling pool and references apart up to which they look like one source; from `FAR` like two."""
_OUTLIER = 4.0
_TEMPER, _CAUTION = 0.75, 1.0
"""Chosen on natural pools with human labels (docs, "Natural answers"); all else follows from references."""


def distance(safe: Texts, critical: Texts) -> dict[str, float] | None:
    """AUC with which a classifier tells critical-looking rows of a pool from safe references, per question.

    0.5 where nothing tells their requests (``risky``) or answers (``refuses``) apart, 1 where they are unlike each
    other; None where either are too few.
    """
    both = safe + critical.take(compared(np.arange(len(critical))))
    found = {}
    for question, words, parts in ((RISKY, "prompts", PARTS[:2]), (REFUSES, "completions", PARTS[2:])):
        view: View = Words(words) if both.states is None else States(parts)
        features = view.fit(both).features(both)
        auc = told_apart(features[: len(safe)], features[len(safe) :], view.regularisation)
        if auc is None:
            return None
        found[question] = auc
    return found


def nearness(found: dict[str, float] | None) -> float:
    """Likeness of two sources by their `distance`: 1 where they look like one source, 0 where they look like two."""
    return 0.0 if found is None else float(np.clip((FAR - max(found.values())) / (FAR - NEAR), 0, 1))


def adjusted_for_distance(log_odds: FloatArray, near: float) -> FloatArray:
    """Log-odds of the questions, adjusted: the less the pool resembles the references, the less these are trusted.

    Elsewhere answers are taken for refusals with more doubt: log-odds that held-out references of the same source
    calibrated are tempered, and lowered by `_CAUTION`, since what passes for a refusal is trained on. What damage
    looks like is learned from the references' own texts. In a pool from another source, log-odds of whole and
    pertinent text are taken by their distance from the pool's median, in robust standard deviations, so that a row is
    doubted that lies `_OUTLIER` of them below. With `near` 1 the log-odds, shape [rows, questions], stay as they are.
    """
    result = log_odds.copy()
    column = QUESTIONS.index(REFUSES)
    refuses = log_odds[:, column]
    result[:, column] = near * refuses + (1 - near) * (_TEMPER * refuses - _CAUTION)
    for column in (QUESTIONS.index(WHOLE), QUESTIONS.index(PERTINENT)):
        values = log_odds[:, column]
        centre = np.median(values)
        deviation = 1.4826 * np.median(np.abs(values - centre))
        outlying = (values - centre) / (deviation if deviation > 0 else 1.0) + _OUTLIER
        result[:, column] = near * values + (1 - near) * outlying
    return result
