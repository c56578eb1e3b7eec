"""One-step hypergradient: how much a little more weight on a row would lower the safety loss after a training step."""

from dataclasses import dataclass

import numpy as np
import torch

from pharmacist.nn.adapters import AdapterBank
from pharmacist.nn.batching import Batch, Sequences
from pharmacist.nn.grads import Gradient, norm
from pharmacist.selectors import gradients
from pharmacist.selectors.base import FloatArray, IntArray, scaled_to_mean_1


LEARNER, FORTH, BACK = "learner", "forth", "back"
"""The adapter, and the two, moved from it along a direction and against it, between which losses are compared."""
_LENGTHS = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Length of the step between them, where truncation and rounding together cost least; 0.1 in coarser formats."""


@dataclass(frozen=True)
class Hypergradient:
    """Where the derivative of the safety loss, that of the safe references, by the pool rows' weights is taken.

    Attributes:
        bank: Holds the adapter `LEARNER`, theta, and the frozen ones.
        rows: Of the pool; their mean gradient, at the learning rate `lookahead`, is the step.
        frozen_for_pool: Adapters that are active besides theta, held constant, where the pool is learned from.
        frozen_for_safety: Likewise where the safety loss is taken.
    """

    bank: AdapterBank
    pool: Sequences
    rows: IntArray
    safe: Sequences
    lookahead: float
    frozen_for_pool: tuple[str, ...] = ()
    frozen_for_safety: tuple[str, ...] = ()

    def safety(self) -> tuple[float, Gradient]:
        """The safety loss after the step on the pool, and its gradient by theta; `FORTH` is theta after the step."""
        theta = self.bank.state(LEARNER)
        if self.lookahead > 0:
            _, step = gradients.loss_and_gradient(
                self.bank, LEARNER, self.pool, self.rows, "step on the pool", self.frozen_for_pool
            )
            theta = gradients.moved(theta, step, -self.lookahead)
        self.bank.add(FORTH, theta)
        every = np.arange(len(self.safe.lengths))
        return gradients.loss_and_gradient(self.bank, FORTH, self.safe, every, "safety loss", self.frozen_for_safety)

    def move_apart(self, direction: Gradient) -> float:
        """Moves `FORTH` from theta along a direction and `BACK` against it; returns how far."""
        size = float(norm(direction))
        dtype = next(self.bank.model.get_base_model().parameters()).dtype
        length = _LENGTHS.get(dtype, 0.1)
        for name, sign in ((FORTH, 1), (BACK, -1)):
            state = gradients.moved(self.bank.state(LEARNER), direction, sign * length / max(size, 1e-12))
            self.bank.add(name, state)
        return length

    def slopes(self, length: float, batch: Batch) -> dict[str, FloatArray]:
        """Central differences of a batch's completion losses between the two.

        Returns:
            ``slope``, the derivative along the unit direction, and ``loss``, the mean of the two; shape [rows].
        """
        names = ((name, *self.frozen_for_pool) for name in (FORTH, BACK))
        forth, back = (gradients.losses_under(self.bank, active, batch) for active in names)
        return {"slope": (forth - back) / (2 * length), "loss": (forth + back) / 2}


def one_step_weights(score: FloatArray) -> FloatArray:
    """Weights after one step of descent on the upper loss from all weights 0, none negative, with mean 1.

    Rows that would raise the loss get 0 (Ren et al. 2018); all 1 where no row lowers it. The score is minus the
    derivative of the upper loss by each row's weight, but for a factor.
    """
    return scaled_to_mean_1(np.maximum(score, 0.0), np.ones(len(score), dtype=np.bool_))
