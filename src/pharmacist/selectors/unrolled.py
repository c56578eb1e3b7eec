"""One-step hypergradient: how much a little more weight on a row would lower the safety loss after a training step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast1, NotNegative, Share
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import Batch, IntArray, Sequences
from pharmacist.nn.grads import Gradient, norm
from pharmacist.selectors.base import RANKED, Scores, SelectionContext, Selector
from pharmacist.selectors.gradients import mean_gradient, mean_loss, moved, pool_job
from pharmacist.selectors.jobs import Job, run_jobs
from pharmacist.selectors.pharmacist.twins import cotraining_rows
from pharmacist.selectors.reading import read


FloatArray = npt.NDArray[np.float64]

LEARNER, FORTH, BACK = "learner", "forth", "back"
"""The adapter, and the two on either side of it between which losses are compared."""
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
    """Where the derivative of the safety loss by the rows' weights is taken.

    Attributes:
        bank: Holds the adapter `LEARNER`, theta, and those beside it.
        pool: The pool.
        rows: Of the pool; their mean gradient is the step.
        safe: Safe references, whose mean loss is the safety loss.
        lookahead: Learning rate of the step.
        below: Adapters beside theta, held constant, where the pool is learned from.
        above: Likewise where the safety loss is taken.
    """

    bank: AdapterBank
    pool: Sequences
    rows: IntArray
    safe: Sequences
    lookahead: float
    below: tuple[str, ...] = ()
    above: tuple[str, ...] = ()

    def direction(self) -> Gradient:
        """The gradient of the safety loss by theta, after the step on the pool."""
        at = self.bank.state(LEARNER)
        if self.lookahead > 0:
            step = mean_gradient(self.bank, LEARNER, self.pool, self.rows, "step on the pool", self.below)
            at = moved(at, step, -self.lookahead)
        self.bank.add(FORTH, at)
        return mean_gradient(self.bank, FORTH, self.safe, np.arange(len(self.safe.lengths)), "safety loss", self.above)

    def place_sides(self, direction: Gradient) -> float:
        """Puts `FORTH` and `BACK` on either side of theta along a direction; returns how far from it they are."""
        size = float(norm(direction))
        dtype = next(self.bank.model.get_base_model().parameters()).dtype
        length = _LENGTHS.get(dtype, 0.1)
        for name, sign in ((FORTH, 1), (BACK, -1)):
            self.bank.add(name, moved(self.bank.state(LEARNER), direction, sign * length / max(size, 1e-12)))
        return length

    def slopes(self, length: float, batch: Batch) -> dict[str, FloatArray]:
        """Central differences of a batch's completion losses between the two sides.

        Returns:
            ``slope``, the derivative along the unit direction, and ``loss``, the mean of the two; shape [rows].
        """
        forth, back = (
            self.bank.row_losses((name, *self.below), batch).completion.double().cpu().numpy()
            for name in (FORTH, BACK)
        )
        return {"slope": (forth - back) / (2 * length), "loss": (forth + back) / 2}


def one_step_weights(score: FloatArray) -> FloatArray:
    """Weights after one step of descent on the upper loss from all weights 0, none negative, with mean 1.

    Rows that would raise the loss get 0 (Ren et al. 2018); all 1 where no row lowers it.

    Args:
        score: Minus the derivative of the upper loss by each row's weight, but for a factor, shape [rows].
    """
    positive = np.maximum(score, 0.0)
    mean = positive.mean()
    found: FloatArray = positive / mean if mean > 0 else np.ones_like(score)
    return found


@dataclass(frozen=True)
class Attack:
    """Adapters beside theta, held constant.

    Attributes:
        jobs: Their trainings, for which theta stands.
        below: Those that are active where the pool is learned from.
        above: All of them; they are active where the safety loss is taken.
    """

    jobs: tuple[Job, ...] = ()
    below: tuple[str, ...] = ()
    above: tuple[str, ...] = ()


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
    work = "unrolled"

    def attack(self, context: SelectionContext, bank: AdapterBank, seed: int, folder: Path) -> Attack:
        """What the safety loss is to withstand: nothing here."""
        return Attack()

    def rank(self, context: SelectionContext) -> Scores:
        """Trains briefly on the pool, finds the safety gradient, then reads the pool twice (once on either side)."""
        # The same streams whatever the attack: with none, all such selectors are one.
        config, seed = self.config, derive(context.seed, "unrolled")
        pool, safe = context.encoded_pool, context.encoded_references("safe")
        bank = AdapterBank(context.model.model, config, seed, context.checkpoint_seconds)
        rows = cotraining_rows(pool.content_keys, config.share, seed)
        folder = context.run.work(self.work)
        attack = self.attack(context, bank, seed, folder)
        learning = (pool_job(bank, LEARNER, pool, rows, config.steps, seed, folder),) if config.steps else ()
        report: dict[str, Any] = {}
        with context.run.phase("train") as phase:
            for name in (LEARNER, *attack.above):
                bank.add(name)
            for jobs in (learning, attack.jobs):  # one after the other: the attack is on what was learned
                run_jobs(bank, jobs, self.work)
                for job in jobs:
                    bank.load(job.adapters[0], folder / job.adapters[0])
            problem = Hypergradient(bank, pool, rows, safe, config.lookahead, attack.below, attack.above)
            direction = problem.direction()
            if attack.above:  # what the attack does to the safety loss; nothing where it failed
                report["safety_loss"] = mean_loss(bank, FORTH, safe)
                report["safety_loss_under_attack"] = mean_loss(bank, (FORTH, *attack.above), safe)
            length = problem.place_sides(direction)
            phase.tokens += bank.tokens
        losses = read(context, pool, lambda batch: problem.slopes(length, batch), self.work, forwards=2)
        size = float(norm(direction))
        score = losses["slope"] * size
        return Scores(
            score,
            np.full(len(score), RANKED),
            {"loss": losses["loss"]},
            report | {"safety_gradient": size},
            weight=one_step_weights(score),
        )
