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
    """Run the whole pipeline in a synthetic world: rank, select, align, attack, evaluate."""

    rows: Annotated[int, Ge(100)] = 600
    """Rows in the alignment pool."""
    mislabel: Annotated[float, Ge(0), Le(0.5)] = 0.05
    """Share of the pool's rows that are mislabelled: their answers do what is forbidden."""
    pool: Literal["planted", "clean"] = "planted"
    """planted: a pool with known faults. clean: a pool without faults, whose refusals differ only in strength."""
    seeds: AtLeast1 = 3
    """Number of repetitions with different seeds, for the intervals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool == "clean" and self.mislabel != DemoOptions.mislabel:
            raise ConfigError("--mislabel: a clean pool has no mislabelled rows; leave it out")


DEMO = Stage(
    name="demo",
    options=DemoOptions,
    summary="run the whole pipeline in a synthetic world, offline, within minutes",
    example="pharmacist demo --output-dir runs/demo",
    version=3,
    read_again=("demo.json",),
)
