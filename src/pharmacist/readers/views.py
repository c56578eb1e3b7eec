"""Readers: a reader is a view, the features of one part of a row, and a logistic regression on it."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from pharmacist.core.mappings import under
from pharmacist.core.scripts import TOKEN, WORD_AND_SPACE
from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.readers.states import PARTS


Features: TypeAlias = Any
"""A dense or sparse (csr) matrix, shape [rows, features]."""
State: TypeAlias = tuple[dict[str, FloatArray], dict[str, Any]]
"""A learned state: tensors, and content for JSON."""

OPENING_WORDS = 10
"""How far an answer is read for how it begins: whether it declines is mostly said there, whatever its length."""
LONGEST_REFERENCE = 100
"""Words of a reference's completion that are read, to the end of a sentence: sources differ in length more than in
anything else, and long references cost as much as a pool."""
_WORD = re.compile(WORD_AND_SPACE)


@dataclass(frozen=True)
class Texts:
    """Rows as readers see them.

    States are as `states.hidden_states` gives them, shape [rows, parts, width], and so are statistics, shape [rows,
    statistics]; None without a model.
    """

    prompts: Sequence[str]
    completions: Sequence[str]
    states: npt.NDArray[np.floating[Any]] | None = None
    statistics: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: IntArray) -> "Texts":
        """Some of the rows."""
        return Texts(
            [self.prompts[i] for i in rows],
            [self.completions[i] for i in rows],
            None if self.states is None else self.states[rows],
            None if self.statistics is None else self.statistics[rows],
        )

    def __add__(self, other: "Texts") -> "Texts":
        both = self.states is not None and other.states is not None
        return Texts(
            [*self.prompts, *other.prompts],
            [*self.completions, *other.completions],
            np.concatenate([self.states, other.states]) if both else None,
            np.concatenate([self.statistics, other.statistics]) if both else None,
        )


def shortened(text: str, words: int) -> str:
    r"""The leading whole sentences of a text, as many as fit into so many words; at least the first.

    >>> shortened("It rains. Take a coat with you. Or stay.", 7)
    'It rains. Take a coat with you.'
    """
    sentences = re.split(r"(?<=[.!?…])\s+|\n+", text.strip())
    lengths = np.cumsum([len(sentence.split()) for sentence in sentences])
    kept = max(1, int(np.searchsorted(lengths, words, side="right")))
    return text.strip() if kept >= len(sentences) else " ".join(sentences[:kept]).strip() or text


def opening(text: str) -> str:
    """The first `OPENING_WORDS` words of a text; of a script without spaces, by the usual length of its words."""
    return "".join(_WORD.findall(" ".join(text.split()[:OPENING_WORDS]))[:OPENING_WORDS]).strip()


def vectorizer(vocabulary: dict[str, int] | None = None) -> TfidfVectorizer:
    """TF-IDF of words and word pairs; punctuation counts too, since debris is evidence."""
    return TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=TOKEN, vocabulary=vocabulary, dtype=np.float64
    )


def framed(text: str) -> str:
    """Marks start and end, so that how a text begins and ends is a word pair like any other."""
    return f"\x02 {text} \x03"


class View(Protocol):
    """The features of rows that a regression works on."""

    @property
    def regularisation(self) -> float:
        """Of the regression (scikit-learn's C)."""

    def fit(self, texts: Texts) -> "View":
        """Learns vocabulary, location, scale, or whatever `features` needs."""

    def features(self, texts: Texts) -> Features:
        """Shape [rows, features]."""

    def state(self) -> State:
        """Tensors and JSON for `load`."""

    def load(self, tensors: Mapping[str, FloatArray], content: Mapping[str, Any]) -> "View":
        """Restores what `state` returned."""


class Words:
    """TF-IDF of one part of a row.

    Args:
        part: ``prompts`` or ``completions``.
        opening: Read the first words only.
        regularisation: scikit-learn's C; rows have unit length, and rare words tell.
    """

    def __init__(self, part: str, *, opening: bool = False, regularisation: float = 100.0) -> None:
        self._part, self._opening, self.regularisation = part, opening, regularisation
        self._vectorizer = vectorizer()

    def _text(self, texts: Texts) -> list[str]:
        found: Sequence[str] = getattr(texts, self._part)
        return [framed(opening(text) if self._opening else text) for text in found]

    def fit(self, texts: Texts) -> "Words":
        self._vectorizer.fit(self._text(texts))
        return self

    def features(self, texts: Texts) -> Features:
        return self._vectorizer.transform(self._text(texts))

    @property
    def known(self) -> frozenset[str]:
        """The single words that it has seen."""
        return frozenset(term for term in self._vectorizer.get_feature_names_out() if " " not in term)

    def state(self) -> State:
        words = list(self._vectorizer.get_feature_names_out())
        return {"idf": self._vectorizer.idf_}, {"vocabulary": words}

    def load(self, tensors: Mapping[str, FloatArray], content: Mapping[str, Any]) -> "Words":
        self._vectorizer = vectorizer({word: column for column, word in enumerate(content["vocabulary"])})
        self._vectorizer.idf_ = tensors["idf"]
        return self


class States:
    """Standardised hidden states of some parts of a row, and, where `statistics`, how well its text holds together.

    `parts` are of `states.PARTS`; statistics get a quarter of the variance, or thousands of states would drown them.
    """

    regularisation: ClassVar[float] = 5.0  # scikit-learn's C for rows whose features have a total variance of 1

    def __init__(self, parts: Sequence[str], *, statistics: bool = False) -> None:
        self._parts, self._statistics = [PARTS.index(part) for part in parts], statistics
        self._mean = self._scale = np.zeros(0)

    def _raw(self, texts: Texts) -> list[FloatArray]:
        assert texts.states is not None and texts.statistics is not None
        states = texts.states[:, self._parts].reshape(len(texts), -1).astype(np.float64)
        return [states, texts.statistics] if self._statistics else [states]

    def fit(self, texts: Texts) -> "States":
        blocks = self._raw(texts)
        widths = np.array([block.shape[1] for block in blocks])
        share = np.repeat((np.array([0.75, 0.25]) if self._statistics else np.ones(1)) / widths, widths)
        self._mean = np.concatenate([block.mean(0) for block in blocks])
        deviation = np.concatenate([block.std(0) for block in blocks])
        self._scale = np.where(deviation > 1e-12, deviation, 1.0) / np.sqrt(share)
        return self

    def features(self, texts: Texts) -> Features:
        return (np.concatenate(self._raw(texts), axis=1) - self._mean) / self._scale

    def state(self) -> State:
        return {"mean": self._mean, "scale": self._scale}, {}

    def load(self, tensors: Mapping[str, FloatArray], content: Mapping[str, Any]) -> "States":
        self._mean, self._scale = tensors["mean"], tensors["scale"]
        return self


class Joined:
    """Several views of text, joined column by column."""

    regularisation: ClassVar[float] = 100.0

    def __init__(self, *views: View) -> None:
        self._views = views

    def fit(self, texts: Texts) -> "Joined":
        for view in self._views:
            view.fit(texts)
        return self

    def features(self, texts: Texts) -> Features:
        blocks = [scipy.sparse.csr_matrix(view.features(texts)) for view in self._views]
        return scipy.sparse.hstack(blocks, format="csr")

    def state(self) -> State:
        states = [view.state() for view in self._views]
        tensors = {f"{i}.{key}": value for i, (found, _) in enumerate(states) for key, value in found.items()}
        return tensors, {"views": [content for _, content in states]}

    def load(self, tensors: Mapping[str, FloatArray], content: Mapping[str, Any]) -> "Joined":
        for i, (view, own) in enumerate(zip(self._views, content["views"], strict=True)):
            view.load(under(f"{i}.", tensors), own)
        return self


def fit_logistic(
    features: Features, answers: IntArray, weights: FloatArray, regularisation: float
) -> tuple[FloatArray, float]:
    """Logistic regression in which both answers weigh the same.

    Both answers (1 or 0) occur; scikit-learn's C is for rows of a mean weight of 1. Returns coefficients, shape
    [features], and intercept.
    """
    total = np.array([weights[answers == 0].sum(), weights[answers == 1].sum()])
    balanced = weights * (len(weights) / 2 / total)[answers]
    # Newton's method finds the optimum to the last digits; where L-BFGS stops, one of two equal answers is favoured.
    model = LogisticRegression(C=regularisation, solver="newton-cg", max_iter=1000, tol=1e-12)
    with warnings.catch_warnings():
        # The last step may find nothing better but rounding.
        warnings.filterwarnings("ignore", "Line Search failed|The line search|Rounding errors prevent")
        model.fit(features, answers, sample_weight=balanced)
    return model.coef_[0], float(model.intercept_[0])


def into_row_space(features: Features) -> tuple[Features, Callable[[FloatArray], FloatArray]]:
    """Rotates more features than rows into as many as rows; also returns the function that rotates coefficients back.

    An L2 penalty does not see rotations, and the optimum lies in the span of the rows: the regression is the same, at
    a cost that no longer grows with the vocabulary or the model's width.
    """
    n_rows, n_features = features.shape
    if n_features <= n_rows:
        return features, lambda coefficients: coefficients
    gram: Any = features @ features.T
    values, vectors = np.linalg.eigh(gram.toarray() if scipy.sparse.issparse(gram) else gram)
    kept = values > 1e-12 * max(values[-1], 1e-300)
    root, basis = np.sqrt(values[kept]), vectors[:, kept]

    def back(coefficients: FloatArray) -> FloatArray:
        return np.asarray(features.T @ (basis @ (coefficients / root)))

    return basis * root, back


class Reader:
    """A view of a row and a logistic regression on it."""

    def __init__(self, view: View) -> None:
        self.view, self.regularisation, self.features = view, view.regularisation, view.features
        self.coefficients: tuple[FloatArray, float] = (np.zeros(0), 0.0)
        """Per feature, and the intercept."""

    def fit(self, texts: Texts, answers: IntArray) -> "Reader":
        """Learns one question, and nothing else, from rows with known answers (1 or 0), shape [rows]."""
        rotated, back = into_row_space(self.view.fit(texts).features(texts))
        coefficients, intercept = fit_logistic(rotated, answers, np.ones(len(answers)), self.regularisation)
        self.coefficients = back(coefficients), intercept
        return self

    def log_odds(self, texts: Texts) -> FloatArray:
        """Log-odds of yes, not calibrated, shape [rows]."""
        coefficients, intercept = self.coefficients
        return np.asarray(self.features(texts) @ coefficients + intercept)

    def state(self) -> State:
        """Tensors and JSON for `load`."""
        tensors, content = self.view.state()
        coefficients, intercept = self.coefficients
        return tensors | {"coefficients": coefficients, "intercept": np.array([intercept])}, content

    def load(self, tensors: Mapping[str, FloatArray], content: Mapping[str, Any]) -> "Reader":
        """Restores what `state` returned."""
        self.view.load(tensors, content)
        self.coefficients = tensors["coefficients"], float(tensors["intercept"][0])
        return self
