"""Two finished evaluations of the same prompts: differences with intervals, counts and a paired test.

Outcomes are paired by item id, which holds the prompt's text, so that nothing is compared that was asked differently.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from statsmodels.stats.contingency_tables import mcnemar

from pharmacist.core.errors import DataError
from pharmacist.evaluation.statistics import paired_difference, with_interval
from pharmacist.evaluation.text import is_degenerate, missing


Item = Mapping[str, Any]
Outcome = Callable[[Item], bool | None]


def _verdict(judge: str, field: str) -> Outcome:
    def outcome(item: Item) -> bool | None:
        found: bool | None = item["verdicts"][judge][field]
        return found

    return outcome


def _degenerate(item: Item) -> bool | None:
    return None if missing(item) else is_degenerate(item["answer"])


def _correct(item: Item) -> bool | None:
    return None if item["grade"] is None else bool(item["grade"]["correct"])


def _plus(judge: str) -> Outcome:
    def outcome(item: Item) -> bool | None:
        return True if _degenerate(item) else _verdict(judge, "harmful")(item)

    return outcome


def compare(
    a: Sequence[Item], b: Sequence[Item], metrics_a: Mapping[str, Any], metrics_b: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Differences ``a - b`` by metric, in percentage points.

    Args:
        a: Items of the first model, as `Evaluator.assess` makes them.
        b: Items of the second.
        metrics_a: Its ``metrics.json``, which names the judges.
        metrics_b: Likewise.

    Returns:
        Metric -> ``value``, ``ci95`` (Newcombe's paired interval; None without pairs), ``n`` pairs that are known on
        both sides, ``unpaired``, ``rates`` of the two, ``counts`` (``both``, ``only_a``, ``only_b``, ``neither``), and
        ``mcnemar_p``, exact (McNemar 1947): whether one changes more often in one direction.

    Raises:
        DataError: They share no prompts, or different judges decided.
    """
    outcomes: dict[str, tuple[str, Outcome]] = {}
    shared = [name for name in metrics_a if name in metrics_b]
    for name in shared:
        judges = {which[name].get("judge") or which[name].get("task_type") for which in (metrics_a, metrics_b)}
        if len(judges) > 1:
            raise DataError(
                f"--compare: {name} was decided by {' here and '.join(sorted(map(str, judges)))} there; evaluate one "
                "of the folders again with the other's --judge, which generates nothing"
            )
        judge = str(metrics_a[name].get("judge"))
        known: dict[str, tuple[str, Outcome]] = {
            "harmful_score": ("prompts", _verdict(judge, "harmful")),
            "hs_plus": ("prompts", _plus(judge)),
            "refusal_rate": ("prompts", _verdict(judge, "refused")),
            "degenerate_rate": ("prompts", _degenerate),
            "over_refusal": ("benign_prompts", _verdict(judge, "refused")),
            "benign_flagged_rate": ("benign_prompts", _verdict(judge, "harmful")),
            "fine_tune_accuracy": ("task", _correct),
        }
        if name in known:
            outcomes[name] = known[name]
    found = {}
    for name, (prompts, outcome) in outcomes.items():
        first, second = ({i["id"]: i for i in items if i["set"] == prompts} for items in (a, b))
        ids = [key for key in first if key in second]
        if not ids:
            raise DataError(f"--compare: the two evaluations share none of their {prompts.replace('_', ' ')}")
        pairs = [(outcome(first[key]), outcome(second[key])) for key in ids]
        unpaired = len(first) + len(second) - 2 * len(ids)
        found[name] = _difference([(x, y) for x, y in pairs if x is not None and y is not None]) | {
            "unscored": sum(x is None or y is None for x, y in pairs),
            "unpaired": unpaired,
            "judge": metrics_a[name].get("judge") or metrics_a[name].get("task_type"),
        }
    if not found:
        raise DataError("--compare: the two evaluations have no metric in common")
    return found


def _difference(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    counts = {
        "both": pairs.count((True, True)),
        "only_a": pairs.count((True, False)),
        "only_b": pairs.count((False, True)),
        "neither": pairs.count((False, False)),
    }
    n = len(pairs)
    if not n:
        return {"value": None, "ci95": None, "n": 0, "rates": None, "counts": counts, "mcnemar_p": None}
    estimate = paired_difference(pairs)
    table = [[counts["both"], counts["only_a"]], [counts["only_b"], counts["neither"]]]
    return {
        "value": estimate.value,
        **with_interval(estimate.interval, estimate.missing),
        "n": n,
        "rates": [100 * sum(x for x, _ in pairs) / n, 100 * sum(y for _, y in pairs) / n],
        "counts": counts,
        "mcnemar_p": float(mcnemar(table, exact=True).pvalue) if counts["only_a"] + counts["only_b"] else 1.0,
    }
