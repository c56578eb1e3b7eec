"""Booster: attenuate the decrease of the harmful loss by a step on harmful data."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from pharmacist.core.typed import Checked, NotNegative
from pharmacist.defenses.alignment.vaccine import EPS, perturbed
from pharmacist.nn.grads import Gradient, averaged, cosine, norm, shifted
from pharmacist.nn.locate import attention_modules
from pharmacist.training.strategy import GradientStrategy, StepContext


@dataclass
class BoosterConfig(Checked):
    """Options of Booster."""

    lam: NotNegative = 5.0
    """Weight of the attenuation of the harmful loss; 0 is sft."""
    alpha: NotNegative = 0.1
    """Length of the simulated harmful step, over all trained weights together."""
    rho: NotNegative = 0.0
    """Above 0, the alignment pass is perturbed as in vaccine with this rho (the paper's perturbation-aware
    variant)."""


def attenuation(here: Gradient, there: Gradient, lam: float) -> Gradient:
    """``lam * (here - there)``: gradient of the decrease of the harmful loss by a step, which is held constant."""
    return {name: lam * (g - there[name]) for name, g in here.items()}


class Booster(GradientStrategy):
    """Adds lam * (h(w) - h(w - alpha * g / |g|)), where h is the harmful loss and g its gradient, held constant.

    Paper: Huang et al., "Booster: Tackling Harmful Fine-tuning for Large Language Models via Attenuating Harmful
    Perturbation", ICLR 2025, algorithm 1.
    """

    Config = BoosterConfig
    streams = ("harmful",)
    paper = "arXiv 2409.01586"
    config: BoosterConfig

    _harmful: tuple[Gradient, Gradient] | None = None
    """Harmful gradient and attenuation of an update's first micro-batch, until its alignment gradient is known."""

    def setup(self, model: nn.Module, seed: int) -> dict[str, Any]:
        self.modules = attention_modules(model) if self.config.rho else {}
        return {"attention_modules": list(self.modules)} if self.config.rho else {}

    def auxiliary(self, step: StepContext) -> Gradient:
        """Gradients on one harmful batch before and after a step of length alpha on it."""
        batch, parameters = step.next("harmful"), step.parameters
        with step.replay():
            before = step.ce(batch)
            here = step.grads(before)
        length = norm(here)
        with shifted(parameters, here, -self.config.alpha / float(length + EPS)), step.replay():
            after = step.ce(batch)
            there = step.grads(after)
        extra = attenuation(here, there, self.config.lam)
        step.log(
            harmful_loss=step.value(before),
            harmful_loss_after_step=step.value(after),
            harmful_gradient_norm=length,
            attenuation_norm=norm(extra),
        )
        self._harmful = (here, extra) if step.micro == 0 else None
        return extra

    def around(self, step: StepContext) -> AbstractContextManager[None]:
        return perturbed(step, self.modules, self.config.rho) if self.config.rho else nullcontext()

    def after_backward(self, step: StepContext) -> None:
        """Logs the cosine of the alignment gradient and the harmful one, for the first micro-batch of an update."""
        if self._harmful is None:
            return
        (here, extra), self._harmful = self._harmful, None
        grads = {name: parameter.grad for name, parameter in step.parameters.items() if parameter.grad is not None}
        alignment = {name: grad.to(here[name].dtype) - step.scale * extra[name] for name, grad in grads.items()}
        if step.scale < 1:  # before an update's last micro-batch each process holds its own part
            alignment = averaged(alignment)
        step.log(safe_harmful_cosine=cosine(alignment, here, eps=EPS**2))
