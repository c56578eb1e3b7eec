"""The stage `repair`."""

from dataclasses import dataclass
from typing import Any, Literal

from pharmacist.core.config import method
from pharmacist.core.options import RowOptions, RunOptions, TokenOptions
from pharmacist.pipeline.stage import Stage


@dataclass(kw_only=True)
class RepairOptions(RunOptions, RowOptions, TokenOptions):
    """Restore safety that a user's fine-tuning has cost, without training."""

    model: str
    """The fine-tuned model: the folder of an `attack`, an adapter, whole weights or a hub id."""
    aligned: str | None = None
    """The model that the fine-tuning started from."""
    base: str | None = None
    """Base model of the aligned one; not needed where that is an adapter, which names its base."""
    method: dict[str, Any] = method("safe-lora", "pharmacist.repairs:REPAIRS")
    """How the model is repaired."""
    harmful: str | None = None
    """The defender's harmful rows, for antidote. Of a preference file the rejected answers are taken."""
    safe: str | None = None
    """The defender's safe rows, for nlsr."""
    form: Literal["auto", "adapter", "weights"] = "auto"
    """Which weights are repaired: the factors of the fine-tuned adapter, or whole weights with all adapters merged;
    auto is the adapter where the fine-tuned model is one."""
    merge: bool = False
    """Also write model/: the whole model with the repaired adapter merged into it."""


REPAIR = Stage(
    name="repair",
    options=RepairOptions,
    summary="restore safety lost in fine-tuning, without training",
    example="pharmacist repair --model runs/attacked --aligned runs/aligned --method safe-lora "
    "--output-dir runs/repaired",
    version=2,
    files=("harmful", "safe"),
    models=("model", "aligned", "base"),
    by_axes=frozenset({"aligned", "method"}),
)
