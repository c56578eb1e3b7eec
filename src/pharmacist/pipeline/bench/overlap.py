"""Looks for prompts of the evaluations among the rows of the attacks: what was trained on measures nothing."""

import os
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pharmacist.attacks import ATTACKS
from pharmacist.core.errors import PharmacistError
from pharmacist.core.options import RowOptions
from pharmacist.data.records import column
from pharmacist.data.where import conditions_for
from pharmacist.evaluation.prompts import open_prompts
from pharmacist.pipeline.bench.grid import Plan
from pharmacist.pipeline.rows import read


_ASKED = ("prompts", "benign_prompts", "task", "margin")


class _Rows(NamedTuple):
    """Rows that an option names, and how they are read."""

    option: str
    spec: str | None
    columns: str | None
    where: tuple[str, ...]

    @classmethod
    def of(cls, options: Any, name: str) -> "_Rows":
        return cls(name, getattr(options, name), options.columns, tuple(getattr(options, "where", ())))


def shared_prompts(plan: Plan) -> list[str]:
    """A sentence for each pair of files, of an evaluation and of an attack before it, that share prompts.

    Only files on this machine are read; those of the synthetic world share none.
    """
    pairs = dict.fromkeys(pair for cell in plan.cells for pair in _pairs(plan, cell.roles))
    files = {rows for pair in pairs for rows in pair if rows.spec and _is_read(rows.spec, plan)}
    keys, found = cache(_prompt_keys), []
    for drawn, asked in pairs:
        if {drawn, asked} <= files and (number := int(np.isin(keys(asked), keys(drawn)).sum())):
            found.append(
                f"evaluate: {asked.option} {asked.spec}: {number} of {len(keys(asked))} rows share a prompt with "
                f"{drawn.option} {drawn.spec}, from which the attack draws its rows; delete them from one of the two"
            )
    return found


def _pairs(plan: Plan, roles: Mapping[str, str]) -> Iterator[tuple[_Rows, _Rows]]:
    attack, measured = (plan.stages[roles[role]].options for role in ("attack", "after"))
    for drawn, asked in product(sorted(ATTACKS.build_from(attack.kind).needs), _ASKED):
        yield _Rows.of(attack, drawn), _Rows.of(measured, asked)


def _is_read(spec: str, plan: Plan) -> bool:
    """Whether rows, maybe as ``NAME:FILE`` or ``FOLDER:SPLIT``, are on this machine and not of the synthetic world."""
    places = (spec, spec.partition(":")[2], spec.rpartition(":")[0])
    return Path(spec) not in plan.data.texts and any(map(os.path.exists, places))


def _prompt_keys(rows: _Rows) -> npt.NDArray[Any]:
    """Keys of the prompts; none where the rows cannot be read, which their stage explains."""
    try:
        source = open_prompts(rows.spec, rows.option)
        where = conditions_for(rows.where, rows.option, source)
        options = RowOptions(columns=rows.columns, on_bad_row="skip")
        with TemporaryDirectory(prefix="pharmacist-") as work:
            records = read(source, options, Path(work) / "rows", usual_names=True, where=where, prompts_only=True)
            return column(records.dataset, "prompt_key").copy()
    except PharmacistError:
        return np.zeros(0, dtype=np.int64)
