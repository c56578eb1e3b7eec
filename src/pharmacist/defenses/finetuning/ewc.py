"""Elastic weight consolidation: keep the weights that matter for the defender's safe rows."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pharmacist.core.env import world_size
from pharmacist.core.typed import AtLeast1, Checked, NotNegative
from pharmacist.defenses.finetuning.start import squared_distance, weights_now
from pharmacist.nn.grads import Gradient, averaged, local_gradient, norm
from pharmacist.nn.hooks import evaluating
from pharmacist.training.strategy import GradientStrategy, StepContext, StrategyState


@dataclass
class EWCConfig(Checked):
    """Options of elastic weight consolidation."""

    lam: NotNegative = 1000.0
    """Weight of the penalty; 0 is sft. A suitable value depends on the scale of the Fisher information, so on per and
    normalize."""
    rows: AtLeast1 = 256
    """Number of safe rows on which the Fisher information is estimated."""
    per: Literal["row", "batch"] = "row"
    """Which gradients are squared: of each row (the empirical Fisher) or of the mean over a batch, as published."""
    normalize: Literal["mean", "sum"] = "mean"
    """Average the squared gradients, or sum them as published."""


def fisher(gradients: Iterable[Gradient], normalize: str = "mean") -> Gradient:
    """Diagonal of the empirical Fisher information: the mean (or sum) of squared gradients, never negative."""
    summed: Gradient = {}
    count = 0
    for found in gradients:
        count += 1
        for name, value in found.items():
            summed[name] = summed.get(name, 0) + value.square()
    return {name: value / count for name, value in summed.items()} if normalize == "mean" else summed


class EWC(GradientStrategy):
    """Adds lam * sum_i F_i (w_i - w0_i)^2, where w0 are the initial weights and F their Fisher information on safe
    rows.

    It acts on each trained tensor, so on the two factors of an adapter and not on their product. Of a fresh adapter,
    whose second factor is 0, the first gets no Fisher information and is free: continue the aligned one
    (``--adapter continue``) as the paper does.

    Paper: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017; as a defense in
    Huang et al., "Vaccine", 2024.
    """

    Config = EWCConfig
    stages = frozenset({"finetune"})
    streams = ("safe",)
    paper = "arXiv 1612.00796"
    reads_outputs = False
    config: EWCConfig

    def setup(self, model: nn.Module, seed: int) -> dict[str, Any]:
        self.start = weights_now(model) if self.config.lam else {}
        self.fisher: Gradient = {}
        return {"tensors": len(self.start)}

    def auxiliary(self, step: StepContext) -> None:
        """Estimates the Fisher information before the first step, without dropout and without touching ``.grad``."""
        if not self.config.lam or self.fisher:
            return
        with evaluating(step.model):
            found = averaged(fisher(self._gradients(step), self.config.normalize))
        if self.config.per == "row" and self.config.normalize == "sum":  # each process has summed its own rows alone
            found = {name: value * world_size() for name, value in found.items()}
        step.check(norm(found))
        self.fisher = found

    def _gradients(self, step: StepContext) -> Iterator[Gradient]:
        """Those of batches, or of rows, which are of this process alone: squares are averaged, not gradients."""
        seen = 0
        while seen < self.config.rows:
            batch = step.next("safe")
            seen += len(batch["input_ids"]) * world_size()
            if self.config.per == "batch":
                yield step.grads(step.ce(batch))
                continue
            for row in range(len(batch["input_ids"])):
                summed, count = step.summed_ce({name: tensor[row : row + 1] for name, tensor in batch.items()})
                yield local_gradient(summed / max(count, 1), step.parameters)

    def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        if not self.config.lam:
            return loss
        penalty = self.config.lam * squared_distance(step.parameters, self.start, self.fisher)
        step.log(ewc=penalty.detach())
        return loss + step.scale * penalty.to(loss.dtype)

    def state(self) -> StrategyState:
        """The Fisher information; the initial weights are in no checkpoint, see `GradientStrategy`."""
        return StrategyState(dict(self.fisher))

    def load_state(self, state: StrategyState) -> None:
        self.fisher = {name: value.to(self.start[name].device) for name, value in state.tensors.items()}
