"""The command `demo`: its options and its declaration."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from pharmacist.core.errors import ConfigError
from pharmacist.core.options import RunOptions
from pharmacist.core.typed import AtLeast1
from pharmacist.pipeline.stage import Stage


@dataclass(kw_only=True)
class DemoOptions(RunOptions):
    """The whole story on the made-up world: rank, select, align on full, random and core subset, attack, evaluate."""

    rows: Annotated[int, Ge(100)] = 600
    """Rows in the alignment pool."""
    mislabel: Annotated[float, Ge(0), Le(0.5)] = 0.05
    """Share of the pool's rows that are mislabelled: their answers do what is forbidden."""
    pool: Literal["planted", "clean"] = "planted"
    """planted: a pool with known faults. clean: one without any, whose refusals differ only in force."""
    seeds: AtLeast1 = 3
    """Repetitions with other seeds, for the intervals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool == "clean" and self.mislabel != DemoOptions.mislabel:
            raise ConfigError("--mislabel: is of the planted pool, and a clean one has no such rows; leave it out")


DEMO = Stage(
    name="demo",
    options=DemoOptions,
    summary="the whole story on the made-up world, offline, in minutes",
    example="pharmacist demo --output-dir runs/demo",
    version=3,
    read_again=("demo.json",),
)
