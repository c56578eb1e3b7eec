"""Gradients as dictionaries of tensors, in float32 or float64, separate from ``.grad`` until they are added to it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from pharmacist.core.env import world_size
from pharmacist.core.errors import CompatibilityError, DivergedError
from pharmacist.nn.distributed import total
from pharmacist.nn.losses import precise


Gradient = dict[str, torch.Tensor]
"""Parameter name -> gradient, float32 or float64."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a training updates, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def local_gradient(loss: torch.Tensor, parameters: Mapping[str, nn.Parameter]) -> Gradient:
    """The gradient of a scalar loss, 0 for parameters that it does not depend on; leaves ``.grad`` alone."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: precise(torch.zeros_like(p) if g is None else g) for (name, p), g in pairs}


def gradient(loss: torch.Tensor, parameters: Mapping[str, nn.Parameter]) -> Gradient:
    """The mean of `local_gradient` over the processes of a data-parallel run; all of them must call.

    Raises:
        DivergedError: Loss or gradient is NaN or infinite.
    """
    if not torch.isfinite(everywhere := total(loss)):  # so that all processes raise alike, and none waits for another
        found = everywhere.item()
        raise DivergedError(f"the loss of an auxiliary pass is {found}; lower the learning rate or the strength")
    result = averaged(local_gradient(loss, parameters))
    if not torch.isfinite(norm(result)):
        raise DivergedError("the gradient of an auxiliary pass is not finite; lower the learning rate or the strength")
    return result


def averaged(grads: Gradient) -> Gradient:
    """The mean over the processes of a data-parallel run, in one communication."""
    if world_size() == 1 or not grads:
        return grads
    flat = total(torch.cat([value.flatten() for value in grads.values()])) / world_size()
    parts = torch.split(flat, [value.numel() for value in grads.values()])
    return {name: part.view_as(value) for (name, value), part in zip(grads.items(), parts, strict=True)}


def norm(grads: Gradient) -> torch.Tensor:
    """Euclidean norm over all tensors together, a scalar."""
    return get_total_norm([*grads.values()])


def cosine(a: Gradient, b: Gradient, eps: float = 1e-12) -> torch.Tensor:
    """Cosine of the angle between two gradients, a scalar in [-1, 1]; 0 where one of them vanishes."""
    inner = torch.stack([(value * b[name]).sum() for name, value in a.items()]).sum()
    return inner / (norm(a) * norm(b)).clamp(min=eps)


@torch.no_grad()
def add_to_grad(parameters: Mapping[str, nn.Parameter], grads: Gradient, scale: float) -> None:
    """``parameter.grad += scale * gradient``."""
    for name, value in grads.items():
        parameter = parameters[name]
        update = (value * scale).to(parameter.dtype)
        parameter.grad = update if parameter.grad is None else parameter.grad.add_(update)


@contextmanager
def preserved(parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Restores weights and ``.grad`` after the block, bit for bit, also after an exception."""
    saved = {name: (parameter.detach().clone(), parameter.grad) for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.grad = None
        yield
    finally:
        with torch.no_grad():
            for name, (value, grad) in saved.items():
                parameters[name].copy_(value)
                parameters[name].grad = grad


@contextmanager
def replaced(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Sets weights to other values for the block; they are restored bit for bit."""
    with preserved(parameters):
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
        yield


@contextmanager
def shifted(parameters: Mapping[str, nn.Parameter], direction: Gradient, by: float) -> Iterator[None]:
    """Moves the weights by ``by * direction`` for the block; they are restored bit for bit.

    Raises:
        CompatibilityError: Most of the step is lost as the weights are rounded to their number format.
    """
    with preserved({name: parameters[name] for name in direction}):
        asked, lost = list[torch.Tensor](), list[torch.Tensor]()
        with torch.no_grad():
            for name, value in direction.items():
                step = by * value
                there = precise(parameters[name]) + step
                parameters[name].copy_(there)
                asked.append(step.square().sum())
                lost.append(((there - precise(parameters[name])) * step).sum())
        if lost and sum(lost) > sum(asked) / 2:
            raise CompatibilityError(
                "a step of the method is lost as the weights are rounded to their number format; load the model with "
                "dtype=torch.float32, or train a LoRA adapter"
            )
        yield
