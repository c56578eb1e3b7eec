"""One-step hypergradient: how much a little more weight on a row would lower the safety loss after a training step."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pharmacist.core.errors import ConfigError
from pharmacist.core.seeding import derive
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import Batch, IntArray, Sequences
from pharmacist.nn.grads import Gradient, norm
from pharmacist.selectors.base import RANKED, Scores, SelectionContext, Selector
from pharmacist.selectors.gradients import mean_gradient, moved, pool_job
from pharmacist.selectors.jobs import run_jobs
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

    steps: int = 60
    """Training steps on the pool, all rows alike, before the derivative is taken."""
    share: float = 0.25
    """Share of the pool (at least 256 rows) that the model is trained on."""
    lookahead: float = 0.1
    """Learning rate of the step after which the safety loss is taken; 0 takes it where the model stands."""
    harmful_step: float = 0.0
    """Length of a step towards the harmful references after which the safety loss is taken, so that rows count which
    keep the model safe under attack; needs harmful references."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ConfigError(f"selector.steps must be at least 1, not {self.steps}")
        if not 0 < self.share <= 1:
            raise ConfigError(f"selector.share is a share of the pool in (0, 1], not {self.share}")
        for name in ("lookahead", "harmful_step"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"selector.{name} must not be negative, not {getattr(self, name)}")


class Unrolled(Selector):
    """Prefers rows whose gradient points where the safety loss falls, one training step ahead.

    The score is <grad l_i(theta), grad U(theta+)>, theta+ = theta - lookahead * grad mean l: minus the derivative of
    U(theta+) by the row's weight, but for the factor lookahead and the mean over rows, which change no rank.
    """

    Config = UnrolledConfig
    needs = frozenset({"safe", "model"})
    paper = "one-step unrolling as in DARTS (arXiv 1806.09055), for row weights as in Ren et al. (arXiv 1803.09050)"

    def __init__(self, config: UnrolledConfig) -> None:
        self.config = config
        self.needs = type(self).needs | ({"harmful"} if config.harmful_step > 0 else set())

    def rank(self, context: SelectionContext) -> Scores:
        """Trains briefly on the pool, finds the safety gradient, then reads the pool twice (once on either side)."""
        config, seed = self.config, derive(context.seed, "unrolled")
        pool, safe = context.encoded_pool, context.encoded_references("safe")
        harmful = context.encoded_references("harmful") if config.harmful_step > 0 else None
        bank = AdapterBank(context.model.model, config, seed, context.checkpoint_seconds)
        rows = cotraining_rows(pool.content_keys, config.share, seed)
        folder = context.run.work("unrolled")
        with context.run.phase("train") as phase:
            run_jobs(bank, [pool_job(bank, LEARNER, pool, rows, config.steps, seed, folder)], "unrolled")
            bank.load(LEARNER, folder / LEARNER)
            direction = safety_direction(
                bank, pool, rows, safe, harmful, lookahead=config.lookahead, harmful_step=config.harmful_step
            )
            length = place_sides(bank, direction)
            phase.tokens += bank.tokens
        losses = read(context, pool, lambda batch: slopes(bank, length, batch), "unrolled", forwards=2)
        score = losses["slope"] * float(norm(direction))
        return Scores(
            score, np.full(len(score), RANKED), {"loss": losses["loss"]}, {"safety_gradient": float(norm(direction))}
        )


def safety_direction(
    bank: AdapterBank, pool: Sequences, rows: IntArray, safe: Sequences, harmful: Sequences | None, *,
    lookahead: float, harmful_step: float,
) -> Gradient:  # fmt: skip
    """The gradient of the safety loss after a pool step, and after a harmful step of fixed length where asked.

    The harmful step is held constant in the derivative (first order), as a defender's gradient is in Booster.

    Args:
        bank: Holds the adapter `LEARNER`.
        pool: The pool.
        rows: Of the pool; their mean gradient is the step.
        safe: Safe references.
        harmful: Harmful references; read only where `harmful_step` is positive.
        lookahead: Learning rate of the pool step.
        harmful_step: Length of the harmful step.
    """
    at = bank.state(LEARNER)
    if lookahead > 0:
        at = moved(at, mean_gradient(bank, LEARNER, pool, rows, "unrolled, step on the pool"), -lookahead)
    bank.add(FORTH, at)
    if harmful_step > 0:
        assert harmful is not None
        step = mean_gradient(bank, FORTH, harmful, np.arange(len(harmful.lengths)))
        bank.add(FORTH, moved(at, step, -harmful_step / max(float(norm(step)), 1e-12)))
    return mean_gradient(bank, FORTH, safe, np.arange(len(safe.lengths)))


def place_sides(bank: AdapterBank, direction: Gradient) -> float:
    """Puts `FORTH` and `BACK` on either side of `LEARNER` along a direction; returns how far from it they are."""
    size = float(norm(direction))
    dtype = next(bank.model.get_base_model().parameters()).dtype
    length = _LENGTHS.get(dtype, 0.1)
    for name, sign in ((FORTH, 1), (BACK, -1)):
        bank.add(name, moved(bank.state(LEARNER), direction, sign * length / max(size, 1e-12)))
    return length


def slopes(bank: AdapterBank, length: float, batch: Batch) -> dict[str, FloatArray]:
    """Central differences of a batch's completion losses between the two sides.

    Returns:
        ``slope``, the derivative along the unit direction, and ``loss``, the mean of the two; shape [rows].
    """
    forth, back = (bank.row_losses(name, batch).completion.double().cpu().numpy() for name in (FORTH, BACK))
    return {"slope": (forth - back) / (2 * length), "loss": (forth + back) / 2}
