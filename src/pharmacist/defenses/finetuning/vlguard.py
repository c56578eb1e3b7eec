"""VLGuard mixing: add the defender's safe rows to the user's."""

from dataclasses import dataclass
from typing import Literal

import torch

from pharmacist.core.typed import Checked, NotNegative
from pharmacist.nn.distributed import total
from pharmacist.nn.grads import Gradient
from pharmacist.nn.losses import targets
from pharmacist.training.strategy import Batch, GradientStrategy, StepContext


@dataclass
class VLGuardConfig(Checked):
    """Options of VLGuard mixing."""

    share: NotNegative = 0.1
    """Safe rows per row of the user's set in the modes append and replace; 0 is sft."""
    mode: Literal["append", "replace", "joint"] = "append"
    """append: train on more rows. replace: leave out as many benign rows (same cost; for comparisons only, since a
    provider does not know which rows are benign). joint: a second loss on a batch of safe rows in every step."""
    lam: NotNegative = 0.1
    """Weight of the second loss in the mode joint; 0 is sft."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_unused("share" if self.mode == "joint" else "lam", because="mode")


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

    _window: list[Batch]
    _targets: torch.Tensor

    def mixed_in(self, rows: int) -> tuple[int, bool]:
        if self.config.mode == "joint":
            return 0, False
        return int(self.config.share * rows + 0.5), self.config.mode == "replace"

    def auxiliary(self, step: StepContext) -> Gradient | None:
        if self.config.mode != "joint" or not self.config.lam:
            return None
        if step.micro == 0:  # all of the update at once, so that its tokens are known before the first is weighed
            self._window = [step.next("safe") for _ in range(round(1 / step.scale))]
            own = sum(int(targets(batch["labels"])[0].sum()) for batch in self._window)
            self._targets = total(torch.tensor(own, device=self._window[0]["labels"].device))
        loss = step.mean_over_update(*step.summed_ce(self._window[step.micro]), self._targets.clamp(min=1))
        step.log(safe_loss=step.value(loss))
        return {name: self.config.lam * value for name, value in step.grads(loss).items()}
