"""The command `report`: its options and its declaration."""

from dataclasses import dataclass, field

from pharmacist.pipeline.stage import Stage


@dataclass(kw_only=True)
class ReportOptions:
    """Write the page of a finished folder again, of a bench its tables too; nothing is trained or ranked."""

    run: str = field(metadata={"first": True})
    """Folder of a finished curate, demo or sweep, or of a bench; as the first word it needs no --run."""
    baseline: str | None = None
    """For a bench: the selector that the others are compared with, by its name in the grid; full by default."""
    quiet: bool = False
    """No progress bars and no summary."""


REPORT = Stage(
    name="report",
    options=ReportOptions,
    summary="write the page of a finished folder again",
    example="pharmacist report runs/core",
)
