"""Unrolled: rows whose gradient points where the safety loss falls, one training step ahead."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast1, NotNegative, Share
from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import Batch, Sequences
from pharmacist.nn.grads import Gradient, norm
from pharmacist.selectors import gradients
from pharmacist.selectors.base import Scores, SelectionContext, Selector, scaled_to_mean_1


LEARNER, FORTH, BACK = "learner", "forth", "back"
"""The adapter, and the two, moved from it along a direction and against it, between which losses are compared."""
_LENGTHS = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Length of the step between them, where truncation and rounding together cost least; 0.1 in coarser formats."""


@dataclass
class UnrolledConfig(AdapterOptions):
    """Options of the selector."""

    steps: AtLeast1 = 60
    """Training steps on the pool, with equal weights, before the derivative is computed."""
    share: Share = 0.25
    """Share of the pool (at least 256 rows) that the model is trained on."""
    lookahead: NotNegative = 0.1
    """Learning rate of the step after which the safety loss is computed; with 0 it is computed without a step."""


class UnrolledSelector(Selector):
    """Prefers rows on which a training step lowers the loss on the safe references.

    The score is <grad l_i(theta), grad U(theta+)>, theta+ = theta - lookahead * grad mean l: minus the derivative of
    U(theta+) by the row's weight, but for the factor lookahead and the mean over rows, which change no rank.
    """

    Config: ClassVar[type[Any]] = UnrolledConfig
    name = "unrolled"
    needs = frozenset({"safe", "model"})
    gives_weights = True
    paper = "one-step unrolling as in DARTS (arXiv 1806.09055), for row weights as in Ren et al. (arXiv 1803.09050)"

    def attack(
        self, bank: AdapterBank, references: Mapping[str, Sequences], seed: int, folder: Path
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Trains adapters that the safety loss is to withstand, on top of what was learned; none here.

        Returns:
            Names of the adapters that are active besides the learner, held constant, where the pool is learned from,
            and where the safety loss is taken.
        """
        return (), ()

    def rank(self, context: SelectionContext) -> Scores:
        """Trains briefly on the pool, finds the safety gradient, then reads the pool under two adapters."""
        # The same streams whatever the attack: with none, all such selectors are one.
        config, seed = self.config, derive(context.seed, "unrolled")
        pool = context.encoded_pool
        references = {name: context.encoded_references(name) for name in sorted(self.needs - {"model"})}
        bank = AdapterBank(context.model.model, config, seed, context.checkpoint_seconds)
        rows = gradients.cotraining_rows(pool.content_keys, config.share, seed)
        folder, report = context.run.work(self.name), dict[str, Any]()
        with gradients.bank_phase(context.run, "train", bank):
            bank.add(LEARNER)
            if config.steps:
                job = gradients.pool_job(bank, LEARNER, pool, rows, config.steps, seed, folder)
                gradients.run_jobs(bank, [job], self.name)
            attack = self.attack(bank, references, seed, folder)
            problem = Hypergradient(bank, pool, rows, references["safe"], config.lookahead, *attack)
            safety_loss, direction = problem.safety()
            if problem.frozen_for_safety:  # what the attack does to the safety loss; nothing where it failed
                report["safety_loss"] = gradients.mean_loss(bank, FORTH, references["safe"])
                report["safety_loss_under_attack"] = safety_loss
            length = problem.move_apart(direction)
        losses = context.read(pool, partial(problem.slopes, length), self.name, forwards=2)
        report["safety_gradient"] = float(norm(direction))
        score = losses["slope"] * report["safety_gradient"]
        return Scores(score, signals={"loss": losses["loss"]}, report=report, weight=one_step_weights(score))


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
        """``loss``, mean of the two, and ``slope``, central difference along the unit direction; shape [rows]."""
        names = ((name, *self.frozen_for_pool) for name in (FORTH, BACK))
        forth, back = (gradients.losses_under(self.bank, active, batch) for active in names)
        return {"slope": (forth - back) / (2 * length), "loss": (forth + back) / 2}


def one_step_weights(score: FloatArray) -> FloatArray:
    """Weights after one step of descent on the upper loss from all weights 0, none negative, with mean 1.

    Rows that would raise the loss get 0 (Ren et al. 2018); all 1 where no row lowers it. The score is minus the
    derivative of the upper loss by each row's weight, but for a factor.
    """
    return scaled_to_mean_1(np.maximum(score, 0.0), np.ones(len(score), dtype=np.bool_))
