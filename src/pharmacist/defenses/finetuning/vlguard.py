"""VLGuard mixing: add the defender's safe rows to the user's."""

from dataclasses import dataclass
from typing import Literal

from pharmacist.core.errors import ConfigError
from pharmacist.nn.grads import Gradient
from pharmacist.training.strategy import GradientStrategy, StepContext


@dataclass
class VLGuardConfig:
    """Options of VLGuard mixing."""

    share: float = 0.1
    """Safe rows per row of the user's set; 0 is sft."""
    mode: Literal["append", "replace", "joint"] = "append"
    """append: train on more rows. replace: leave as many benign rows out (same cost; for comparisons only, since a
    provider does not know which rows are benign). joint: a second loss on a batch of safe rows in every step."""
    lam: float = 0.1
    """Weight of the second loss in joint."""

    def __post_init__(self) -> None:
        for name in ("share", "lam"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")


class VLGuard(GradientStrategy):
    """Mixes safe rows into the user's set, or adds their loss to every step.

    Paper: Zong et al., "Safety Fine-Tuning at (Almost) No Cost: A Baseline for Vision Large Language Models", ICML
    2024, mixed fine-tuning; for text as in Huang et al., "Vaccine", 2024.
    """

    Config = VLGuardConfig
    stages = frozenset({"finetune"})
    streams = ("safe",)
    paper = "arXiv 2402.02207"
    config: VLGuardConfig

    def mixed_in(self, rows: int) -> tuple[int, bool]:
        """How many safe rows join the user's, and whether they take the place of benign ones."""
        if self.config.mode == "joint":
            return 0, False
        return int(self.config.share * rows + 0.5), self.config.mode == "replace"

    def auxiliary(self, step: StepContext) -> Gradient | None:
        """The gradient of the safe rows' loss, in joint."""
        if self.config.mode != "joint" or not self.config.lam:
            return None
        loss = step.ce(step.next("safe"))
        step.log(safe_loss=step.value(loss))
        return {name: self.config.lam * value for name, value in step.grads(loss).items()}
