"""Options of the default repair, apart from it: the command line's help must not wait for torch."""

from dataclasses import dataclass
from typing import Literal

from pharmacist.core.errors import ConfigError


@dataclass
class SafeLoraConfig:
    """Options of Safe LoRA."""

    select: Literal["threshold", "number"] = "threshold"
    """Which modules are projected: those at or below the threshold, or a number of the most dissimilar ones."""
    threshold: float = 0.5
    """Cosine between an update and its projection at or below which it is projected."""
    number: int = 10
    """How many modules are projected under number."""
    projector: Literal["orthogonal", "paper", "trace"] = "orthogonal"
    """orthogonal: onto the column space of the alignment update V; of no use where that is the whole space, as after
    full tuning. paper: V V^T / |V|, which also rescales by the size of V. trace: V V^T / |V|^2, which only shrinks."""

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ConfigError(f"number must be at least 1, not {self.number}")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold must lie in [0, 1], not {self.threshold}")
