"""Vaccine: train under perturbed hidden embeddings, so that aligned answers survive their drift."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pharmacist.core.env import world_size
from pharmacist.core.typed import Checked, NotNegative
from pharmacist.nn.distributed import total
from pharmacist.nn.hooks import Activations, activation_gradients, add_offsets
from pharmacist.nn.locate import attention_modules
from pharmacist.training.strategy import GradientStrategy, StepContext


EPS = 1e-7
"""Added to norms that are divided by."""


@dataclass
class VaccineConfig(Checked):
    """Options of Vaccine."""

    rho: NotNegative = 2.0
    """Norm of the perturbation of a micro-batch, over all its layers, rows, tokens and channels; 0 is sft."""


def vector_norm(value: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Euclidean norm in float32 at least, without a copy in that format."""
    kind = torch.promote_types(value.dtype, torch.float32)
    norm: torch.Tensor = torch.linalg.vector_norm(value, dim=dim, dtype=kind)
    return norm


def joint_norm(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Euclidean norm over all tensors of all processes together, a scalar, in float32 at least."""
    return total(torch.stack([vector_norm(value) for value in tensors.values()]).square().sum()).sqrt()


def perturbation(gradients: Activations, rho: float, norm: torch.Tensor) -> Activations:
    """The offsets that raise a loss most, to first order: ``rho * g / (norm + 1e-7)``, each in its gradient's dtype.

    Rho is the joint norm of the offsets, `norm` that of the derivatives of the loss by them, a scalar.
    """
    factor = rho / (norm + EPS)
    return {name: (g.to(factor.dtype) * factor).to(g.dtype) for name, g in gradients.items()}


@contextmanager
def perturbed(step: StepContext, modules: Mapping[str, nn.Module], rho: float) -> Iterator[None]:
    """Perturbs the outputs of `modules` for the block in the direction that raises the loss of the step's batch most.

    The norm `rho` is that of a micro-batch's perturbation: the more of them an update has, the further each row may be
    moved. One extra pass gives the derivatives; the main pass in the block draws the same dropout masks.
    """
    with step.replay():
        loss, gradients = activation_gradients(modules, step.main_ce)
    # Each process differentiates its part of the mean, which is as many times too large as there are processes.
    norm = joint_norm(gradients) / world_size()
    step.check(loss, norm)
    offsets = perturbation(gradients, rho / world_size(), norm)
    del gradients
    step.log(clean_loss=step.value(loss), activation_gradient_norm=norm)
    with add_offsets(modules, offsets):
        yield
    step.log(perturbation_norm=joint_norm(offsets))


class Perturbing(GradientStrategy):
    """Base of strategies whose main pass is perturbed: they log its loss."""

    reads_outputs = False

    def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        step.log(perturbed_loss=step.value(loss) / step.scale)
        return loss


class Vaccine(Perturbing):
    """Minimises the loss under the worst perturbation of all self-attention outputs with a given joint norm.

    Paper: Huang et al., "Vaccine: Perturbation-aware Alignment for Large Language Models against Harmful Fine-tuning
    Attack", NeurIPS 2024, algorithm 1.
    """

    Config = VaccineConfig
    paper = "arXiv 2402.01109"
    config: VaccineConfig

    def setup(self, model: nn.Module, seed: int) -> dict[str, Any]:
        self.modules = attention_modules(model)
        return {"attention_modules": list(self.modules)}

    def around(self, step: StepContext) -> AbstractContextManager[None]:
        return perturbed(step, self.modules, self.config.rho)
