"""A plain text classifier, the baseline that costlier selectors must beat: a logistic regression on TF-IDF."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from pharmacist.core.progress import track
from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast0, Checked
from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.readers.question import quality, splits
from pharmacist.readers.views import Joined, Texts, Words
from pharmacist.selectors.base import Scores, SelectionContext, Selector
from pharmacist.selectors.pharmacist.questions import safe_log_odds
from pharmacist.selectors.pharmacist.references import CLASSES, REASONS, build_references


_BATCH = 8192
_REGULARISATION = 100.0


@dataclass
class ClassifierConfig(Checked):
    """Options of the selector."""

    folds: Annotated[int, Ge(2)] = 4
    """Cross-fitting folds, with which its quality on held-out references is measured."""
    corruptions_per_row: AtLeast0 = 2
    """Number of damaged versions of each safe reference; each utility reference gets half as many, rounded up."""


class ClassifierSelector(Selector):
    """TF-IDF and one logistic regression over the classes of the pharmacist selector's references; no model."""

    Config = ClassifierConfig
    name = "classifier"
    needs = frozenset({"safe", "harmful"})
    paper = "baseline"

    def rank(self, context: SelectionContext) -> Scores:
        references = build_references(
            {name: list(context.reference_rows(name)) for name in context.references},
            n_folds=self.config.folds,
            corruptions_per_row=self.config.corruptions_per_row,
            seed=derive(context.seed, "classifier"),
            echo=False,
        )
        texts = Texts([row["prompt"] for row in references.rows], [row["completion"] for row in references.rows])
        is_safe, held_out = (references.labels == 0).astype(np.int64), np.zeros((len(texts), len(CLASSES)))
        with context.run.phase("train classifier"):
            for rest, held in track(splits(is_safe, references.folds), "classifier, cross-fitting"):
                held_out[held] = _Model(texts.take(rest), references.labels[rest]).log_posterior(texts.take(held))
            model = _Model(texts, references.labels)
        with context.run.phase("score"):
            parts, dataset = [], context.pool.dataset
            for start in track(range(0, len(dataset), _BATCH), "classifying the pool"):
                rows = dataset[start : start + _BATCH]
                parts.append(model.log_posterior(Texts(rows["prompt"], rows["completion"])))
        posterior = np.concatenate(parts)
        seen = {REASONS[name] for name in references.counts()}
        return Scores(
            safe_log_odds(posterior),
            np.array(list(REASONS.values()))[posterior.argmax(1)],
            {f"p_{name}": np.exp(posterior[:, column]) for column, name in enumerate(CLASSES)},
            {
                "references": references.counts(),
                "held_out_by": "prompt",
                "cannot_see": [reason for reason in dict.fromkeys(REASONS.values()) if reason not in seen],
                "questions": {
                    "safe": {
                        "yes": int(is_safe.sum()),
                        "no": int((1 - is_safe).sum()),
                        "combined": quality(safe_log_odds(held_out), is_safe),
                    }
                },
            },
        )


class _Model:
    def __init__(self, texts: Texts, labels: IntArray) -> None:
        self._words = Joined(Words("prompts"), Words("completions")).fit(texts)
        self._regression = LogisticRegression(C=_REGULARISATION, class_weight="balanced", solver="newton-cg", tol=1e-8)
        self._regression.fit(self._words.features(texts), labels)

    def log_posterior(self, texts: Texts) -> FloatArray:
        """Log-probabilities of all classes, those without references as good as 0; shape [rows, classes]."""
        logits = np.full((len(texts), len(CLASSES)), -50.0)
        found = self._regression.decision_function(self._words.features(texts))
        logits[:, self._regression.classes_] = found if found.ndim > 1 else np.stack([-found, found], axis=1) / 2
        return np.asarray(log_softmax(logits, axis=1))
