"""The stage `align`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pharmacist.core.config import method
from pharmacist.core.typed import AtLeast0
from pharmacist.pipeline.stage import Stage
from pharmacist.training.options import PROTOCOL, TrainingStageOptions


@dataclass(kw_only=True)
class AlignOptions(TrainingStageOptions):
    """Train a model on an alignment set with an alignment-stage defense."""

    data: str
    """Alignment set: selected.jsonl of a curate run, or rows in any format that curate reads."""
    defense: dict[str, Any] = method("sft", "pharmacist.defenses:DEFENSES", within=("pharmacist.defenses.alignment.",))
    """Alignment-stage defense; sft is none."""
    harmful: str | None = None
    """Harmful rows (harmful prompt, harmful answer) for the defenses that use them. Of a preference file, the rejected
    answers are used; by default, those of --data if it is a preference file."""
    harmful_batch_size: AtLeast0 = 0
    """Harmful rows per pass; 0 means as many as alignment rows."""
    weights: str | None = None
    """Weights of the rows' losses: scores.parquet of the curate run that wrote --data, or a Parquet file with a column
    weight and a line per row. Only relative weights matter: the mean over the training rows is set to 1."""
    pair_by: Literal["prompt", "row", "turn"] = "prompt"
    """How alignment rows are paired with harmful rows, for the defenses that read such pairs: by equal prompts, by row
    number, or in turn (one after the other and repeatedly, for harmful rows with other prompts)."""

    TRAIN_DEFAULTS: ClassVar[Mapping[str, Any]] = PROTOCOL


ALIGN = Stage(
    name="align",
    options=AlignOptions,
    summary="train on an alignment set with an alignment-stage defense",
    example="pharmacist align --data runs/core/selected.jsonl --model MODEL --output-dir runs/aligned",
    version=2,
    files=("data", "harmful"),
    models=("model",),
    costly=("work/train/**/*.safetensors",),
    again="trains again",
    by_axes=frozenset({"data", "defense", "weights"}),
)
