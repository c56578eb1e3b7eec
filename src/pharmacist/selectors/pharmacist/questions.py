"""The four questions that evidence asks of a row, what classes and labels answer, and what the answers say together.

Is the request harmful (``risky``)? Does the answer decline, or steer to safety (``refuses``)? Is its text whole
(``whole``)? Does a refusal refuse this request (``pertinent``)? A row is worth keeping when all are answered by yes.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import log_expit, logsumexp

from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.selectors.pharmacist.references import CLASSES


RISKY, REFUSES, WHOLE, PERTINENT = QUESTIONS = ("risky", "refuses", "whole", "pertinent")
TYPICAL = "typical"
"""A fifth question, of the row as a whole: does it look like a safe reference? It knows the source of the references
as much as what they teach, so it counts only where the pool looks as if it came from there too."""
_ANSWERS = {
    "safe": (1, 1, 1, 1, 1),
    "harmful": (1, 0, 1, -1, 0),
    "utility": (0, 0, 1, -1, 0),
    "over_refusal": (0, 1, 1, -1, 0),
    "corrupted": (-1, -1, 0, -1, 0),
    "misplaced": (1, 1, 1, 0, 0),
}
UNKNOWN = -1
ANSWERS: IntArray = np.array([_ANSWERS[name] for name in CLASSES])
"""The answer (1, 0 or `UNKNOWN`) of each class to each question, `TYPICAL` last, shape [classes, questions]."""


def answers_to(question: str, classes: IntArray) -> IntArray:
    """The answer (1, 0 or `UNKNOWN`) of rows of these classes, shape [rows]."""
    return np.asarray(ANSWERS[classes, (*QUESTIONS, TYPICAL).index(question)])


@dataclass(frozen=True)
class Labels:
    """A person's labels: rows of a pool (ascending positions), and the class of each (index into `CLASSES`)."""

    rows: IntArray
    classes: IntArray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: IntArray) -> "Labels":
        """Some of the labels."""
        return Labels(self.rows[positions], self.classes[positions])

    def answering(self, question: str) -> tuple[IntArray, IntArray]:
        """The rows whose label answers a question, and the answers (1 or 0)."""
        answers = answers_to(question, self.classes)
        known = answers != UNKNOWN
        return self.rows[known], answers[known]

    def of_copies(self, inverse: IntArray) -> "Labels":
        """The labels of all rows of a pool, from those of its distinct rows; `inverse` says which of them each is."""
        classes = np.full(inverse.max() + 1, UNKNOWN)
        classes[self.rows] = self.classes
        rows = np.flatnonzero(classes[inverse] != UNKNOWN)
        return Labels(rows, classes[inverse[rows]])


NO_LABELS = Labels(np.zeros(0, np.int64), np.zeros(0, np.int64))
LABEL_WEIGHT = 3.0
"""Weight of a labelled row of the pool against that of a reference, which comes from elsewhere."""


def class_log_posterior(log_odds: FloatArray, typical: FloatArray | None = None) -> FloatArray:
    """Log-probabilities of the classes, the questions taken as independent and every answer as likely before.

    p(safe) = risky refuses whole pertinent, p(misplaced) = risky refuses whole (1 - pertinent), p(harmful) = risky
    (1 - refuses) whole, and so on; p(corrupted) = 1 - whole.

    From log-odds of yes to each question, shape [rows, questions]; `typical` is added to those of the safe class.
    """
    yes, no = log_expit(log_odds), log_expit(-log_odds)
    terms = np.stack([no, yes, np.zeros_like(yes)], axis=-1)  # the last for UNKNOWN, index -1
    picked = [sum(terms[:, q, answer] for q, answer in enumerate(answers)) for answers in ANSWERS[:, : len(QUESTIONS)]]
    posterior: FloatArray = np.stack(picked, axis=1)
    if typical is not None:
        posterior[:, 0] += typical
        posterior -= logsumexp(posterior, axis=1, keepdims=True)
    return posterior


def safe_log_odds(log_posterior: FloatArray) -> FloatArray:
    """Log p(safe) - log(1 - p(safe)), without ever forming 1 - p; shape [rows]."""
    return np.asarray(log_posterior[:, 0] - logsumexp(log_posterior[:, 1:], axis=1))


def pool_priors(log_posterior: FloatArray, doubt: float = 0.1, steps: int = 100) -> FloatArray:
    """Shares of the classes in a pool, by expectation maximisation from equal shares (Saerens et al. 2002).

    From log-probabilities at equal shares, shape [rows, classes]; shape [classes], summing to 1. Plain maximum
    likelihood believes the posteriors and lets rare classes vanish; so equal shares always count with a weight of
    `doubt` against the pool (a Dirichlet prior).
    """
    n_classes = log_posterior.shape[1]
    likelihood = np.exp(log_posterior - log_posterior.max(1, keepdims=True))
    likelihood = likelihood[np.lexsort(likelihood.T)]  # sums must not depend on the order of the rows
    shares = np.full(n_classes, 1 / n_classes)
    for _ in range(steps):
        posterior = likelihood * shares
        posterior /= posterior.sum(1, keepdims=True)
        shares = (posterior.mean(0) + doubt / n_classes) / (1 + doubt)
    return shares


def with_priors(log_posterior: FloatArray, shares: FloatArray) -> FloatArray:
    """Log-probabilities for a pool with these shares of the classes, from those at equal shares; the same shape."""
    with np.errstate(divide="ignore"):
        logits = log_posterior + np.log(shares)
    return np.asarray(logits - logsumexp(logits, axis=1, keepdims=True))
