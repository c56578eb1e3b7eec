"""A yes-or-no question about rows: several classifiers, their sum, its calibration, and its quality."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
from scipy.special import expit, log_expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from pharmacist.core.errors import DataError
from pharmacist.core.mappings import under
from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.data.normalise import normalised_prompt
from pharmacist.readers.views import Features, Reader, State, Texts, View


FAR = 0.9
"""AUC of telling some rows from references, from which they count as two sources."""
FEWEST_COMPARED, MOST_COMPARED = 20, 256
_COMPARING_FOLDS = 5


class Question:
    """A yes-or-no question, answered by several readers, all of which count the same.

    Their log-odds, each divided by its spread on held-out references, are added up, and the sum is calibrated on the
    same references. Weights fitted on held-out references would favour the reader that knows their source best.

    Attributes:
        readers: Readers by name.
        spread: Standard deviation of each reader's log-odds of held-out references.
        calibration: Slope and offset of the sum.
    """

    def __init__(self, views: Mapping[str, View]) -> None:
        self.readers = {name: Reader(view) for name, view in views.items()}
        self.spread: dict[str, float] = {}
        self.calibration = 0.0, 0.0

    def held_out(self, texts: Texts, answers: IntArray, folds: IntArray) -> dict[str, FloatArray]:
        """Log-odds of every reference by readers that did not see its fold, by reader; raises as `splits`."""
        found = {name: np.zeros(len(answers)) for name in self.readers}
        for rest, held in splits(answers, folds):
            known, unseen = texts.take(rest), texts.take(held)
            for name, reader in self.readers.items():
                found[name][held] = deepcopy(reader).fit(known, answers[rest]).log_odds(unseen)
        return found

    def learn(self, texts: Texts, answers: IntArray, folds: IntArray) -> tuple[FloatArray, dict[str, FloatArray]]:
        """Calibrates on references that are held out fold by fold, then trains the readers on all of them.

        Returns calibrated log-odds of the held-out references, shape [references], and those of each reader before;
        raises as `splits`.
        """
        held_out = self.held_out(texts, answers, folds)
        self.spread = {name: float(values.std()) or 1.0 for name, values in held_out.items()}
        self.calibration = calibration(self.combined(held_out), answers)
        for reader in self.readers.values():
            reader.fit(texts, answers)
        return self.calibrated(held_out), held_out

    def combined(self, by_reader: Mapping[str, FloatArray]) -> FloatArray:
        """The sum of all readers' log-odds, each over its spread; not calibrated, shape [rows]."""
        return np.asarray(np.sum([values / self.spread[name] for name, values in by_reader.items()], axis=0))

    def calibrated(self, by_reader: Mapping[str, FloatArray]) -> FloatArray:
        """Calibrated log-odds of yes, shape [rows]."""
        slope, offset = self.calibration
        return slope * self.combined(by_reader) + offset

    def log_odds(self, texts: Texts) -> FloatArray:
        """Calibrated log-odds of yes, shape [rows]."""
        return self.calibrated({name: reader.log_odds(texts) for name, reader in self.readers.items()})

    def state(self) -> State:
        """Tensors and JSON for `load`."""
        states = {name: reader.state() for name, reader in self.readers.items()}
        tensors = {f"{name}.{key}": value for name, (found, _) in states.items() for key, value in found.items()}
        content = {name: content for name, (_, content) in states.items()}
        return tensors, {"spread": self.spread, "calibration": self.calibration, "readers": content}

    def load(self, tensors: Mapping[str, FloatArray], content: Mapping[str, Any]) -> "Question":
        """Restores what `state` returned."""
        self.spread, self.calibration = dict(content["spread"]), tuple(content["calibration"])
        for name, reader in self.readers.items():
            reader.load(under(f"{name}.", tensors), content["readers"][name])
        return self


def can_be_held_out(answers: IntArray, folds: IntArray) -> bool:
    """Whether both answers are left whichever fold is held out."""
    return all(len(set(answers[folds != fold].tolist())) == 2 for fold in np.unique(folds))


def folds_of_sources(prompts: Iterable[str], sources: IntArray) -> list[int]:
    """The fold of each row where folds are sources, from 0; a prompt of several sources is in the first one's.

    Else rows would be held out whose prompts, or copies of which, are learned from another source.
    """
    keys = pd.Series([normalised_prompt(prompt) for prompt in prompts])
    first = pd.Series(sources).groupby(keys).transform("min")
    folds: list[int] = np.unique(first, return_inverse=True)[1].tolist()
    return folds


def splits(answers: IntArray, folds: IntArray) -> list[tuple[IntArray, IntArray]]:
    """The rows outside and inside of each fold; a DataError where only one answer is left without some fold."""
    if not can_be_held_out(answers, folds):
        raise DataError("the references have too few different prompts to hold some out; give more")
    return [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in np.unique(folds)]


def calibration(held_out: FloatArray, answers: IntArray) -> tuple[float, float]:
    """Slope (not negative) and offset that calibrate held-out log-odds (Platt 1999); both answers weigh the same."""
    model = LogisticRegression(C=1.0, class_weight="balanced", tol=1e-10).fit(held_out[:, None], answers)
    slope = float(model.coef_[0, 0])
    return (slope, float(model.intercept_[0])) if slope > 0 else (0.0, 0.0)


def quality(log_odds: FloatArray, answers: IntArray) -> dict[str, float]:
    """How well held-out rows are told apart by one question: AUC, shares found, cross-entropy (balanced, in nats)."""
    yes = answers == 1
    p = expit(log_odds)
    loss = -np.where(yes, log_expit(log_odds), log_expit(-log_odds))
    return {
        "auc": float(roc_auc_score(yes, log_odds)),
        "yes_found": float((p[yes] > 0.5).mean()),
        "no_found": float((p[~yes] <= 0.5).mean()),
        "log_loss": float((loss[yes].mean() + loss[~yes].mean()) / 2),
    }


def told_apart(known: Features, others: Features, regularisation: float) -> float | None:
    """How well a logistic regression tells some rows from references, by their features: cross-validated AUC.

    0.5 where nothing tells them apart, 1 where they are unlike; None where either are fewer than `FEWEST_COMPARED`.
    """
    sizes = known.shape[0], others.shape[0]
    if min(sizes) < FEWEST_COMPARED:
        return None
    features = (scipy.sparse.vstack if scipy.sparse.issparse(known) else np.concatenate)([known, others])
    where = np.repeat([1, 0], sizes)
    model = LogisticRegression(C=regularisation, class_weight="balanced", max_iter=2000)
    folds = StratifiedKFold(_COMPARING_FOLDS, shuffle=True, random_state=0)
    guessed = cross_val_predict(model, features, where, cv=folds, method="decision_function")
    return float(roc_auc_score(where, guessed))


def compared(rows: IntArray) -> IntArray:
    """At most `MOST_COMPARED` of some rows, spread evenly."""
    return np.asarray(rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST_COMPARED)).astype(int)])
