"""By likeness to the safe references, in the base model's own hidden states. One forward pass."""

from dataclasses import dataclass

import numpy as np

from pharmacist.core.errors import ConfigError
from pharmacist.core.typed import AtLeast0, Checked
from pharmacist.data.records import to_dataset
from pharmacist.selectors.base import RANKED, FloatArray, Scores, SelectionContext, Selector
from pharmacist.selectors.embeddings import embed, unit


@dataclass
class EmbeddingConfig(Checked):
    """Options of the selector."""

    nearest: AtLeast0 = 0
    """Average the cosine to that many nearest references; 0 takes the cosine to the centroid of all."""


class EmbeddingSelector(Selector):
    """Prefers rows whose embedding points where those of the safe references point."""

    Config = EmbeddingConfig
    name = "embedding"
    needs = frozenset({"safe", "embedder"})
    paper = "representation-based data selection, as a baseline in Xia et al. 2024, arXiv 2402.04333"

    def rank(self, context: SelectionContext) -> Scores:
        """Reads the references, then the pool once."""
        references, nearest = context.reference_rows("safe"), self.config.nearest
        if nearest > len(references):
            raise ConfigError(f"selector.nearest {nearest}: there are {len(references)} safe references")
        known = embed(context, to_dataset(references), "safe-embeddings", unit)
        score = embed(context, context.pool.dataset, "likeness", lambda states: likeness(unit(states), known, nearest))
        return Scores(score, np.full(len(score), RANKED))


def likeness(states: FloatArray, references: FloatArray, nearest: int) -> FloatArray:
    """Cosine to the references' centroid, or mean cosine to the nearest of them; shape [rows].

    Args:
        states: Of length 1, shape [rows, width].
        references: Of length 1, shape [references, width].
        nearest: How many; 0 for the centroid.
    """
    if nearest == 0:
        centroid: FloatArray = states @ unit(references.mean(0, keepdims=True))[0]
        return centroid
    closest: FloatArray = np.sort(states @ references.T, axis=1)[:, -nearest:].mean(1)
    return closest
