"""Compares two finished evaluations of the same prompts: differences with intervals, counts and a paired test."""

from collections.abc import Mapping, Sequence
from typing import Any

from statsmodels.stats.contingency_tables import mcnemar

from pharmacist.core.errors import DataError
from pharmacist.evaluation.metrics import METRICS, Item
from pharmacist.evaluation.statistics import four_counts, paired_difference


def compare(
    a: Sequence[Item], b: Sequence[Item], metrics_a: Mapping[str, Any], metrics_b: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Differences ``a - b`` by metric, in percentage points, from both ``items.jsonl`` and ``metrics.json``.

    Outcomes are paired by the items' id, which holds the prompt's text: only answers to equal prompts are compared.

    Returns:
        Metric -> ``value``, ``ci95`` (Newcombe's paired interval; None without pairs), ``n`` (pairs with both outcomes
        known), ``unscored``, ``unpaired``, ``rates`` of the two, ``counts`` (``both``, ``only_a``, ``only_b``,
        ``neither``), ``judge``, and ``mcnemar_p``, the p-value of the exact paired test (McNemar 1947).

    Raises:
        DataError: They share no prompts, or have different judges.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, kind in METRICS.items():
        if not kind.compared or name not in metrics_a or name not in metrics_b:
            continue
        deciders = [which[name].get("judge") or which[name].get("task_type") for which in (metrics_a, metrics_b)]
        if deciders[0] != deciders[1]:
            option = "--task-type" if kind.by == "grader" else "--judge"
            raise DataError(
                f"--compare: {name} was decided by {deciders[0]} here and {deciders[1]} there; evaluate "
                f"one of the folders again with the other's {option}, which generates nothing"
            )
        first, second = ({item["id"]: item for item in items if item["set"] == kind.prompts} for items in (a, b))
        ids = [key for key in first if key in second]
        if not ids:
            raise DataError(f"--compare: the two evaluations share none of their {kind.prompts.replace('_', ' ')}")
        judge = str(metrics_a[name].get("judge"))
        pairs = [(kind.happened(first[key], judge), kind.happened(second[key], judge)) for key in ids]
        known = [(x, y) for x, y in pairs if x is not None and y is not None]
        found[name] = _difference(known) | {
            "unscored": len(pairs) - len(known),
            "unpaired": len(first) + len(second) - 2 * len(ids),
            "judge": deciders[0],
        }
    if not found:
        raise DataError("--compare: the two evaluations have no metric in common")
    return found


def _difference(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    both, only_a, only_b, neither = four_counts(pairs)
    counts = {"both": both, "only_a": only_a, "only_b": only_b, "neither": neither}
    n = len(pairs)
    if not n:
        return {"value": None, "ci95": None, "n": 0, "rates": None, "counts": counts, "mcnemar_p": None}
    estimate = paired_difference(pairs)
    test = mcnemar([[both, only_a], [only_b, neither]], exact=True) if only_a + only_b else None
    return {
        "value": estimate.value,
        "ci95": estimate.interval,
        "n": n,
        "rates": [100 * (both + only_a) / n, 100 * (both + only_b) / n],
        "counts": counts,
        "mcnemar_p": float(test.pvalue) if test else 1.0,
    }
