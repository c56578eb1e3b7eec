"""A stage of grids alone: its options and its declaration."""

from dataclasses import dataclass

from pharmacist.core.options import RunOptions
from pharmacist.pipeline.stage import Stage


@dataclass(kw_only=True)
class KnownLabelsOptions(RunOptions):
    """Answer what a ranking asks."""

    ranking: str
    """Folder of a finished curate with rows to label."""
    labels: str
    """What people said of every row of its pool: labels.json, as curate reads it."""


KNOWN_LABELS = Stage(
    name="label",
    options=KnownLabelsOptions,
    run="pharmacist.pipeline.bench.known_labels:known_labels",
    version=1,
    files=("ranking", "labels"),
)
