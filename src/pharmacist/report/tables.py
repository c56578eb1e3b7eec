"""Tables of a page, from scores and manifests."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pharmacist.report import words


if TYPE_CHECKING:
    import datasets


MOST_ROWS = 100_000
"""Most rows that a page shows; of a longer ranking it shows every n-th."""
TEXT_BUDGET = 48_000_000
"""Most characters of prompts and completions that a page contains."""
LONGEST, SHORTEST = 4000, 240
"""Most characters shown of a text: of a small and of a large ranking."""
MOST_PAIRS = 300
"""Most near-duplicates that a page compares: those whose better row ranks highest."""
MOST_CATEGORIES = 20
"""Most categories that a page names, the largest; the others are combined."""
_EXCERPT = 1200  # characters of a text in pairs and examples
_BEST, _AT_THE_CUT, _PER_REASON = 2, 3, 2  # examples
_PROMPT, _COMPLETION = 5, 6  # positions in a row
_WORD = re.compile(r"\w+|\s+|[^\w\s]")

_HARMLESS = frozenset({"critical", "duplicate", "not_safety_critical", "over_refusal"})


def composition(groups: Iterable[object], selected: "pd.Series[Any]", known: words.Words) -> list[dict[str, Any]]:
    """Counts and shares of reasons or labels among selected and other rows, known names first.

    Returns:
        Per group its ``word``, ``rows``, ``selected`` and ``left``, and the shares in percent ``of_selected`` and
        ``of_left`` (None where there are no such rows).
    """
    names = [str(group) for group in groups]
    shown = known.of(names)
    counts = pd.crosstab(np.asarray(names), selected.to_numpy(dtype=bool))
    counts = counts.reindex(index=list(shown), columns=[True, False], fill_value=0)
    n_selected, n_left = counts.sum().tolist()
    return [
        {
            "word": shown[name],
            "rows": inside + outside,
            "selected": inside,
            "left": outside,
            "of_selected": 100 * inside / n_selected if n_selected else None,
            "of_left": 100 * outside / n_left if n_left else None,
        }
        for name, inside, outside in counts.itertuples(name=None)
    ]


def confusion(labels: Iterable[str], reasons: "pd.Series[Any]") -> dict[str, Any]:
    """Rows per planted label and reason: ``labels`` and ``reasons`` (words), ``counts`` [labels][reasons]."""
    rows, columns = words.LABELS.of(labels), words.REASONS.of(reasons)
    counts = pd.crosstab(np.asarray(labels, dtype=str), reasons.astype(str).to_numpy())
    return {
        "labels": list(rows.values()),
        "reasons": list(columns.values()),
        "counts": counts.reindex(index=list(rows), columns=list(columns), fill_value=0).to_numpy().tolist(),
    }


def cut(scores: pd.DataFrame) -> dict[str, Any] | None:
    """The lowest selected ``score``, and whether no other row scores higher (``clean``); None if all are selected."""
    inside, outside = scores.loc[scores["selected"], "score"], scores.loc[~scores["selected"], "score"]
    if not len(inside) or not len(outside):
        return None
    return {"score": float(inside.min()), "clean": bool(outside.max() <= inside.min())}


def categories(groups: Sequence[Sequence[str]], selected: "pd.Series[Any]") -> list[dict[str, Any]]:
    """Selected rows of each category, the largest first; those beyond the `MOST_CATEGORIES` largest are combined.

    A row with several categories counts in each of them, one with none as "none".

    Returns:
        Per category its ``title``, ``rows``, ``selected``, ``left`` and ``kept``, the selected share in percent.
    """
    table = pd.DataFrame({"title": list(groups), "selected": selected.to_numpy(dtype=bool)}).explode("title")
    table["title"] = table["title"].fillna("none").astype(str)
    counts = table.groupby("title")["selected"].agg(rows="size", selected="sum").reset_index()
    counts = counts.sort_values(["rows", "title"], ascending=[False, True], kind="stable")
    found = list(counts.itertuples(index=False, name=None))
    if rest := found[MOST_CATEGORIES:]:
        found[MOST_CATEGORIES:] = [("All others", *(sum(group[at] for group in rest) for at in (1, 2)))]
    return [
        {"title": title, "rows": size, "selected": kept, "left": size - kept, "kept": 100 * kept / size}
        for title, size, kept in found
    ]


class Rows:
    """Rows of a ranking as the scripts of the page read them.

    A row is a list: rank, score, reason, selected, label, prompt, completion, row, duplicate of, hidden texts; reason
    and label by their position in `reasons` and `labels`, -1 for no label or no duplicate. The selector's report is
    empty where it did not read the rows.
    """

    def __init__(
        self, scores: pd.DataFrame, texts: "datasets.Dataset", labels: Sequence[str] | None, report: Mapping[str, Any]
    ) -> None:
        self.scores, self.texts, self.known, self.report = scores, texts, labels, report
        self.reasons = words.REASONS.of(scores["reason"])
        self.labels = words.LABELS.of(labels or ())
        self.by_rank: npt.NDArray[np.int64] = np.argsort(scores["rank"].to_numpy(), kind="stable")

    def hidden(self, reason: str) -> int:
        """Which texts of a row are hidden at first: 0 none, 1 the completion, 3 prompt and completion.

        Where the selector could not recognise harmful answers, all are hidden, whatever the reason.
        """
        if not self.report or "teaches_compliance" in self.report.get("cannot_see", ()):
            return 3
        return 0 if reason in _HARMLESS else 1 if reason == "low_quality" else 3

    def pick(self, positions: npt.NDArray[np.int64], limit: int) -> tuple[list[list[Any]], int]:
        """Rows by their position in the scores, and how many of their texts were longer than `limit` characters."""
        if not len(positions):
            return [], 0
        table, picked = self.scores.iloc[positions], self.texts.select(positions)[:]
        prompts, completions = picked["prompt"], picked["completion"]
        reason = pd.Categorical(table["reason"].astype(str), list(self.reasons)).codes.tolist()
        label = [None if self.known is None else str(self.known[at]) for at in positions]
        hidden = [self.hidden(name) for name in self.reasons]
        columns = (
            table["rank"].tolist(),
            [float(f"{score:.6g}") for score in table["score"]],
            reason,
            table["selected"].astype(int).tolist(),
            pd.Categorical(label, list(self.labels)).codes.tolist(),
            [text if len(text) <= limit else f"{text[:limit]}…" for text in prompts],
            [text if len(text) <= limit else f"{text[:limit]}…" for text in completions],
            table["row"].tolist(),
            table["duplicate_of"].tolist(),
            [hidden[at] for at in reason],
        )
        long = sum(len(text) > limit for text in (*prompts, *completions))
        return [list(row) for row in zip(*columns, strict=True)], long


def row_table(rows: Rows) -> dict[str, Any]:
    """The rows for the page's table, in rank order, with the words for their reasons and labels.

    Texts have ``limit`` characters at most; ``cut`` of them were longer.
    """
    total = len(rows.scores)
    shown = min(total, MOST_ROWS)
    limit = int(np.clip(TEXT_BUDGET // (2 * shown), SHORTEST, LONGEST))
    found, long = rows.pick(rows.by_rank[np.linspace(0, total - 1, shown).round().astype(np.int64)], limit)
    keys = {
        kind: [{"name": name, "title": word.title, "color": word.css} for name, word in of_kind.items()]
        for kind, of_kind in (("reasons", rows.reasons), ("labels", rows.labels))
    }
    return {"total": total, "shown": shown, "limit": limit, "cut": long, **keys, "rows": found}


def examples(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Examples of rows that the core subset keeps and drops.

    Returns:
        ``kept`` and ``left``: groups with a ``title`` and ``rows``. Kept: the best rows, and the last ones before the
        cut. Left: the first ones behind it, then of every reason those that came closest.
    """
    chosen = rows.scores["selected"].to_numpy(dtype=bool)[rows.by_rank]
    inside, outside = rows.by_rank[chosen], rows.by_rank[~chosen]
    reason = rows.scores["reason"].astype(str).to_numpy()
    groups: dict[str, list[tuple[str, npt.NDArray[np.int64]]]] = {
        "kept": [("The best", inside[:_BEST]), ("The last selected", inside[_BEST:][-_AT_THE_CUT:])],
        "left": [("The first left out", outside[:_AT_THE_CUT])],
    }
    if rows.report:
        behind = outside[_AT_THE_CUT:]
        for name, word in rows.reasons.items():
            groups["left"].append(
                (f"{word.title}: closest to being selected", behind[reason[behind] == name][:_PER_REASON])
            )
    return {
        name: [{"title": title, "rows": rows.pick(at, _EXCERPT)[0]} for title, at in of_name if len(at)]
        for name, of_name in groups.items()
    }


