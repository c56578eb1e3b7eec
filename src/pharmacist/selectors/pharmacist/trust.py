"""How far a ranking can be trusted: warnings where pool and references do not fit, and what labels have changed."""

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from pharmacist.readers.question import FAR
from pharmacist.selectors.base import CRITICAL


FloatArray = npt.NDArray[np.float64]

_POOR = 0.8
_FEW_CRITICAL = 0.1
_FEWEST_TO_COMPARE = 5
_STILL_GAINING = 0.01


def warnings(report: dict[str, Any], reasons: npt.NDArray[np.str_]) -> list[str]:
    """Sentences that a user must see.

    Args:
        report: Quality per question, ``distance``, ``shares`` and, with labels, ``labels``.
        reasons: Of the pool's rows.
    """
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
        found.append("too few rows look worth keeping to compare the pool with the safe references")
    elif max(distance.values()) >= FAR:
        sides = {"risky": "requests", "refuses": "answers"}
        far = " and ".join(sides[name] for name, auc in distance.items() if auc >= FAR)
        if "labels" not in report:
            found.append(
                f"the pool's {far} are told from those of the safe references with an AUC of "
                f"{max(distance.values()):.2f}: they come from another source, so quality on held-out references says "
                "little about this pool; label some rows of it (to_label.jsonl), or give references that resemble it"
            )
    if critical < _FEW_CRITICAL:
        found.append(f"only {critical:.1%} of the rows look safety-critical; check that the references suit this pool")
    return found


def gain(before: FloatArray, after: FloatArray, good: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """What labels changed on the labelled rows themselves, each judged by a ranking that did not know its label.

    Args:
        before: Scores without any labels, shape [labels].
        after: Scores with the labels of other prompts; NaN where all labels have one prompt, shape [labels].
        good: Whether a row is worth keeping, shape [labels].

    Returns:
        ``labels``, ``good``, ``auc_before``, ``auc_after`` (None where they cannot be told), ``standard_error`` of an
        AUC of that many labels, and ``advice``.
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
    error = _standard_error(b, n_good, n - n_good)
    result |= {"auc_before": a, "auc_after": b, "standard_error": error}
    if b - a > _STILL_GAINING:
        result["advice"] = "the labels help, and more would go on helping"
    elif b < 0.9:
        result["advice"] = "the labels have changed little yet; the ranking is not good on them, so label more"
    else:
        result["advice"] = "more labels would hardly help"
    return result


def _standard_error(auc: float, n_yes: int, n_no: int) -> float:
    """Of an AUC (Hanley and McNeil 1982)."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (n_yes - 1) * (q1 - auc**2) + (n_no - 1) * (q2 - auc**2)
    return float(np.sqrt(max(0.0, variance) / (n_yes * n_no)))
