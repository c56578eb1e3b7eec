"""Poisoned fine-tuning sets: benign rows with an exact share of harmful ones; prompts that two sets share."""

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pharmacist.core.console import named
from pharmacist.core.errors import DataError
from pharmacist.core.seeding import derive
from pharmacist.data.records import column


def shared_prompts(a: datasets.Dataset, b: datasets.Dataset) -> npt.NDArray[np.int64]:
    """Positions of the rows of `b` whose prompt, normalised, also occurs in `a`; ascending."""
    return np.flatnonzero(np.isin(column(b, "prompt_key"), column(a, "prompt_key")))


def assert_disjoint(a: datasets.Dataset, b: datasets.Dataset, *, names: tuple[str, str]) -> None:
    """Checks that two sets of canonical rows share no prompt; a DataError names them and rows of `b` that do."""
    shared = shared_prompts(a, b)
    if len(shared):
        raise DataError(
            f"{names[1]}: {len(shared)} of {len(b)} rows share a prompt with {names[0]} "
            f"({named(column(b, 'row')[shared].tolist())}); delete them from one of the two"
        )


def mix(
    benign: datasets.Dataset, harmful: datasets.Dataset, *, n: int, poison_ratio: float, seed: int
) -> datasets.Dataset:
    """Draws a set of `n` rows of which exactly ``round(poison_ratio * n)`` are harmful (halves to the even number).

    Sets of one seed and `n` are nested: the harmful rows at a smaller ratio are among those at a larger one, the
    benign rows at a larger ratio among those at a smaller one, and rows that two sets share stand in the same order.
    `benign` and `harmful` are canonical rows that share no prompt.

    Returns:
        The rows, shuffled, with their columns and ``is_harmful`` (bool). ``row`` is their number in their source.
    """
    n_harmful = round(poison_ratio * n)
    if 0 < n_harmful < n:
        assert_disjoint(benign, harmful, names=("the benign rows", "the harmful rows"))
    parts, order = [], []
    for name, rows, count in (("harmful", harmful, n_harmful), ("benign", benign, n - n_harmful)):
        if count > len(rows):
            raise DataError(
                f"{count} {name} rows are requested, but there are only {len(rows)}; use fewer samples, another ratio "
                "or more rows"
            )
        rng = np.random.default_rng(derive(seed, "mix", name))
        chosen = rng.permutation(len(rows))[:count]
        # The position of a row in the order is drawn once, whatever else is in the set.
        order.append(rng.random(len(rows))[chosen])
        parts.append(_drawn(rows, chosen, is_harmful=name == "harmful"))
    return _ordered(parts, np.argsort(np.concatenate(order), kind="stable"))


def mix_safe(
    rows: datasets.Dataset, safe: datasets.Dataset, *, count: int, replace: bool, seed: int
) -> datasets.Dataset:
    """Adds `count` of a defender's safe rows to a user's set (`mix`).

    As many benign rows can be left out (`replace`), so that the size stays. The rows are shuffled, and have
    ``is_harmful`` and ``is_safe`` (bool).
    """
    if count > len(safe):
        raise DataError(
            f"--safe: {count} rows are requested, but there are only {len(safe)}; mix in fewer or give more"
        )
    rng = np.random.default_rng(derive(seed, "mix", "safe"))
    chosen = rng.permutation(len(safe))[:count]
    kept = np.arange(len(rows))
    if replace:
        benign = np.flatnonzero(~np.asarray(rows["is_harmful"][:], dtype=bool))
        if count > len(benign):
            raise DataError(f"{count} safe rows cannot replace {len(benign)} benign ones; mix in fewer")
        kept = np.setdiff1d(kept, rng.permutation(benign)[:count])
    parts = [_drawn(rows, kept, is_safe=False), _drawn(safe, chosen, is_harmful=False, is_safe=True)]
    return _ordered(parts, rng.permutation(len(kept) + count))


def _drawn(rows: datasets.Dataset, positions: npt.NDArray[np.int64], **flags: bool) -> pa.Table:
    """The rows at some positions, with a column for each flag."""
    drawn = rows.with_format("arrow")[positions]
    for name, value in flags.items():
        drawn = drawn.append_column(name, pa.array([value] * len(drawn), pa.bool_()))
    return drawn


def _ordered(parts: list[pa.Table], order: npt.NDArray[np.int64]) -> datasets.Dataset:
    filled = [part for part in parts if len(part)]
    return datasets.Dataset(pa.concat_tables(filled, promote_options="permissive").take(pa.array(order)))
