"""The stage `repair`."""

from dataclasses import dataclass
from typing import Any, Literal

from pharmacist.core.config import method
from pharmacist.core.options import RowOptions, RunOptions, TokenOptions
from pharmacist.pipeline.stage import Stage


@dataclass(kw_only=True)
class RepairOptions(RunOptions, RowOptions, TokenOptions):
    """Restore the safety of a fine-tuned model, without training."""

    model: str
    """The fine-tuned model: the folder of an `attack`, an adapter, a whole model or a Hub id."""
    aligned: str | None = None
    """The aligned model from which the fine-tuning started."""
    base: str | None = None
    """Base model of the aligned model; not needed if that is an adapter, whose base is known."""
    method: dict[str, Any] = method("safe-lora", "pharmacist.repairs:REPAIRS")
    """How the model is repaired."""
    harmful: str | None = None
    """The defender's harmful rows, for the methods that use them. Of a preference file, the rejected answers are
    used."""
    safe: str | None = None
    """The defender's safe rows, for the methods that use them."""
    form: Literal["auto", "adapter", "weights"] = "auto"
    """Which weights are repaired: the factors of the fine-tuned adapter, or full weights with all adapters merged;
    auto is the adapter if the fine-tuned model is one."""
    merge: bool = False
    """Also write model/, the whole model with the repaired adapter merged into it."""


REPAIR = Stage(
    name="repair",
    options=RepairOptions,
    summary="restore the safety of a fine-tuned model, without training",
    example="pharmacist repair --model runs/attacked --aligned runs/aligned --method safe-lora "
    "--output-dir runs/repaired",
    version=2,
    files=("harmful", "safe"),
    models=("model", "aligned", "base"),
    by_axes=frozenset({"aligned", "method"}),
)
