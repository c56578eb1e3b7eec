"""Which rows of a ranking make the core subset."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pharmacist.core.console import plain
from pharmacist.core.errors import ConfigError, PharmacistError
from pharmacist.core.manifest import read_manifest
from pharmacist.core.progress import say
from pharmacist.core.typed import AtLeast1, Fraction, Share, checked, hints_of
from pharmacist.data.arrays import IntArray
from pharmacist.data.records import Records
from pharmacist.pipeline.pages import read_table
from pharmacist.pipeline.stages.curate import SPREAD, CurateOptions, SelectOptions, check_min_score
from pharmacist.selectors.base import CRITICAL, GOOD_REASONS, RANKED, Scores, scaled_to_mean_1


Points = tuple[npt.NDArray[np.float64], npt.NDArray[np.uint64]]
"""Coordinates of each row, and a key per row that does not depend on their order; see `subset.Spread`."""


def number_of(options: CurateOptions, n: int) -> int:
    """The number of rows to select from `n` ranked ones."""
    return options.top_k or _rows_of(0.3 if options.top is None else options.top, n)


def _rows_of(fraction: float, n: int) -> int:
    return max(1, int(fraction * n + 0.5 + 1e-9))  # 0.58 x 25 is 14.5 rows, to be rounded up


def ranked_table(
    pool: Records,
    scores: Scores,
    clusters: IntArray,
    options: CurateOptions,
    groups: npt.NDArray[np.str_] | None,
    points: Points | None,
    labels: Mapping[int, str],
) -> pd.DataFrame:
    """The content of ``scores.parquet``, a row per row of the pool.

    `clusters` are the numbers of the rows' clusters of near-duplicates, shape [rows], and `groups` their values of the
    column to balance by. `points` are for a diversity that needs distances between rows. `labels` maps the position of
    a row to the reason that a person gave it.
    """
    rows = pool.row_numbers
    order = np.lexsort((rows, -scores.score))
    position = np.empty(len(rows), dtype=np.int64)
    position[order] = np.arange(1, len(rows) + 1)
    # The best-ranked row of each cluster; the others of it are its duplicates.
    best = np.zeros(len(rows), dtype=np.int64)
    best[clusters[order[::-1]]] = order[::-1]
    leader = best[clusters]
    duplicate = leader != np.arange(len(rows))
    reason = np.where(duplicate & (scores.reason == CRITICAL), "duplicate", scores.reason)
    table = pd.DataFrame(
        {
            "row": rows,
            "score": scores.score.astype(np.float64),
            "rank": position,
            "selected": False,
            "reason": reason.astype(object),
            "duplicate_of": np.where(duplicate, rows[leader], -1),
            **scores.signals,
        }
    )
    if labels:  # they overrule the selector, and hold for copies of a labelled row too
        texts = list(zip(pool.dataset["prompt"][:], pool.dataset["completion"][:], strict=True))
        labelled = {texts[position]: reason for position, reason in labels.items()}
        table["label"] = [labelled.get(text, "") for text in texts]
    if groups is not None:
        table["group"] = groups.astype(object)
    table.loc[_asked_for(table, options, points), "selected"] = True
    if scores.weight is not None:
        table["weight"] = scaled_to_mean_1(scores.weight, table["selected"].to_numpy())
    return table


def _asked_for(table: pd.DataFrame, options: CurateOptions, points: Points | None) -> IntArray:
    """Positions of the rows to select as the options of `curate` say; see `choose`."""
    return choose(
        table,
        None,
        number_of(options, len(table)) if options.min_score is None else None,
        options.min_score,
        options.diversity,
        margin=options.diversity_margin,
        share=options.balance_share if options.balance is not None else 0.0,
        points=points,
        fill=options.fill,
    )


def choose(
    table: pd.DataFrame,
    fraction: float | None,
    k: int | None,
    min_score: float | None,
    diversity: str,
    *,
    margin: float = 1.5,
    share: float = 0.0,
    points: Points | None = None,
    fill: bool = False,
) -> IntArray:
    """Positions in `table` of the rows to select, ascending; the arguments are those of `Ranking.select`.

    A share or number is not filled with rows whose reason speaks against them, unless `fill` is true; a row that a
    person labelled bad is never selected.
    """
    from pharmacist.selectors.subset import Spread, core_rows  # with torch, for which pages must not wait

    given = {"min_score": min_score, "diversity": diversity, "diversity_margin": margin, "fill": fill}
    for name, value in given.items():
        checked(name, hints_of(CurateOptions)[name], value)
    checked("balance_share", Fraction, share)
    check_min_score(min_score, diversity, share > 0)
    if share and "group" not in table:
        raise ConfigError("balance_share: the pool was ranked without --balance, so there are no groups")
    if diversity in SPREAD and points is None:
        raise ConfigError(
            f"diversity {diversity}: needs distances between rows; rank the pool with this diversity, and do not load "
            "the ranking from a folder"
        )
    if sum(value is not None for value in (fraction, k, min_score)) != 1:
        raise ConfigError("give exactly one of fraction, k and min_score")
    candidates = table[table["duplicate_of"] < 0] if diversity == "near-duplicates" else table
    if "label" in table:
        candidates = candidates[candidates["label"].isin(("", CRITICAL))]
    if min_score is not None:
        chosen = candidates.index[candidates["score"] >= min_score].to_numpy()
        if not len(chosen):
            best = table["score"].max()
            raise ConfigError(
                f"min score {min_score:g}: no row reaches it, the best has {best:.4g}; choose a lower one"
            )
        return chosen
    if fraction is not None:
        k = _rows_of(checked("fraction", Share, fraction), len(table))
    k = int(checked("k", AtLeast1, k))
    if k > len(table):
        raise ConfigError(f"k {k}: only {len(table)} rows were ranked")
    if not fill:
        candidates = candidates[candidates["reason"].isin(GOOD_REASONS)]
    order = candidates.sort_values("rank").index.to_numpy()
    if not len(order):
        return np.zeros(0, dtype=np.int64)
    groups = pd.factorize(table["group"], sort=True)[0] if share else np.zeros(len(table), dtype=np.int64)
    good = table["reason"].isin((CRITICAL, RANKED)).to_numpy()
    spread = Spread(diversity, margin, *points) if diversity in SPREAD and points is not None else None
    return core_rows(order, min(k, len(order)), good, groups, share, spread)


def chosen_rows(table: pd.DataFrame, config: Mapping[str, Any], options: SelectOptions) -> IntArray:
    """Positions of the rows to select, as `choose` finds them; `config` holds the ranking's options."""
    share = config["balance_share"] if config["balance"] is not None else 0.0
    return choose(table, options.top, None, None, config["diversity"], share=share, fill=options.fill)


