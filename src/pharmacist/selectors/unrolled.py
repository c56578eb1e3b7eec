"""One-step hypergradient: how much a little more weight on a row would lower the safety loss after a training step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast1, NotNegative, Share
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import Batch, Sequences
from pharmacist.nn.grads import Gradient, norm
from pharmacist.selectors.base import FloatArray, IntArray, Scores, SelectionContext, Selector, scaled_to_mean_1
from pharmacist.selectors.gradients import (
    Job,
    bank_phase,
    cotraining_rows,
    loss_and_gradient,
    losses_under,
    mean_loss,
    moved,
    pool_job,
    run_jobs,
)
from pharmacist.selectors.reading import read


LEARNER, FORTH, BACK = "learner", "forth", "back"
"""The adapter, and the two, moved from it along a direction and against it, between which losses are compared."""
_LENGTHS = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Length of the step between them, where truncation and rounding together cost least; 0.1 in coarser formats."""


@dataclass
class UnrolledConfig(AdapterOptions):
    """Options of the selector."""

    steps: AtLeast1 = 60
    """Training steps on the pool, all rows alike, before the derivative is taken."""
    share: Share = 0.25
    """Share of the pool (at least 256 rows) that the model is trained on."""
    lookahead: NotNegative = 0.1
    """Learning rate of the step after which the safety loss is taken; 0 takes it where the model stands."""


@dataclass(frozen=True)
class Hypergradient:
    """Where the derivative of the safety loss, that of the safe references, by the pool rows' weights is taken.

    Attributes:
        bank: Holds the adapter `LEARNER`, theta, and the frozen ones.
        pool: The pool in tokens.
        rows: Of the pool; their mean gradient, at the learning rate `lookahead`, is the step.
        safe: The safe references in tokens.
        lookahead: Learning rate of the step; with 0 there is none.
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
        """The safety loss after the step on the pool, and its gradient by theta; `FORTH` is then theta after it."""
        theta = self.bank.state(LEARNER)
        if self.lookahead > 0:
            _, step = loss_and_gradient(
                self.bank, LEARNER, self.pool, self.rows, "step on the pool", self.frozen_for_pool
            )
            theta = moved(theta, step, -self.lookahead)
        self.bank.add(FORTH, theta)
        every = np.arange(len(self.safe.lengths))
        return loss_and_gradient(self.bank, FORTH, self.safe, every, "safety loss", self.frozen_for_safety)

    def move_apart(self, direction: Gradient) -> float:
        """Moves `FORTH` from theta along a direction and `BACK` against it; returns how far."""
        size = float(norm(direction))
        dtype = next(self.bank.model.get_base_model().parameters()).dtype
        length = _LENGTHS.get(dtype, 0.1)
        for name, sign in ((FORTH, 1), (BACK, -1)):
            self.bank.add(name, moved(self.bank.state(LEARNER), direction, sign * length / max(size, 1e-12)))
        return length

    def slopes(self, length: float, batch: Batch) -> dict[str, FloatArray]:
        """Central differences of a batch's completion losses between the two.

        Returns:
            ``slope``, the derivative along the unit direction, and ``loss``, the mean of the two; shape [rows].
        """
        forth, back = (losses_under(self.bank, (name, *self.frozen_for_pool), batch) for name in (FORTH, BACK))
        return {"slope": (forth - back) / (2 * length), "loss": (forth + back) / 2}


def one_step_weights(score: FloatArray) -> FloatArray:
    """Weights after one step of descent on the upper loss from all weights 0, none negative, with mean 1.

    Rows that would raise the loss get 0 (Ren et al. 2018); all 1 where no row lowers it. The score is minus the
    derivative of the upper loss by each row's weight, but for a factor.
    """
    return scaled_to_mean_1(np.maximum(score, 0.0), np.ones(len(score), dtype=np.bool_))


class Attack(NamedTuple):
    """What is done to a model whose safety loss a ranking keeps low: adapters trained on what theta has learned.

    Attributes:
        jobs: Their training.
        frozen_for_pool: As in `Hypergradient`.
        frozen_for_safety: Likewise.
    """

    jobs: Sequence[Job] = ()
    frozen_for_pool: tuple[str, ...] = ()
    frozen_for_safety: tuple[str, ...] = ()


class UnrolledSelector(Selector):
    """Prefers rows whose gradient points where the safety loss falls, one training step ahead.

    The score is <grad l_i(theta), grad U(theta+)>, theta+ = theta - lookahead * grad mean l: minus the derivative of
    U(theta+) by the row's weight, but for the factor lookahead and the mean over rows, which change no rank.
    """

    Config: ClassVar[type[Any]] = UnrolledConfig
    name = "unrolled"
    needs = frozenset({"safe", "model"})
    weighs = True
    paper = "one-step unrolling as in DARTS (arXiv 1806.09055), for row weights as in Ren et al. (arXiv 1803.09050)"

    def attack(self, context: SelectionContext, bank: AdapterBank, seed: int, folder: Path) -> Attack:
        """What the safety loss is to withstand: nothing here."""
        return Attack()

    def rank(self, context: SelectionContext) -> Scores:
        """Trains briefly on the pool, finds the safety gradient, then reads the pool under two adapters."""
        # The same streams whatever the attack: with none, all such selectors are one.
        config, seed = self.config, derive(context.seed, "unrolled")
        pool, safe = context.encoded_pool, context.encoded_references("safe")
        bank = AdapterBank(context.model.model, config, seed, context.checkpoint_seconds)
        rows = cotraining_rows(pool.content_keys, config.share, seed)
        folder = context.run.work(self.name)
        attack = self.attack(context, bank, seed, folder)
        learning = [pool_job(bank, LEARNER, pool, rows, config.steps, seed, folder)] if config.steps else []
        with bank_phase(context.run, "train", bank):
            for name in (LEARNER, *attack.frozen_for_safety):
                bank.add(name)
            for jobs in (learning, attack.jobs):  # one after the other: the attack is on what was learned
                run_jobs(bank, jobs, self.name)
            problem = Hypergradient(
                bank, pool, rows, safe, config.lookahead, attack.frozen_for_pool, attack.frozen_for_safety
            )
            safety_loss, gradient = problem.safety()
            report: dict[str, Any] = {}
            if attack.frozen_for_safety:  # what the attack does to the safety loss; nothing where it failed
                report["safety_loss"] = mean_loss(bank, FORTH, safe)
                report["safety_loss_under_attack"] = safety_loss
            length = problem.move_apart(gradient)
        losses = read(context, pool, partial(problem.slopes, length), self.name, forwards=2)
        report["safety_gradient"] = float(norm(gradient))
        score = losses["slope"] * report["safety_gradient"]
        return Scores(score, signals={"loss": losses["loss"]}, report=report, weight=one_step_weights(score))
