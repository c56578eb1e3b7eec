"""Options of the default selector, in a module that loads without torch: the command line's help needs them."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from pharmacist.core.errors import ConfigError
from pharmacist.core.typed import AtLeast0, AtLeast1, Fraction, NotNegative, Positive
from pharmacist.nn.options import AdapterOptions


READERS = ("lexical", "probe")
"""Cheapest first."""


@dataclass
class PharmacistConfig(AdapterOptions):
    """Options of the selector."""

    form: Literal["evidence", "bilevel", "both"] = "evidence"
    """evidence: from references. bilevel: twins. both: evidence, with the best rows also ordered by the contrast of
    the twins if the contrast separates held-out references."""
    readers: str = "auto"
    """Evidence readers: lexical (word statistics), probe (hidden states of --model), or both, separated by a comma;
    auto uses both if there is a model."""
    folds: Annotated[int, Ge(2)] = 4
    """Cross-fitting folds of the references, unless these come from several sources."""
    corruptions_per_row: AtLeast0 = 1
    """Number of damaged versions of each safe reference; each utility reference gets half as many, rounded up."""
    solver: Literal["closed-form", "gradient"] = "closed-form"
    """How the twins' weights over the pool are found."""
    cotrain: Fraction = 0.25
    """Share of the pool (at least 256 rows) that the twins train on; with 0 they train on references only, which is
    cheap."""
    twin_steps: AtLeast1 = 60
    """Training steps of each twin (for the closed form, per round)."""
    rounds: AtLeast1 = 1
    """Rounds of the closed form: train the twins, score the pool, update its weights."""
    gamma: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Weight of the pool in the twins' losses against that of the references."""
    mu: NotNegative = 0.5
    """Weight of the utility references in the twins' losses."""
    tau: Positive = 1.0
    """Temperature of the pool weights in nats; larger is closer to uniform."""
    weight_rate: Positive = 0.3
    """Step size of the gradient solver's logits; from about 3 on, a few rows get all the weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.readers != "auto" and not set() < self._asked() <= set(READERS):
            raise ConfigError(f"selector.readers: '{self.readers}' is not auto or any of {', '.join(READERS)}")
        if self.solver == "gradient" and self.cotrain < 1:
            raise ConfigError("selector.solver gradient weights every row, so it needs --selector.cotrain 1")
        if self.solver == "gradient" and self.batch_size == 1:
            raise ConfigError(
                "selector.solver gradient leaves all weights equal where selector.batch_size is 1; take 2 or more"
            )
        if self.solver == "gradient" and self.gamma == 0:
            raise ConfigError("selector.solver gradient learns nothing where selector.gamma is 0")

    def _asked(self) -> set[str]:
        return {name.strip() for name in self.readers.split(",")} - {""}

    def reader_names(self, *, model: bool = True) -> tuple[str, ...]:
        """The readers asked for; under ``auto`` all of them, those without a model where there is none."""
        if self.readers == "auto":
            return READERS if model else READERS[:1]
        return tuple(name for name in READERS if name in self._asked())
