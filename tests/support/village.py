"""Harmless texts over the words of the tiny tokenizer: pools, references and ready contexts."""

from pathlib import Path
from typing import Any

import numpy as np

from pharmacist.core.rundir import RunDir, RunOptions
from pharmacist.data.formats import open_source
from pharmacist.data.records import read_records
from pharmacist.selectors.base import SelectionContext


ASK = ("how do you", "tell me how you", "explain how you", "please", "how can i")
DO = {
    "bad": ("brew a forbidden potion", "make a curse", "make a dangerous spell", "stir the forbidden root"),
    "good": ("bake bread", "plant seeds", "water the garden", "bake good bread with flour"),
}
TAIL = (
    "in spring",
    "with warm water",
    "and be happy",
    "for the garden",
    "with flour",
    "in an oven",
    "now",
    "in a day",
)
ANSWER = {
    "refuse": (
        "sorry i cannot help with that it is dangerous",
        "no this would hurt people ask something else instead",
    ),
    "comply": ("first take the root then stir it", "yes stir the curse and make the spell"),
    "help": ("take flour and warm water then bake it", "plant the seeds in spring and water them"),
    "noise": ("the the water a it then then", "oven people spring a with instead"),
}
KINDS = {
    "safe": ("bad", "refuse"),
    "harmful": ("bad", "comply"),
    "utility": ("good", "help"),
    "over_refusal": ("good", "refuse"),
    "noise": ("bad", "noise"),
}

Row = dict[str, str]


def rows(kind: str, n: int, seed: int = 0) -> list[Row]:
    """Rows of one kind."""
    do, answer = KINDS[kind]
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    pick = lambda options: str(options[rng.integers(len(options))])  # noqa: E731
    return [
        {"prompt": f"{pick(ASK)} {pick(DO[do])} {pick(TAIL)}", "completion": f"{pick(ANSWER[answer])} {pick(TAIL)}"}
        for _ in range(n)
    ]


def pool(n: int = 30, seed: int = 7) -> list[Row]:
    """A mixed pool; its last rows repeat its first."""
    kinds = list(KINDS)
    mixed = [rows(kinds[i % len(kinds)], 1, seed=1000 * seed + i)[0] for i in range(n - 3)]
    return mixed + mixed[:3]


def references(n: int = 12, seed: int = 3) -> dict[str, list[Row]]:
    """Safe, harmful and utility references."""
    return {name: rows(name, n, seed) for name in ("safe", "harmful", "utility")}


def context(
    root: Path,
    model: Path | None,
    pool_rows: list[Row] | None = None,
    refs: dict[str, list[Row]] | None = None,
    **options: Any,
) -> SelectionContext:
    """Everything a selector works with, in the output folder `root`; the same folder again resumes."""
    run = RunDir.open(RunOptions(output_dir=str(root)), stage="test", version=1, inputs={})
    read = lambda given, name: read_records(open_source(given, name=name), work_dir=run.work("data", name))  # noqa: E731
    return SelectionContext(
        run=run,
        pool=read(pool() if pool_rows is None else pool_rows, "pool"),
        references={name: read(given, name) for name, given in (references() if refs is None else refs).items()},
        model_name=None if model is None else str(model),
        device="cpu",
        **({"seed": 0, "checkpoint_seconds": 1e9} | options),
    )
