"""Poisoned fine-tuning sets: benign rows with an exact share of harmful ones."""

import datasets
import numpy as np
import pyarrow as pa

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.seeding import derive
from pharmacist.data.splits import assert_disjoint


def mix(
    benign: datasets.Dataset, harmful: datasets.Dataset, *, n: int, poison_ratio: float, seed: int
) -> datasets.Dataset:
    """Draws a set of `n` rows of which exactly ``round(poison_ratio * n)`` are harmful (as Python rounds:
    halves to the even number).

    Sets of one seed and `n` are nested: the harmful rows at a smaller ratio are among those at a larger one, the
    benign rows at a larger ratio among those at a smaller one, and rows that two sets share stand in the same order.

    Args:
        benign: Canonical rows.
        harmful: Canonical rows; they share no prompt with `benign`.
        n: Size of the set.
        poison_ratio: Share of harmful rows, in [0, 1].
        seed: Of the draw and the order.

    Returns:
        The rows, shuffled, with their columns and ``is_harmful`` (bool). ``row`` is the number in their own source.
    """
    if n < 1 or not 0 <= poison_ratio <= 1:
        wrong = f"samples {n}: must be at least 1" if n < 1 else f"poison ratio {poison_ratio}: must lie in [0, 1]"
        raise ConfigError(wrong)
    n_harmful = round(poison_ratio * n)
    n_benign = n - n_harmful
    for name, rows, asked in (("harmful", harmful, n_harmful), ("benign", benign, n_benign)):
        if asked > len(rows):
            raise DataError(
                f"{asked} {name} rows are asked for and there are {len(rows)}; use fewer samples, another ratio "
                "or more rows"
            )
    if n_harmful and n_benign:
        assert_disjoint(benign, harmful, names=("the benign rows", "the harmful rows"))
    parts, order = [], []
    for name, rows, asked in (("harmful", harmful, n_harmful), ("benign", benign, n_benign)):
        rng = np.random.default_rng(derive(seed, "mix", name))
        chosen = rng.permutation(len(rows))[:asked]
        # Every row has its own place in the order, drawn once, whatever else is in the set.
        order.append(rng.random(len(rows))[chosen])
        if asked:
            drawn = rows.with_format("arrow")[chosen]
            parts.append(drawn.append_column("is_harmful", pa.array([name == "harmful"] * asked, pa.bool_())))
    mixed = pa.concat_tables(parts, promote_options="permissive")
    return datasets.Dataset(mixed.take(pa.array(np.argsort(np.concatenate(order), kind="stable"))))


def mix_safe(
    rows: datasets.Dataset, safe: datasets.Dataset, *, count: int, replace: bool, seed: int
) -> datasets.Dataset:
    """Adds so many of a defender's safe rows to a user's set (`mix`).

    Args:
        rows: The set.
        safe: Canonical rows.
        count: Safe rows to add.
        replace: Leave as many benign rows out, so that the size stays.
        seed: Of the draw and the order.

    Returns:
        The rows, shuffled, with ``is_harmful`` and ``is_safe`` (bool).
    """
    if count > len(safe):
        raise DataError(f"--safe: {count} rows are asked for and there are {len(safe)}; mix in fewer or give more")
    rng = np.random.default_rng(derive(seed, "mix", "safe"))
    chosen = rng.permutation(len(safe))[:count]
    kept = np.arange(len(rows))
    if replace:
        benign = np.flatnonzero(~np.asarray(rows["is_harmful"], dtype=bool))
        if count > len(benign):
            raise DataError(f"{count} safe rows cannot replace {len(benign)} benign ones; mix in fewer")
        kept = np.setdiff1d(kept, rng.permutation(benign)[:count])
    parts = [rows.with_format("arrow")[kept].append_column("is_safe", pa.array([False] * len(kept), pa.bool_()))]
    if count:
        added = safe.with_format("arrow")[chosen]
        for name, value in (("is_harmful", False), ("is_safe", True)):
            added = added.append_column(name, pa.array([value] * count, pa.bool_()))
        parts.append(added)
    mixed = pa.concat_tables(parts, promote_options="permissive")
    return datasets.Dataset(mixed.take(pa.array(rng.permutation(len(mixed)))))
