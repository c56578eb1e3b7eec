"""The lexical reader: word statistics of prompt and completion, and how the one takes up the other's words, into a
logistic regression. No model, no GPU.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
from safetensors.numpy import load_file, save_file
from scipy.special import log_softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from pharmacist.core.files import atomic_path, read_json, write_json
from pharmacist.selectors.evidence.echo import echo_features


FloatArray = npt.NDArray[np.float64]

_PARTS = ("prompt", "completion")
_ECHO = ("own prompt's words", "other prompts' words")
_REGULARISATION = 100.0  # scikit-learn's C; TF-IDF rows have unit length, and the classes are told apart by rare words


def _vectorizer(vocabulary: dict[str, int] | None = None) -> TfidfVectorizer:
    # Single characters count as words too: punctuation and debris are evidence here.
    return TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]+", vocabulary=vocabulary, dtype=np.float64
    )


def _framed(text: str) -> str:
    """Marks start and end, so that how a text begins and ends is a word pair like any other."""
    return f"\x02 {text} \x03"


def fit_logistic(
    features: FloatArray | scipy.sparse.spmatrix, labels: npt.NDArray[np.int64], n_classes: int, regularisation: float
) -> tuple[FloatArray, FloatArray]:
    """Class-balanced multinomial logistic regression.

    Args:
        features: Shape [rows, features].
        labels: Shape [rows]; a class without rows gets probability 0.
        n_classes: How many classes.
        regularisation: scikit-learn's C.

    Returns:
        Coefficients, shape [classes, features], and intercepts, shape [classes].
    """
    # Newton's method finds the optimum to the last digits; where L-BFGS stops, one of two equal classes is favoured.
    model = LogisticRegression(
        C=regularisation, class_weight="balanced", solver="newton-cg", max_iter=1000, tol=1e-12
    )  # fmt: skip
    with warnings.catch_warnings():
        # The last step may find nothing better but rounding.
        warnings.filterwarnings("ignore", "Line Search failed|The line search|Rounding errors prevent")
        rotated, back = _into_row_space(features)
        model.fit(rotated, labels)
    coefficients, intercept = back(model.coef_), model.intercept_
    if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    all_coefficients = np.zeros((n_classes, coefficients.shape[1]))
    all_intercepts = np.full(n_classes, -50.0)  # as good as probability 0, and still finite
    all_coefficients[model.classes_], all_intercepts[model.classes_] = coefficients, intercept
    return all_coefficients, all_intercepts


def _into_row_space(
    features: FloatArray | scipy.sparse.spmatrix,
) -> tuple[FloatArray | scipy.sparse.spmatrix, Callable[[FloatArray], FloatArray]]:
    """Turns more features than rows into as many as rows, by a rotation, and tells how to turn coefficients back.

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
        over_rows = (coefficients / root) @ basis.T
        result: FloatArray = np.asarray((features.T @ over_rows.T).T)
        return result

    return basis * root, back


class LexicalReader:
    """TF-IDF of words and word pairs, prompt and completion apart, into a multinomial logistic regression.

    Args:
        echo: Also read `echo_features`.
    """

    name = "lexical"

    def __init__(self, *, echo: bool = True) -> None:
        self._echo = echo
        self._vectorizers: list[TfidfVectorizer] = []
        self._coefficients = np.zeros((0, 0))
        self._intercept = np.zeros(0)

    def fit(
        self, prompts: Sequence[str], completions: Sequence[str], labels: npt.NDArray[np.int64], n_classes: int
    ) -> "LexicalReader":
        """Learns vocabulary, document frequencies and weights from references."""
        self._vectorizers = [_vectorizer().fit(map(_framed, texts)) for texts in (prompts, completions)]
        features = self._features(prompts, completions)
        self._coefficients, self._intercept = fit_logistic(features, labels, n_classes, _REGULARISATION)
        return self

    def _features(self, prompts: Sequence[str], completions: Sequence[str]) -> scipy.sparse.csr_matrix:
        parts = [
            vectorizer.transform(map(_framed, texts))
            for vectorizer, texts in zip(self._vectorizers, (prompts, completions), strict=True)
        ]
        if self._echo:
            known = self._vectorizers[0]
            # A word that all prompts hold weighs nothing. Word pairs are in there too, and are never asked for.
            rarity = {word: float(known.idf_[column]) - 1 for word, column in known.vocabulary_.items()}
            parts.append(scipy.sparse.csr_matrix(echo_features(prompts, completions, rarity)))
        return scipy.sparse.hstack(parts, format="csr")

    def log_posterior(self, prompts: Sequence[str], completions: Sequence[str]) -> FloatArray:
        """Log-probabilities of the classes, shape [rows, classes]."""
        logits = self._features(prompts, completions) @ self._coefficients.T + self._intercept
        result: FloatArray = log_softmax(logits, axis=1)
        return result

    def contributions(self, prompt: str, completion: str, column: int, top: int = 5) -> list[tuple[str, float]]:
        """The words that speak most for a class (against the mean of the others), as ``part:words`` and weight."""
        features = self._features([prompt], [completion]).tocoo()
        contrast = self._coefficients[column] - np.delete(self._coefficients, column, axis=0).mean(0)
        vocabularies = zip(_PARTS, self._vectorizers, strict=True)
        names = [f"{part}:{words}" for part, known in vocabularies for words in known.get_feature_names_out()]
        names += [f"completion:{what}" for what in _ECHO]
        weights = [(names[j], float(x * contrast[j])) for j, x in zip(features.col, features.data, strict=True)]
        return sorted(weights, key=lambda item: -item[1])[:top]

    def save(self, folder: Path) -> None:
        """Writes vocabulary (JSON) and weights (safetensors)."""
        tensors = {"coefficients": self._coefficients, "intercept": self._intercept}
        for part, vectorizer in zip(_PARTS, self._vectorizers, strict=True):
            write_json(folder / f"{part}_vocabulary.json", list(vectorizer.get_feature_names_out()))
            tensors[f"{part}_idf"] = vectorizer.idf_
        with atomic_path(folder / "lexical.safetensors") as path:
            save_file(tensors, path)

    @classmethod
    def load(cls, folder: Path) -> "LexicalReader":
        """Reads what `save` wrote."""
        reader, tensors = cls(), load_file(folder / "lexical.safetensors")
        for part in _PARTS:
            words = read_json(folder / f"{part}_vocabulary.json")
            vectorizer = _vectorizer({word: index for index, word in enumerate(words)})
            vectorizer.idf_ = tensors[f"{part}_idf"]
            reader._vectorizers.append(vectorizer)
        reader._coefficients, reader._intercept = tensors["coefficients"], tensors["intercept"]
        return reader
