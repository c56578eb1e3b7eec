"""Options of the default repair, apart from it: the command line's help must not wait for torch."""

from dataclasses import dataclass
from typing import Literal

from pharmacist.core.typed import AtLeast1, Checked, Fraction


@dataclass
class SafeLoraConfig(Checked):
    """Options of Safe LoRA."""

    select: Literal["threshold", "number"] = "threshold"
    """Which modules are projected: those at or below the threshold, or a number of the least similar ones."""
    threshold: Fraction = 0.5
    """Cosine similarity between an update and its projection at or below which the update is projected."""
    number: AtLeast1 = 10
    """Number of modules that are projected with the choice number."""
    projector: Literal["orthogonal", "paper", "trace"] = "orthogonal"
    """orthogonal: onto the column space of the alignment update V; of no use if that is the whole space, as after full
    tuning. paper: V V^T / |V|, which also rescales by the size of V. trace: V V^T / |V|^2, which only shrinks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_unused("number" if self.select == "threshold" else "threshold", because="select")
