"""Numbers of a page, out of scores and manifests. Pure functions; everything returned can be written as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pharmacist.report import words


if TYPE_CHECKING:
    import datasets

MOST_ROWS = 100_000
"""Rows that a page shows at most; of a longer ranking it shows every n-th."""
TEXT_BUDGET = 48_000_000
"""Characters of prompts and completions that a page holds at most."""
LONGEST, SHORTEST = 4000, 240
"""Characters shown of one text: of a small and of a large ranking."""

_SHOWN = frozenset({"critical", "duplicate", "not_safety_critical", "over_refusal"})


@dataclass(frozen=True)
class Judgement:
    """What the reasons of a ranking are worth.

    Attributes:
        judged: Whether the selector read the rows at all.
        blind: Reasons that it could not give, for want of references.
    """

    judged: bool
    blind: tuple[str, ...]

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> "Judgement":
        """From a selector's report; a selector that reads rows always has something to report."""
        return cls(bool(report), tuple(report.get("cannot_see", ())))

    def veil(self, reason: str) -> int:
        """Which texts of a row stay hidden until asked for: 0 none, 1 the completion, 3 the prompt too.

        Where harmful answers could not be recognised, no reason says that a row is harmless.
        """
        if not self.judged or "teaches_compliance" in self.blind:
            return 3
        if reason in _SHOWN:
            return 0
        return 1 if reason == "low_quality" else 3


def _ordered(values: "pd.Series[Any]", known: Mapping[str, Any]) -> list[str]:
    present = values.astype(str).unique().tolist()
    return [name for name in known if name in present] + sorted(name for name in present if name not in known)


def composition(
    groups: "pd.Series[Any]", selected: "pd.Series[Any]", known: Mapping[str, Any]
) -> list[dict[str, Any]]:  # fmt: skip
    """How selected and other rows are made up.

    Args:
        groups: Reason or label per row.
        selected: Per row.
        known: Names in the order in which they are listed; others follow.

    Returns:
        Per group its ``name``, ``rows``, ``selected`` and ``left``, and the shares in percent ``of_selected`` and
        ``of_left`` (None where there are no such rows).
    """
    names, chosen = groups.astype(str).to_numpy(), selected.to_numpy(dtype=bool)
    n_selected, n_left = int(chosen.sum()), int((~chosen).sum())
    table = []
    for name in _ordered(groups, known):
        member = names == name
        inside, outside = int((member & chosen).sum()), int((member & ~chosen).sum())
        table.append({
            "name": name, "rows": inside + outside, "selected": inside, "left": outside,
            "of_selected": 100 * inside / n_selected if n_selected else None,
            "of_left": 100 * outside / n_left if n_left else None,
        })  # fmt: skip
    return table


def confusion(labels: "pd.Series[Any]", reasons: "pd.Series[Any]") -> dict[str, Any]:
    """Rows per planted label and given reason: ``labels``, ``reasons`` and ``counts`` [labels][reasons]."""
    rows, columns = _ordered(labels, words.LABELS), _ordered(reasons, words.REASONS)
    counts = pd.crosstab(labels.astype(str), reasons.astype(str)).reindex(index=rows, columns=columns, fill_value=0)
    return {"labels": rows, "reasons": columns, "counts": counts.to_numpy().tolist()}


