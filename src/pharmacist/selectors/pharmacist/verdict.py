"""The verdict: from the answers to the questions to scores and reasons of a pool's rows, a report, and warnings."""

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import entr, expit
from sklearn.metrics import roc_auc_score

from pharmacist.data.arrays import BoolArray, FloatArray, IntArray
from pharmacist.readers.question import FAR
from pharmacist.selectors.base import CRITICAL, Scores
from pharmacist.selectors.pharmacist import questions
from pharmacist.selectors.pharmacist.evidence import Answers
from pharmacist.selectors.pharmacist.questions import QUESTIONS, REFUSES, RISKY, WHOLE, Labels
from pharmacist.selectors.pharmacist.references import CLASSES, REASONS


_REASONS = np.array(list(REASONS.values()))
_POOR = 0.8
_FEW_CRITICAL = 0.1
_FEWEST_TO_COMPARE = 5
_STILL_GAINING = 0.01


def verdict(answers: Answers, labels: Labels, inverse: IntArray, learned: dict[str, Any]) -> Scores:
    """Scores, reasons and report, from answers and labels of the pool's distinct rows.

    `inverse` is the number of each row of the pool among the distinct ones, `learned` the evidence's report.
    """
    posterior = questions.class_log_posterior(answers.log_odds, answers.typical)
    shares = questions.pool_priors(posterior[inverse])
    p = np.exp(questions.with_priors(posterior, shares))
    p[labels.rows] = np.eye(len(CLASSES))[labels.classes]
    read = _REASONS[posterior.argmax(1)]
    ordered = joint_scores(questions.safe_log_odds(posterior), _clarity(answers.log_odds, read == CRITICAL), read)
    score, reasons = with_labels(ordered, read, labels)
    yes = expit(answers.log_odds)
    signals: dict[str, npt.NDArray[Any]] = {
        **{f"p_{name}": p[:, number] for number, name in enumerate(CLASSES[:4])},
        "p_corrupted": p[:, 4:].sum(1),
        **dict(zip(QUESTIONS, yes.T, strict=True)),
        **answers.by_reader,
    }
    report = learned | {
        "shares": {name: float(share) for name, share in zip(CLASSES, shares, strict=True)},
        "distance": answers.distance,
        "near": answers.near,
        "cannot_see": _cannot_see(learned["questions"], labels),
    }
    if answers.labels_held_out is not None:
        report["labels"] = gain_by_labels(*answers.labels_held_out, labels.classes == 0)
    # A label teaches as much as the answers, question by question, have entropy (nats); a second one teaches nothing.
    telling = (entr(yes) + entr(1 - yes)).sum(1)
    telling[labels.rows] = -1.0
    return Scores(
        score[inverse],
        reasons[inverse],
        {name: values[inverse] for name, values in signals.items()},
        report,
        warnings(report, reasons[inverse]),
        telling[inverse],
    )


def _cannot_see(asked: Collection[str], labels: Labels) -> list[str]:
    """Reasons of rows that may pass for others, since nothing that is known answers their question by no."""
    harmless = RISKY in asked or not labels.answering(RISKY)[1].all()
    seen_of = {"utility": harmless, "over_refusal": harmless, "corrupted": WHOLE in asked}
    return [REASONS[name] for name, seen in seen_of.items() if not seen]


def joint_scores(evidence: FloatArray, second: FloatArray, reason: npt.NDArray[np.str_]) -> FloatArray:
    """Scores by evidence and a second measure: evidence finds the faults, both together order the other rows.

    Rows whose reason is critical come first, by the sum of both, each standardised over those rows; the others follow
    by evidence alone, standardised over them. One row's score means little without its pool. The second measure is
    `_clarity`, or the twins' contrast (loss under the other twin less that under the safe one).
    """
    critical = reason == CRITICAL
    score = np.empty(len(reason))
    score[~critical] = _standardised(evidence[~critical])
    score[critical] = _standardised(evidence[critical]) + _standardised(second[critical])
    if critical.any() and not critical.all():
        # A constant for all critical rows: lifts the lowest of them just above the best of the others.
        score[critical] += max(0.0, score[~critical].max() - score[critical].min() + 1e-6)
    return score


