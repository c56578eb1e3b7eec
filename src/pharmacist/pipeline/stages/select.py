"""The stage `select`: its options and its declaration."""

from dataclasses import dataclass

from pharmacist.core.errors import ConfigError
from pharmacist.core.options import RunOptions
from pharmacist.pipeline.stage import Stage


@dataclass(kw_only=True)
class SelectOptions(RunOptions):
    """Write the top of a ranking."""

    ranking: str
    """Folder of a finished curate."""
    top: float = 0.3
    """Share of the ranked rows to select, in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 < self.top <= 1:
            raise ConfigError(f"--top {self.top}: must be a share of the pool in (0, 1]")


SELECT = Stage(
    name="select", options=SelectOptions, run="pharmacist.pipeline.select:select", version=3, files=("ranking",)
)
