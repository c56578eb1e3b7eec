"""Options of the default selector, apart from it: the command line's help must not wait for torch."""

from dataclasses import dataclass
from typing import Literal

from pharmacist.core.errors import ConfigError
from pharmacist.nn.options import AdapterOptions


READERS = ("lexical", "probe", "adapters")
"""Cheapest first."""


@dataclass
class PharmacistConfig(AdapterOptions):
    """Options of the selector."""

    form: Literal["evidence", "bilevel", "both"] = "both"
    """Evidence classes, bilevel twins, or evidence to throw out faults and the twins' contrast to order the rest."""
    readers: str = "auto"
    """Evidence readers: auto (those that pay on the references), or any of lexical,probe,adapters with commas."""
    folds: int = 4
    """Cross-fitting folds of lexical reader and probe."""
    adapter_folds: int = 2
    """Cross-fitting folds of the adapters, which cost more to train."""
    corruptions_per_row: int = 2
    """Damaged versions made of each safe reference, and half as many of each utility reference."""
    adapter_steps: int = 30
    """Training steps of each class adapter."""
    cascade: float = 0.0
    """Share of the pool, nearest to the cut by the cheaper readers, that the adapters read; 0 means all of it."""
    solver: Literal["closed-form", "gradient"] = "closed-form"
    """How the twins' weights over the pool are found."""
    cotrain: float = 0.25
    """Share of the pool (at least 256 rows) that the twins train on; 0 means on references only, the cheap form."""
    twin_steps: int = 60
    """Training steps of each twin (of the closed form: per round)."""
    rounds: int = 1
    """Rounds of the closed form: train the twins, score the pool, weight it anew."""
    gamma: float = 0.5
    """Weight of the pool in the twins' losses against that of the references."""
    mu: float = 0.5
    """Weight of the utility references in the twins' losses."""
    tau: float = 1.0
    """Temperature of the pool weights in nats; larger is closer to uniform."""
    weight_rate: float = 0.3
    """Step size of the gradient solver's logits; from about 3 on few rows take all the weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.readers != "auto":
            unknown = [name for name in self.reader_names() if name not in READERS]
            if unknown or not self.reader_names():
                raise ConfigError(f"selector.readers: '{self.readers}' is not auto or any of {', '.join(READERS)}")
        for name in ("folds", "adapter_folds"):
            if getattr(self, name) < 2:
                raise ConfigError(f"selector.{name} must be at least 2, not {getattr(self, name)}")
        for name in ("cascade", "cotrain"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"selector.{name} is a share of the pool in [0, 1], not {getattr(self, name)}")
        if not 0 <= self.gamma < 1:
            raise ConfigError(f"selector.gamma must lie in [0, 1), not {self.gamma}")
        if not self.tau > 0:
            raise ConfigError(f"selector.tau must be positive, not {self.tau}")
        for name in ("rounds", "adapter_steps", "twin_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"selector.{name} must be at least 1, not {getattr(self, name)}")
        if self.solver == "gradient" and self.cotrain < 1:
            raise ConfigError("selector.solver gradient weights every row, so it needs --selector.cotrain 1")
        if self.solver == "gradient" and self.batch_size == 1:
            raise ConfigError(
                "selector.solver gradient leaves all weights equal where selector.batch_size is 1; take 2 or more"
            )
        if self.solver == "gradient" and self.gamma == 0:
            raise ConfigError("selector.solver gradient learns nothing where selector.gamma is 0")

    def reader_names(self) -> tuple[str, ...]:
        """The readers asked for, all of them under ``auto``."""
        if self.readers == "auto":
            return READERS
        asked = {name.strip() for name in self.readers.split(",")} - {""}
        return tuple(name for name in READERS if name in asked) + tuple(sorted(asked - set(READERS)))