def held_out_quality(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Per-class quality on held-out references; None where the selector measured none.

    Returns:
        ``readers`` (the combination first) and ``classes``: per class its ``name``, number of ``references``,
        ``recall`` (percent, of the combination) and ``auc`` per reader of the safe class against it (None for the
        safe class, which stands against all the others in ``auc_rest``).
    """
    found = report.get("out_of_fold")
    if not found or "combined" not in found:
        return None
    readers = ["combined", *(name for name in found if name != "combined")]
    combined = found["combined"]
    classes = [
        {
            "name": name, "references": report.get("references", {}).get(name),
            "recall": 100 * recall, "auc": [found[reader]["auc_safe_against"].get(name) for reader in readers],
        }
        for name, recall in combined["recall"].items()
    ]  # fmt: skip
    return {
        "readers": readers, "classes": classes, "left_out": list(report.get("left_out", ())),
        "weights": dict(report.get("weights", {})),
        "auc_rest": [found[name]["auc_safe_against_rest"] for name in readers],
    }  # fmt: skip


def phases(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Wall time of each phase in seconds, its share of the longest in percent, and its tokens."""
    found = manifest.get("phases", {})
    longest = max((phase["seconds"] for phase in found.values()), default=0.0)
    return [
        {
            "name": name.capitalize(), "seconds": phase["seconds"], "tokens": phase["tokens"],
            "share": 100 * phase["seconds"] / longest if longest else 0.0,
        }
        for name, phase in found.items()
    ]  # fmt: skip


def cut(scores: pd.DataFrame) -> dict[str, Any] | None:
    """The lowest selected ``score``, and whether it is a ``clean`` line below all others; None if all are selected."""
    inside, outside = scores.loc[scores["selected"], "score"], scores.loc[~scores["selected"], "score"]
    if not len(inside) or not len(outside):
        return None
    return {"score": float(inside.min()), "clean": bool(outside.max() <= inside.min())}


def row_table(
    scores: pd.DataFrame, texts: "datasets.Dataset", labels: Sequence[str] | None, judgement: Judgement
) -> dict[str, Any]:
    """The rows for the page's table, in rank order.

    Args:
        scores: ``scores.parquet``.
        texts: ``prompt`` and ``completion`` of the same rows.
        labels: Known label per row.
        judgement: Decides which texts stay hidden.

    Returns:
        ``total``, ``shown``, ``limit`` (characters per text), ``cut`` (texts that were longer), ``reasons`` and
        ``labels`` (words) and ``rows``: rank, score, reason, selected, label, prompt, completion, row, duplicate of,
        hidden texts; reason and label by their position in those lists, -1 for no label or no duplicate.
    """
    total = len(scores)
    shown = min(total, MOST_ROWS)
    order = np.argsort(scores["rank"].to_numpy(), kind="stable")
    chosen = order[np.linspace(0, total - 1, shown).round().astype(np.int64)]
    limit = int(np.clip(TEXT_BUDGET // (2 * shown), SHORTEST, LONGEST))
    table = scores.iloc[chosen]
    reasons = _ordered(scores["reason"], words.REASONS)
    names = _ordered(pd.Series(labels, dtype=str), words.LABELS) if labels is not None else []
    picked = texts.select(chosen)[:]
    prompts, completions = picked["prompt"], picked["completion"]
    reason_at, label_at = {name: i for i, name in enumerate(reasons)}, {name: i for i, name in enumerate(names)}
    veil = [judgement.veil(name) for name in reasons]
    reason = [reason_at[str(name)] for name in table["reason"]]
    rows = list(zip(
        table["rank"].tolist(), [float(f"{score:.6g}") for score in table["score"]], reason,
        table["selected"].astype(int).tolist(),
        [label_at[str(labels[i])] for i in chosen] if labels is not None else [-1] * shown,
        [_cut(text, limit) for text in prompts], [_cut(text, limit) for text in completions],
        table["row"].tolist(), table["duplicate_of"].tolist(), [veil[i] for i in reason], strict=True,
    ))  # fmt: skip
    return {
        "total": total, "shown": shown, "limit": limit,
        "cut": sum(len(text) > limit for column in (prompts, completions) for text in column),
        "reasons": [_key(name, words.reason(name, judgement.judged)) for name in reasons],
        "labels": [_key(name, words.label(name)) for name in names], "rows": rows,
    }  # fmt: skip


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


def _key(name: str, word: words.Word) -> dict[str, str]:
    return {"name": name, "title": word.title, "color": word.css}