def shortfall(table: pd.DataFrame, options: CurateOptions) -> list[str]:
    """Warnings: fewer rows are selected than asked for, or some of them only to fill the quota."""
    if options.min_score is not None:
        return []
    k, selected = number_of(options, len(table)), int(table["selected"].sum())
    chosen = table["reason"][table["selected"]]
    bad, found = chosen[~chosen.isin(GOOD_REASONS)].value_counts(), list[str]()
    if len(bad):
        named = ", ".join(f"{n} {reason}" for reason, n in bad.items())
        found.append(f"{int(bad.sum())} of the {selected} selected rows are only there to fill the quota: {named}")
    few = f"{selected} rows are selected, not {k}"
    near = options.diversity == "near-duplicates"  # of which too few may be there, however good all are
    if selected < k and options.fill and not near:
        found.append(f"{few}: all others are labelled as bad, which --fill does not overrule")
    elif selected < k and not options.fill and not (near and table["reason"].isin(GOOD_REASONS).all()):
        others = "all others are near-duplicates or do not" if near else "no others"
        found.append(f"{few}: {others} look worth keeping; --fill takes the next best all the same")
    return found


def changed_by_labels(table: pd.DataFrame, options: CurateOptions, points: Points | None, pool: str) -> dict[str, int]:
    """How many rows entered the selection by the labels and left it: what would be selected of the ranking before.

    That is the one in the output folder, or else that of the resumed selector where it ranked the same pool, which
    `pool` is the fingerprint of; nothing where there is none that can be read. Whatever it selected, here its rows are
    selected as `options` say; `points` are those of `ranked_table`.
    """
    for folder in filter(None, (options.output_dir, options.resume_selector)):
        try:
            if read_manifest(folder).inputs.get("pool") != pool:
                continue
            before = read_table(Path(folder) / "scores.parquet", "row", "score", "rank", "reason", "duplicate_of")
            if not before["row"].equals(table["row"]):
                continue
            if "group" in table:
                before["group"] = table["group"]
            old = set(_asked_for(before, options, points).tolist())
        except PharmacistError:
            continue
        new = set(np.flatnonzero(table["selected"]).tolist())
        return {"entered": len(new - old), "left": len(old - new)}
    return {}


def balance_counts(table: pd.DataFrame, options: CurateOptions) -> dict[str, dict[str, int]]:
    """Number of rows, selected rows, and rows that rank alone would select, per group; differences are printed."""
    diversity = "none" if options.diversity in SPREAD else options.diversity
    best = _asked_for(table, replace(options, balance=None, diversity=diversity), None)
    best_of, counts = table["group"].iloc[best].value_counts(), {}
    for group, rows in table.groupby("group", observed=True):
        n, selected, by_rank = len(rows), int(rows["selected"].sum()), int(best_of.get(group, 0))
        counts[str(group)] = {"rows": n, "selected": selected, "by_rank": by_rank}
        message = f"{selected} of {n} rows are selected; by rank alone it would be {by_rank}"
        if selected == 0:
            message = f"none of its {n} rows is selected, since none is judged worth keeping"
        if selected == 0 or selected > by_rank:
            say(f"--balance {options.balance}: {plain(group)}: {message}")
    return counts
