"""The question ``risky``, is a request harmful: answered from references, labels and the pool's own answers.

Word statistics and small models can hardly tell a harmful request from one that merely looks so. But a pool is full of
answers, and most of them are right: where other answers to the same or similar requests decline, the request is likely
to be harmful, and where they help, it is not. So a refusal among helpful answers stands out as an over-refusal, and
help among refusals as compliance, as a wrong label stands out in confident learning (Northcutt et al. 2021). No row
takes part in what is said of its own request.
"""

from collections.abc import Iterator

import numpy as np
from scipy.special import expit, logit
from sklearn.decomposition import TruncatedSVD

from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.readers.question import Question, splits
from pharmacist.readers.views import Texts, framed, vectorizer
from pharmacist.selectors.pharmacist.questions import LABEL_WEIGHT, RISKY, Labels


RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_CHUNK = 16384
LEAST_DOUBT = 0.02
"""Least probability of either answer."""
_WIDTH = 256
_NO_WEIGHT = 1e-12


class RequestQuestion(Question):
    """A ridge regression on features of the requests, fitted on references and pool together.

    The readers see words of a request (``lexical``), its hidden states (``probe``), or both.
    """

    def __init__(self, readers: tuple[str, ...]) -> None:
        super().__init__({})
        self._names = readers

    def features(self, references: Texts, pool: Texts) -> FloatArray:
        """Standardised features, the references' first, shape [references + rows, features]."""
        both = references + pool
        blocks = []
        if "probe" in self._names and both.states is not None:
            blocks.append(standardised(both.states[:, :2].reshape(len(both), -1).astype(np.float64)))
        if "lexical" in self._names:
            words = vectorizer().fit_transform([framed(prompt) for prompt in both.prompts])
            width = min(_WIDTH, *(n - 1 for n in words.shape))
            blocks.append(standardised(TruncatedSVD(width, random_state=0).fit_transform(words)))
        return np.concatenate(blocks, axis=1)

    def held_out(self, texts: Texts, answers: IntArray, folds: IntArray) -> dict[str, FloatArray]:
        """As in `Question`; a fold takes the place of the pool, and its answers say nothing."""
        found = np.zeros(len(answers))
        for rest, held in splits(answers, folds):
            targets = np.concatenate([answers[rest], np.full(len(held), 0.5)])
            weights = np.repeat([1.0, _NO_WEIGHT], [len(rest), len(held)])
            features = self.features(texts.take(rest), texts.take(held))
            found[held] = log_odds(leave_one_out(features, targets, weights)[1][len(rest) :])
        return {"requests": found}

    def of_pool(self, features: FloatArray, known: IntArray, refuses: FloatArray, labels: Labels) -> FloatArray:
        """Log-odds that the requests of a pool are harmful, shape [rows], from `features` and labels of its rows.

        `known` are the references' answers (1 or 0), `refuses` log-odds that a row's answer declines, shape [rows].
        """
        targets, weights = np.concatenate([known, expit(refuses)]), np.ones(len(features))
        rows, answers = labels.answering(RISKY)
        labelled = len(known) + rows
        targets[labelled], weights[labelled] = answers, LABEL_WEIGHT
        held_out, fitted = leave_one_out(features, targets, weights)
        predicted = held_out[len(known) :].copy()
        predicted[rows] = fitted[labelled]
        return log_odds(predicted)


def leave_one_out(features: FloatArray, targets: FloatArray, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Predictions of a ridge regression for every row, without the row and with it, shape [rows] each.

    Those without the row are in closed form, and choose the penalty out of `RIDGES`.

    With the hat matrix H of a weighted ridge regression, the prediction for row i by the regression without it is
    t_i - (t_i - f_i) / (1 - H_ii) (Allen 1974). A constant is added to the features; weights are positive.
    """

    def designs() -> Iterator[tuple[slice, FloatArray]]:  # in chunks, since copies of all features would not fit
        for start in range(0, len(features), _CHUNK):
            part = features[start : start + _CHUNK]
            yield slice(start, start + _CHUNK), np.column_stack([part, np.ones(len(part))])

    gram = sum((part * weights[chunk, None]).T @ part for chunk, part in designs())
    moments = sum((part * weights[chunk, None]).T @ targets[chunk] for chunk, part in designs())
    values, vectors = np.linalg.eigh(gram)
    inverse = 1 / (values.clip(min=0)[:, None] + np.array(RIDGES))
    coefficients = inverse * (vectors.T @ moments)[:, None]
    fitted_by, leverage_by = (np.zeros((len(features), len(RIDGES))) for _ in range(2))
    for chunk, part in designs():
        rotated = part @ vectors
        fitted_by[chunk], leverage_by[chunk] = rotated @ coefficients, rotated**2 @ inverse
    leverage = (weights[:, None] * leverage_by).clip(max=1 - 1e-9)
    held_out_by = targets[:, None] - (targets[:, None] - fitted_by) / (1 - leverage)
    best = int(np.argmin([np.sum(weights * (targets - held_out) ** 2) for held_out in held_out_by.T]))
    return held_out_by[:, best], fitted_by[:, best]


def standardised(features: FloatArray) -> FloatArray:
    """Features with mean 0 and a total variance of 1."""
    deviation = features.std(0)
    scale = np.where(deviation > 1e-12, deviation, np.inf) * np.sqrt(features.shape[1])
    return np.asarray((features - features.mean(0)) / scale)


def log_odds(probability: FloatArray) -> FloatArray:
    """Log-odds of predictions that may lie outside [0, 1], shape [rows]."""
    return np.asarray(logit(probability.clip(LEAST_DOUBT, 1 - LEAST_DOUBT)))
