"""Gradients of single rows with respect to an adapter's weights, from one backward pass, and products with them.

Where x_t is the input of a linear layer, and d_t the derivative of the summed row losses with respect to its output,
the gradient of a row with respect to the weight is sum_t d_t x_t^T. LoRA's two factors are such layers, and d includes
scale and dropout.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pharmacist.core.errors import CompatibilityError
from pharmacist.nn.hooks import hooked


@dataclass(frozen=True)
class Tape:
    """Records of some linear layers from a backward pass of the SUM of row losses.

    Attributes:
        inputs: Name of the weight -> input of its layer, shape [rows, length, in].
        outputs: Name of the weight -> derivative with respect to the layer's output, shape [rows, length, out].
    """

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def inner(self, direction: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Inner product of each row's gradient with a direction, sum_t d_t . (G x_t), in float64; shape [rows]."""
        parts = [
            (self.outputs[name] * (x @ direction[name].to(x).T)).sum((1, 2)).double()
            for name, x in self.inputs.items()
        ]
        return torch.stack(parts).sum(0)

    def square_norms(self) -> torch.Tensor:
        """Squared norm of each row's gradient in float64, shape [rows]; by whichever of two ways is cheaper."""
        parts = []
        for name, x in self.inputs.items():
            d = self.outputs[name]
            length, width, size = x.shape[1], x.shape[2] + d.shape[2], x.shape[2] * d.shape[2]
            gram = length * width < size
            part = (d @ d.mT * (x @ x.mT)).sum((1, 2)) if gram else (d.mT @ x).square().sum((1, 2))
            parts.append(part.double())
        return torch.stack(parts).sum(0).clamp(min=0)

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight's name and row gradients, shape [rows, out, in]; one weight at a time."""
        for name, x in self.inputs.items():
            yield name, self.outputs[name].mT @ x


def tape_rows(layers: Mapping[str, nn.Module], losses: Callable[[], torch.Tensor]) -> Tape:
    """Runs forward and backward once and records linear layers, without forming gradients of weights.

    `layers` maps the name of a weight that requires a gradient to its layer; `losses` runs the model and returns one
    loss per row, shape [rows].

    Raises:
        CompatibilityError: The input of a layer has no axis of rows, or it runs more than once.
    """
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def record(name: str, module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        if output.dim() != 3 or name in outputs:
            raise CompatibilityError(f"{name}: is used in a way in which rows cannot be separated")
        inputs[name], outputs[name] = args[0].detach(), output

    with hooked(layers, record):
        total = losses().sum()
    found = torch.autograd.grad(total, list(outputs.values()))
    return Tape(inputs, dict(zip(outputs, found, strict=True)))