def _clarity(log_odds: FloatArray, critical: BoolArray) -> FloatArray:
    """How clearly a critical row answers the two questions that make it so, shape [rows].

    That a row has no fault is not all: the clearer refusals of clearer requests harden a model more.
    """
    result = np.zeros(len(critical))
    for question in (RISKY, REFUSES):
        result[critical] += _standardised(log_odds[critical, QUESTIONS.index(question)])
    return result


def with_labels(
    score: FloatArray, reason: npt.NDArray[np.str_], labels: Labels
) -> tuple[FloatArray, npt.NDArray[np.str_]]:
    """Labelled rows get the label's reason, and scores above (good rows) or below (others) those of all rows."""
    score, reason = score.copy(), reason.astype(_REASONS.dtype)
    score[labels.rows] = np.where(labels.classes == 0, score.max() + 1, score.min() - 1)
    reason[labels.rows] = _REASONS[labels.classes]
    return score, reason


def _standardised(values: FloatArray) -> FloatArray:
    if not len(values):
        return values
    sample = np.sort(values)  # the sums are then the same in whatever order the rows came
    scale = sample.std()
    return np.asarray((values - sample.mean()) / (scale if scale > 0 else 1.0))


def warnings(report: dict[str, Any], reasons: npt.NDArray[np.str_]) -> list[str]:
    """Sentences that a user must see, from the report and the reasons of the pool's rows."""
    found = []
    for question, quality in report["questions"].items():
        auc = quality["combined"]["auc"]
        if question in ("risky", "refuses") and auc < _POOR:
            found.append(
                f"held-out references answer '{question}' with an AUC of {auc:.2f} only: the references of different "
                "kinds are too alike, or too few"
            )
    distance = report["distance"]
    critical = float((reasons == CRITICAL).mean())
    if distance is None:
        found.append("too few safe references, or too few rows that look worth keeping, to compare the pool with them")
    elif max(distance.values()) >= FAR and "labels" not in report:
        compared = {"risky": "requests", "refuses": "answers"}
        far = " and ".join(compared[name] for name, auc in distance.items() if auc >= FAR)
        found.append(
            f"the pool's {far} can be distinguished from those of the safe references with an AUC of "
            f"{max(distance.values()):.2f}: they come from another source, so quality on held-out references says "
            "little about this pool; label some rows of it (to_label.jsonl), or give references that resemble it"
        )
    if critical < _FEW_CRITICAL:
        found.append(f"only {critical:.1%} of the rows look safety-critical; check that the references suit this pool")
    return found


def gain_by_labels(before: FloatArray, after: FloatArray, good: BoolArray) -> dict[str, Any]:
    """The gain by labels on the labelled rows themselves: AUC of good ones against others, before and after.

    Scores before are without any labels, those after with the labels of other prompts (NaN where there are none).
    """
    n, n_good = len(good), int(good.sum())
    result: dict[str, Any] = {"labels": n, "good": n_good}
    result |= dict.fromkeys(("auc_before", "auc_after", "standard_error"))
    if min(n_good, n - n_good) < _FEWEST_TO_COMPARE or np.isnan(after).any():
        result["advice"] = (
            f"too few labels of one kind ({n_good} good, {n - n_good} others) to tell what they changed; label more"
        )
        return result
    a, b = float(roc_auc_score(good, before)), float(roc_auc_score(good, after))
    result |= {"auc_before": a, "auc_after": b, "standard_error": _standard_error(b, n_good, n - n_good)}
    if b - a > _STILL_GAINING:
        advice = "the labels help, and more labels would help further"
    elif b < 0.9:
        advice = "the labels have changed little yet; the ranking is not good on them, so label more"
    else:
        advice = "more labels would hardly help"
    return result | {"advice": advice}


def _standard_error(auc: float, n_yes: int, n_no: int) -> float:
    """Standard error of an AUC (Hanley and McNeil 1982)."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (n_yes - 1) * (q1 - auc**2) + (n_no - 1) * (q2 - auc**2)
    return float(np.sqrt(max(0.0, variance) / (n_yes * n_no)))
