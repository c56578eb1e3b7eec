"""Prompts that occur on both sides of a split that must be disjoint: pool and references, training and evaluation."""

import datasets
import numpy as np
import numpy.typing as npt

from pharmacist.core.errors import DataError
from pharmacist.data.formats.base import named


def prompt_keys(rows: datasets.Dataset) -> npt.NDArray[np.uint64]:
    """`normalise.prompt_key` of every row, shape [rows]."""
    tables = rows.select_columns(["prompt_key"]).with_format("arrow").iter(4096)
    return np.concatenate([np.empty(0, dtype=np.uint64), *(table.column(0).to_numpy() for table in tables)])


def shared_prompts(a: datasets.Dataset, b: datasets.Dataset) -> npt.NDArray[np.int64]:
    """Positions of the rows of `b` whose prompt, normalised, also occurs in `a`; ascending."""
    return np.flatnonzero(np.isin(prompt_keys(b), prompt_keys(a)))


def assert_disjoint(a: datasets.Dataset, b: datasets.Dataset, *, names: tuple[str, str]) -> None:
    """Checks that two sets of canonical rows share no prompt; a DataError names them and rows of `b` that do."""
    shared = shared_prompts(a, b)
    if len(shared):
        numbers = b["row"] if "row" in b.column_names else range(len(b))
        which = named([numbers[int(position)] for position in shared])
        raise DataError(
            f"{names[1]}: {len(shared)} of {len(b)} rows share a prompt with {names[0]} ({which}); "
            "delete them from one of the two"
        )
