"""A plain text classifier: word statistics into a logistic regression, the peer that costlier selectors must beat."""

from dataclasses import dataclass

import numpy as np

from pharmacist.core.errors import ConfigError
from pharmacist.core.progress import track
from pharmacist.core.seeding import derive
from pharmacist.selectors.base import FloatArray, Scores, SelectionContext, Selector
from pharmacist.selectors.evidence.classes import REASONS, EvidenceReferences, build_references
from pharmacist.selectors.evidence.combine import log_odds, quality
from pharmacist.selectors.evidence.readers.lexical import LexicalReader


_BATCH = 8192


@dataclass
class ClassifierConfig:
    """Options of the selector."""

    folds: int = 4
    """Cross-fitting folds, by which its quality on held-out references is measured."""
    corruptions_per_row: int = 2
    """Damaged versions made of each safe reference, and half as many of each utility reference."""

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ConfigError(f"selector.folds must be at least 2, not {self.folds}")


class Classifier(Selector):
    """TF-IDF and logistic regression on the five classes of evidence that the pharmacist selector learns; no model."""

    Config = ClassifierConfig
    needs = frozenset({"safe", "harmful"})
    paper = "baseline"

    def __init__(self, config: ClassifierConfig) -> None:
        self.config = config

    def rank(self, context: SelectionContext) -> Scores:
        """Learns from the references alone, then reads the pool's text once."""
        given = {name: context.reference_rows(name) for name in context.references}
        references = build_references(
            given, n_folds=self.config.folds, corruptions_per_row=self.config.corruptions_per_row,
            seed=derive(context.seed, "classifier"), echo=False,
        )  # fmt: skip
        classes = references.classes
        with context.run.phase("train classifier"):
            reader, held_out = _fit(references)
        with context.run.phase("score"):
            parts, dataset = [], context.pool.dataset
            for start in track(range(0, len(dataset), _BATCH), "classifying the pool"):
                rows = dataset[start : start + _BATCH]
                parts.append(reader.log_posterior(rows["prompt"], rows["completion"]))
        posterior = np.concatenate(parts)
        return Scores(
            log_odds(posterior), np.array([REASONS[name] for name in classes])[posterior.argmax(1)],
            {f"p_{name}": np.exp(posterior[:, column]) for column, name in enumerate(classes)},
            {
                "references": references.counts(),
                "cannot_see": [REASONS[name] for name in REASONS if name not in classes],
                "out_of_fold": {"combined": quality(held_out, references.labels, classes)},
            },
        )  # fmt: skip


def _fit(references: EvidenceReferences) -> tuple[LexicalReader, FloatArray]:
    """The reader trained on all references, and log-probabilities of each by one that did not see its fold."""
    prompts = np.array([row["prompt"] for row in references.rows], dtype=object)
    completions = np.array([row["completion"] for row in references.rows], dtype=object)
    n_classes = len(references.classes)

    def trained(rows: np.ndarray) -> LexicalReader:
        return LexicalReader(echo=False).fit(prompts[rows], completions[rows], references.labels[rows], n_classes)

    held_out = np.zeros((len(prompts), n_classes))
    for fold in track(range(references.n_folds), "classifier, cross-fitting"):
        held = references.folds == fold
        held_out[held] = trained(~held).log_posterior(prompts[held], completions[held])
    return trained(np.ones(len(prompts), dtype=np.bool_)), held_out
