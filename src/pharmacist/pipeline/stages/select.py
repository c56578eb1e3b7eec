"""The stage `select`: its options and its declaration."""

from dataclasses import dataclass

from pharmacist.core.options import RunOptions
from pharmacist.core.typed import Share
from pharmacist.pipeline.stage import Stage


@dataclass(kw_only=True)
class SelectOptions(RunOptions):
    """Write the top of a ranking."""

    ranking: str
    """Folder of a finished curate."""
    top: Share = 0.3
    """Share of the ranked rows to select, in (0, 1]."""
    fill: bool = True
    """Fill the share with rows whose own reason speaks against them, where too few others are left."""


SELECT = Stage(
    name="select", options=SelectOptions, run="pharmacist.pipeline.select:select", version=3, files=("ranking",)
)
