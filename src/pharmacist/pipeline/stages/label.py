"""The command `label`: its options and its declaration."""

from dataclasses import dataclass, field

from pharmacist.pipeline.stage import Stage


@dataclass(kw_only=True)
class LabelOptions:
    """Label the rows of a ranking whose label would teach most, in a terminal."""

    run: str = field(metadata={"first": True})
    """Folder of a finished curate; as the first word it needs no --run."""
    output: str = "labels.json"
    """File of labels, written after each one. An earlier one is gone on with."""


LABEL = Stage(
    name="label",
    options=LabelOptions,
    run="pharmacist.pipeline.label:label",
    summary="label the rows of a ranking that would teach it most, in a terminal",
    example="pharmacist label runs/core --output labels.json",
    page="label-forty-rows",
)
