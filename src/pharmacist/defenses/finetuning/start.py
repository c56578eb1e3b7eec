"""The initial model of the fine-tuning, to which most of these defenses stay close."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from pharmacist.nn.grads import Gradient, replaced, trainable
from pharmacist.nn.hooks import evaluating
from pharmacist.nn.losses import precise
from pharmacist.training.strategy import StepContext


def weights_now(model: nn.Module) -> Gradient:
    """A copy of the trainable weights."""
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


@contextmanager
def at_start(step: StepContext, start: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Makes the model the initial one for the block: weights from `weights_now`, no dropout, no graph.

    Weights are changed in place, so the block must not include a pass whose graph is needed.
    """
    with replaced(step.parameters, start), evaluating(step.model), torch.no_grad():
        yield


def squared_distance(
    parameters: Mapping[str, torch.Tensor],
    anchor: Mapping[str, torch.Tensor],
    weight: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """``sum_i w_i (p_i - a_i)^2`` over all entries of all tensors, a scalar in float32 or float64.

    A sum of squares, never the square of a norm, whose gradient is not defined where nothing has moved. Weights are 1
    by default.
    """
    parts = []
    for name, parameter in parameters.items():
        squares = (precise(parameter) - precise(anchor[name])) ** 2
        parts.append((squares if weight is None else precise(weight[name]) * squares).sum())
    return torch.stack(parts).sum()
