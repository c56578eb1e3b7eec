"""Unrolled: rows whose gradient points where the safety loss falls, one training step ahead."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast1, NotNegative, Share
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.grads import norm
from pharmacist.selectors import gradients
from pharmacist.selectors.base import Scores, SelectionContext, Selector
from pharmacist.selectors.hypergradient import FORTH, LEARNER, Hypergradient, one_step_weights
from pharmacist.selectors.reading import read


if TYPE_CHECKING:
    from pharmacist.data.tokenize import Encoded


@dataclass
class UnrolledConfig(AdapterOptions):
    """Options of the selector."""

    steps: AtLeast1 = 60
    """Training steps on the pool, all rows alike, before the derivative is taken."""
    share: Share = 0.25
    """Share of the pool (at least 256 rows) that the model is trained on."""
    lookahead: NotNegative = 0.1
    """Learning rate of the step after which the safety loss is taken; 0 takes it where the model stands."""


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

    def attack(
        self, bank: AdapterBank, references: Mapping[str, "Encoded"], seed: int, folder: Path
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
        losses = read(context, pool, partial(problem.slopes, length), self.name, forwards=2)
        report["safety_gradient"] = float(norm(direction))
        score = losses["slope"] * report["safety_gradient"]
        return Scores(score, signals={"loss": losses["loss"]}, report=report, weight=one_step_weights(score))
