"""KL-regularised fine-tuning: keep the predictions of the aligned model on the user's own rows."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from pharmacist.core.typed import Checked, NotNegative
from pharmacist.defenses.finetuning.start import at_start, weights_now
from pharmacist.nn.losses import precise, targets
from pharmacist.training.strategy import GradientStrategy, StepContext


@dataclass
class KLConfig(Checked):
    """Options of KL-regularised fine-tuning."""

    lam: NotNegative = 0.1
    """Weight of the divergence; 0 is sft."""
    compat: Literal["none", "reference"] = "none"
    """reference: the published softmax, over positions instead of tokens, with prompt and padding."""


def kl_divergence(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) per position in nats, never negative, from logits of shape [positions, vocabulary]."""
    student, target = precise(logits).log_softmax(-1), precise(teacher).log_softmax(-1)
    return functional.kl_div(student, target, reduction="none", log_target=True).sum(-1)


def reference_divergence(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The published divergence: distributions over positions, per vocabulary entry; a scalar, divided by the rows.

    It is not 0 for two models that predict the same, and depends on padding. Logits have the shape [rows, length,
    vocabulary].
    """
    return functional.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="batchmean")


class KL(GradientStrategy):
    """Adds lam * KL(initial model || model), averaged over the tokens of the completions.

    Source: a baseline of Huang et al., "Vaccine", NeurIPS 2024, whose code takes the softmax over the wrong
    dimension (``compat reference``).
    """

    Config = KLConfig
    stages = frozenset({"finetune"})
    paper = "arXiv 2402.01109"
    config: KLConfig

    def setup(self, model: nn.Module, seed: int) -> dict[str, Any]:
        self.start = weights_now(model) if self.config.lam else {}
        return {"tensors": len(self.start)}

    def auxiliary(self, step: StepContext) -> None:
        """Computes the predictions of the initial model before the main pass."""
        if self.config.lam:
            keep, _ = targets(step.batch["labels"])
            with at_start(step, self.start):
                whole = self.config.compat == "reference"
                self._teacher = step.output(step.batch).logits if whole else step.logits(step.batch, keep)

    def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        if not self.config.lam:
            return loss
        if self.config.compat == "reference":
            penalty = reference_divergence(outputs.logits, self._teacher)
        else:
            keep, tokens = targets(step.batch["labels"])
            divergence = kl_divergence(outputs.logits[keep], self._teacher).sum()
            penalty = step.mean_over_update(divergence, len(tokens), step.targets)
        step.log(kl=step.value(penalty))
        return loss + step.scale * self.config.lam * penalty.to(loss.dtype)

    def after_backward(self, step: StepContext) -> None:
        self._teacher = torch.empty(0)
