"""LDIFS: stay close to the aligned model in feature space."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pharmacist.core.typed import Checked, NotNegative
from pharmacist.defenses.finetuning.start import at_start, weights_now
from pharmacist.nn.hooks import capture
from pharmacist.nn.locate import mlp_modules
from pharmacist.nn.losses import precise
from pharmacist.training.strategy import GradientStrategy, StepContext


_GATE = 0.1
"""Value at and above which the published code drops a layer's term."""


@dataclass
class LDIFSConfig(Checked):
    """Options of LDIFS."""

    lam: NotNegative = 1.0
    """Weight of the distance; 0 is sft."""
    compat: Literal["none", "reference"] = "none"
    """reference: sums instead of means, with padding, and the term of a layer vanishes once it reaches 0.1."""


def feature_distance(
    now: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """Sum over layers of the mean squared difference of their features, a scalar.

    Features have the shape [rows, length, width], or [rows * length, width] as in OPT; positions where the mask,
    [rows, length], is 0 do not count.
    """
    kept = mask.bool().flatten()
    parts = []
    for name, features in now.items():
        difference = precise(features.flatten(0, -2)[kept]) - precise(start[name].flatten(0, -2)[kept])
        parts.append(difference.square().sum() / max(difference.numel(), 1))
    return torch.stack(parts).sum()


def gated_distance(now: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor], rho: float) -> torch.Tensor:
    """The penalty as published: per layer ``rho / 2 * |difference|^2`` with padding, dropped where it reaches 0.1.

    So it vanishes exactly where the drift becomes large.
    """
    parts = []
    for name, features in now.items():
        term = rho / 2 * (features.float() - start[name].float()).square().sum()
        parts.append(term if term < _GATE else term * 0)
    return torch.stack(parts).sum()


class LDIFS(GradientStrategy):
    """Adds lam times the distance between the features of the model and those of the initial model.

    Features are the outputs of the feed-forward module of each decoder layer, on the user's rows.

    Paper: Mukhoti et al., "Fine-tuning can cripple your foundation model; preserving features may be the solution",
    2023; as a defense in Huang et al., "Antidote", 2024.
    """

    Config = LDIFSConfig
    stages = frozenset({"finetune"})
    paper = "arXiv 2308.13320"
    reads_outputs = False
    config: LDIFSConfig

    def setup(self, model: nn.Module, seed: int) -> dict[str, Any]:
        self.modules = mlp_modules(model)
        self.start = weights_now(model) if self.config.lam else {}
        return {"mlp_modules": list(self.modules)}

    @contextmanager
    def around(self, step: StepContext) -> Iterator[None]:
        """Collects the features of the initial model, then those of the main pass."""
        if not self.config.lam:
            yield
            return
        nowhere = torch.zeros_like(step.batch["attention_mask"], dtype=torch.bool)
        with at_start(step, self.start), capture(self.modules) as start:
            step.logits(step.batch, nowhere)
        with capture(self.modules) as now:
            self._features = now, start
            yield
        self._features = {}, {}

    def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        if not self.config.lam:
            return loss
        now, start = self._features
        if self.config.compat == "reference":
            penalty = gated_distance(now, start, self.config.lam)
        else:
            mask = step.batch["attention_mask"]
            count = int(mask.sum())
            distance = step.mean_over_update(feature_distance(now, start, mask) * count, count, step.tokens)
            penalty = self.config.lam * distance
        step.log(ldifs=step.value(penalty))
        return loss + step.scale * penalty.to(loss.dtype)
