"""Constrained SFT: limit the drift of an answer's first tokens, on which alignment depends most."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pharmacist.core.typed import AtLeast0, Checked, NotNegative
from pharmacist.defenses.finetuning.start import at_start, weights_now
from pharmacist.nn.losses import target_losses, targets
from pharmacist.training.strategy import GradientStrategy, StepContext


@dataclass
class ConstrainedSFTConfig(Checked):
    """Options of constrained SFT."""

    beta: NotNegative = 0.1
    """Strength of the pull of each token towards the aligned model; 0 is sft."""
    first_factor: NotNegative = 5.0
    """Factor of beta for the answer's first token."""
    early_factor: NotNegative = 20.0
    """Factor of beta for the next early tokens."""
    early_tokens: AtLeast0 = 5
    """Number of early tokens, including the first."""


def betas(positions: torch.Tensor, config: ConstrainedSFTConfig) -> torch.Tensor:
    """Strength per token in float64, by its position in the answer, from 0."""
    factors = torch.ones(positions.shape, dtype=torch.float64, device=positions.device)
    factors[positions < config.early_tokens] = config.early_factor
    if config.early_tokens:
        factors[positions == 0] = config.first_factor
    return config.beta * factors


def answer_positions(keep: torch.Tensor) -> torch.Tensor:
    """Number of each target token within its answer, from 0; a row of several turns has several answers.

    `keep`, bool of shape [rows, length], is true where the next token is a target; shape [targets].
    """
    count = keep.cumsum(1)
    before = count.masked_fill(keep, 0).cummax(1).values
    return (count - before - 1)[keep]


def token_weights(log_ratio: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """``2 * (1 - sigmoid(beta * log_ratio))``, in (0, 2): 1 at the start, towards 0 as a token becomes likelier.

    The loss -2/beta * log sigmoid(beta * log_ratio) has the gradient of the cross-entropy times this weight, where the
    log ratio is log p(token) minus what it was at the start.
    """
    return 2 * torch.sigmoid(-beta.to(log_ratio.dtype) * log_ratio)


class ConstrainedSFT(GradientStrategy):
    """Weights each token's cross-entropy by how far its probability has already moved, early tokens most strongly.

    Paper: Qi et al., "Safety Alignment Should Be Made More Than Just a Few Tokens Deep", ICLR 2025, section 4. The
    published code also keeps weights above 0.001, which this does not.
    """

    Config = ConstrainedSFTConfig
    stages = frozenset({"finetune"})
    paper = "arXiv 2406.05946"
    config: ConstrainedSFTConfig

    def setup(self, model: nn.Module, seed: int) -> dict[str, Any]:
        self.start = weights_now(model) if self.config.beta else {}
        return {"tensors": len(self.start)}

    def auxiliary(self, step: StepContext) -> None:
        """Computes the losses of the initial model before the main pass."""
        if self.config.beta:
            keep, tokens = targets(step.batch["labels"])
            with at_start(step, self.start):
                self._start = target_losses(step.logits(step.batch, keep), tokens)

    def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        """The weighted cross-entropy instead of the main loss."""
        if not self.config.beta:
            return loss
        keep, tokens = targets(step.batch["labels"])
        now = target_losses(outputs.logits[keep], tokens)
        weight = token_weights(self._start - now.detach(), betas(answer_positions(keep), self.config))
        step.check(weight.sum())
        step.log(token_weight=step.value(step.mean_over_update(weight.sum(), len(tokens), step.targets)))
        weighted = step.mean_over_update((weight * now).sum(), len(tokens), step.targets)
        return step.scale * weighted.to(loss.dtype)
