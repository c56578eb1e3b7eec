"""The command `report`: its options and its declaration."""

from dataclasses import dataclass, field

from pharmacist.pipeline.stage import Stage


@dataclass(kw_only=True)
class ReportOptions:
    """Rebuild the HTML report of a finished folder, and the tables of a bench; nothing is trained or ranked."""

    run: str = field(metadata={"first": True})
    """Folder of a finished curate, demo or sweep, or of a bench; as the first argument it needs no --run."""
    baseline: str | None = None
    """For a bench: the selector with which the others are compared, by its name in the grid; full by default."""
    quiet: bool = False
    """Print no progress bars and no summary."""


REPORT = Stage(
    name="report",
    options=ReportOptions,
    summary="rebuild the HTML report of a finished folder",
    example="pharmacist report runs/core",
)
