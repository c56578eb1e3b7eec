"""DSIR: importance of a row's words and word pairs for the safe references, against the pool. No model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer

from pharmacist.core.progress import track
from pharmacist.core.scripts import TOKEN
from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast1, Checked, Share
from pharmacist.data.arrays import FloatArray
from pharmacist.selectors.base import Scores, SelectionContext, Selector
from pharmacist.selectors.baselines import draws


if TYPE_CHECKING:
    import datasets
    import scipy.sparse

_BATCH = 4096


@dataclass
class DSIRConfig(Checked):
    """Options of the selector."""

    buckets: AtLeast1 = 10_000
    """Number of buckets into which words and word pairs are hashed."""
    smoothing: Share = 0.1
    """Share of the pool's own distribution mixed into that of the references, in (0, 1]; a word that no reference
    contains costs at most its logarithm."""
    per_word: bool = False
    """Divide a row's importance by its number of words and word pairs; otherwise long rows have the extreme scores."""
    resample: bool = True
    """Add Gumbel noise to the importance, which samples rows without replacement in proportion to it, as in the paper;
    otherwise the most important rows come first."""


class DSIRSelector(Selector):
    """Prefers rows whose words are more frequent in the safe references than in the pool."""

    Config = DSIRConfig
    name = "dsir"
    needs = frozenset({"safe"})
    paper = "Xie et al. 2023, arXiv 2302.03169"

    def rank(self, context: SelectionContext) -> Scores:
        """Counts hashed words and pairs of references and pool, then weighs every row; two passes over the text."""
        config, dataset = self.config, context.pool.dataset
        references = [f"{row['prompt']}\n{row['completion']}" for row in context.reference_rows("safe")]
        with context.run.phase("score"):
            target = ngram_counts(references, config.buckets).sum(0)
            raw = sum(ngram_counts(texts, config.buckets).sum(0) for texts in _texts(dataset, "counting words"))
            weights = log_ratio(np.asarray(target).ravel(), np.asarray(raw).ravel(), config.smoothing)
            parts = []
            for texts in _texts(dataset, "weighing rows"):
                counts = ngram_counts(texts, config.buckets)
                # A row without words says nothing either way.
                n = np.asarray(counts.sum(1)).ravel().clip(min=1) if config.per_word else 1
                parts.append(counts @ weights / n)
            importance: FloatArray = np.concatenate(parts)
        score = importance
        if config.resample:
            uniform = draws(dataset, derive(context.seed, "dsir", "gumbel"))
            score = importance - np.log(-np.log((uniform + 2**-54).clip(max=1 - 2**-53)))
        return Scores(score, signals={"log_importance": importance})


def _texts(dataset: "datasets.Dataset", what: str) -> Iterator[list[str]]:
    columns = dataset.select_columns(["prompt", "completion"])
    for start in track(range(0, len(columns), _BATCH), what):
        rows = columns[start : start + _BATCH]
        yield ["\n".join(pair) for pair in zip(rows["prompt"], rows["completion"], strict=True)]


def ngram_counts(texts: Sequence[str], buckets: int) -> "scipy.sparse.csr_matrix":
    """Hashed counts of words (signs count as words) and word pairs, in lower case; shape [texts, buckets]."""
    vectorizer = HashingVectorizer(
        n_features=buckets, ngram_range=(1, 2), token_pattern=TOKEN, norm=None, alternate_sign=False
    )
    return vectorizer.transform(texts)


def log_ratio(target: FloatArray, raw: FloatArray, smoothing: float) -> FloatArray:
    """log( (1 - s) p_target / p_raw + s ) of every bucket; 0 where neither has any.

    The target is mixed with the raw distribution, not with the uniform one: a few references leave most buckets empty,
    and the uniform distribution would count in favour of whatever is rare in the pool.

    From counts in references and pool, shape [buckets]; s is the smoothing.
    """
    seen = raw > 0
    ratio = np.ones(len(raw))
    ratio[seen] = (target[seen] / max(target.sum(), 1)) / (raw[seen] / raw.sum())
    return np.log((1 - smoothing) * ratio + smoothing)
