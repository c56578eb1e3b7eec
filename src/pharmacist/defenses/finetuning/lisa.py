"""Lisa: alternate between the defender's safe rows and the user's, with little drift within a phase."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pharmacist.core.typed import AtLeast0, AtLeast1, Checked, NotNegative
from pharmacist.defenses.finetuning.start import squared_distance, weights_now
from pharmacist.nn.grads import Gradient, trainable
from pharmacist.training.strategy import Batch, GradientStrategy, StepContext, StrategyState


@dataclass
class LisaConfig(Checked):
    """Options of Lisa."""

    rho: NotNegative = 1.0
    """Weight of the penalty on the distance from the weights of the latest switch."""
    align_steps: AtLeast0 = 100
    """Steps of an alignment phase (K1), with which training begins; 0 means none."""
    finetune_steps: AtLeast1 = 900
    """Steps of a phase on the user's rows (K2)."""
    warmup_steps: AtLeast0 = 0
    """Number of first steps without the penalty; in the published code, a tenth of the training."""


def in_alignment(update: int, align_steps: int, finetune_steps: int) -> bool:
    """Whether an optimizer step, counted from 0, belongs to an alignment phase."""
    return update % (align_steps + finetune_steps) < align_steps


def is_switch(update: int, align_steps: int, finetune_steps: int) -> bool:
    """Whether an optimizer step is the first of a phase; with one kind of phase only step 0 is."""
    return update == 0 or (align_steps > 0 and update % (align_steps + finetune_steps) in (0, align_steps))


class Lisa(GradientStrategy):
    """Alternates phases on safe rows and on the user's rows, with a penalty rho / 2 * |w - c|^2; c: first weights of a
    phase.

    Phases consist of whole optimizer steps, however many micro-batches they have. The user's rows of the steps of an
    alignment phase are skipped; every epoch has another order, so they are other rows each time.

    Paper: Huang et al., "Lisa: Lazy Safety Alignment for Large Language Models against Harmful Fine-tuning Attack",
    NeurIPS 2024, algorithm 1.
    """

    Config = LisaConfig
    stages = frozenset({"finetune"})
    streams = ("safe",)
    paper = "arXiv 2405.18641"
    reads_outputs = False
    config: LisaConfig

    def setup(self, model: nn.Module, seed: int) -> dict[str, Any]:
        self.model = model
        self.anchor: Gradient = weights_now(model)
        return {"tensors": len(self.anchor)}

    def draw(self, update: int, window: int, streams: Mapping[str, Any]) -> list[Batch] | None:
        if not in_alignment(update, self.config.align_steps, self.config.finetune_steps):
            return None
        return [next(streams["safe"]) for _ in range(window)]

    def begin_update(self, update: int) -> None:
        if is_switch(update, self.config.align_steps, self.config.finetune_steps):
            self.anchor = weights_now(self.model)

    def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        if not self.config.rho or step.update < self.config.warmup_steps:
            return loss
        pull = self.config.rho / 2 * squared_distance(step.parameters, self.anchor)
        step.log(lisa_pull=pull.detach())
        return loss + step.scale * pull.to(loss.dtype)

    def state(self) -> StrategyState:
        return StrategyState(dict(self.anchor))

    def load_state(self, state: StrategyState) -> None:
        parameters = trainable(self.model)
        self.anchor = {name: value.to(parameters[name].device) for name, value in state.tensors.items()}

    def close(self) -> None:
        del self.model