def pairs(rows: Rows) -> dict[str, Any]:
    """Near-duplicates and the rows that they repeat, with their differences.

    Returns:
        ``total``, ``shown`` and ``pairs`` of two rows, the one that ranks higher first. Their texts are lists of
        pieces of which every second one, from the second on, is not in the other text.
    """
    number, rank, of = (rows.scores[name].to_numpy() for name in ("row", "rank", "duplicate_of"))
    repeats = rows.by_rank[of[rows.by_rank] >= 0]
    better = np.searchsorted(number, of[repeats])  # scores are in the order of the pool
    shown = np.argsort(rank[better], kind="stable")[:MOST_PAIRS]
    first, second = (rows.pick(at[shown], _EXCERPT)[0] for at in (better, repeats))
    for a, b in zip(first, second, strict=True):
        for column in (_PROMPT, _COMPLETION):
            a[column], b[column] = difference(a[column], b[column])
    return {"total": len(repeats), "shown": len(shown), "pairs": [list(it) for it in zip(first, second, strict=True)]}


def difference(a: str, b: str) -> tuple[list[str], list[str]]:
    """Splits two texts into pieces that are alternately shared by both and in one alone.

    >>> difference("do not mix it", "do not stir it")
    (['do not ', 'mix', ' it'], ['do not ', 'stir', ' it'])
    """
    words_a, words_b = _WORD.findall(a), _WORD.findall(b)
    pieces: tuple[list[str], list[str]] = ([""], [""])
    for tag, from_a, to_a, from_b, to_b in difflib.SequenceMatcher(None, words_a, words_b, False).get_opcodes():
        for of_text, found in zip(pieces, (words_a[from_a:to_a], words_b[from_b:to_b]), strict=True):
            if tag == "equal":
                of_text[-1] += "".join(found)
            elif found:
                of_text.extend(("".join(found), ""))
    return pieces
