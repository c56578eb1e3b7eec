"""SEAL: bilevel weights of pool rows, by how well a model that also learns the safe references fits each of them."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pharmacist.core.errors import ConfigError
from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast1, Fraction, NotNegative
from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import Sequences, batch_stream
from pharmacist.selectors import gradients
from pharmacist.selectors.base import Scores, SelectionContext, Selector
from pharmacist.selectors.gradients import Job


INFORMED, PLAIN = "informed", "plain"
"""The adapter that learns safe references and weighted pool, and the auxiliary one that learns the pool alone."""


@dataclass
class SealConfig(AdapterOptions):
    """Options of the selector."""

    auxiliary: bool = True
    """Compare with an auxiliary model that learns only the weighted pool (Alg. 1); otherwise use the loss itself, at
    two thirds of the cost (Alg. 2, used in the paper's experiments)."""
    epochs: AtLeast1 = 3
    """Passes over the pool."""
    gamma: Fraction = 0.5
    """Weight of the pool against the safe references in the last epoch; grows in equal steps from gamma / epochs."""
    weight_rate: NotNegative = 0.3
    """Step size of the rows' logits; 0 keeps all weights equal."""
    rank_by: Literal["losses", "logits"] = "losses"
    """losses: losses of each row under the trained models, in one more pass. logits: the weights learned during
    training, as published, most of which come from unfinished models."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_by == "logits" and self.weight_rate == 0:
            raise ConfigError("selector.rank_by logits ranks nothing where selector.weight_rate is 0")
        if self.batch_size == 1 and self.weight_rate > 0:
            raise ConfigError(
                "selector.batch_size 1 leaves all weights equal: they move by how a row's loss differs from others "
                "in its batch; take 2 or more, or selector.weight_rate 0"
            )

    @property
    def adapters(self) -> tuple[str, ...]:
        """The models in use."""
        return (INFORMED, PLAIN) if self.auxiliary else (INFORMED,)

    def pool_weight(self, step: int, n_rows: int) -> float:
        """Weight of the pool at a step of a training on so many rows."""
        epoch = min(self.epochs - 1, step * self.batch_size // n_rows)
        return self.gamma * (epoch + 1) / self.epochs


class SealSelector(Selector):
    """Prefers rows that a model fits better if it has also learned the safe references."""

    Config = SealConfig
    name = "seal"
    needs = frozenset({"safe", "model"})
    paper = "Shen et al. 2024, arXiv 2410.07471"

    def __post_init__(self) -> None:
        config = self.config
        if config.gamma == 1 and config.epochs == 1:  # both models would be the same
            raise ConfigError(
                "selector.gamma 1 with selector.epochs 1 never learns the safe references; take a lower gamma or more "
                "epochs"
            )
        self.gives_weights = config.weight_rate > 0

    def rank(self, context: SelectionContext) -> Scores:
        """Trains the models together with the rows' weights, then reads the pool once under each."""
        config, seed, pool = self.config, derive(context.seed, "seal"), context.encoded_pool
        safe = context.encoded_references("safe")
        bank = AdapterBank(context.model.model, config, seed, context.checkpoint_seconds)
        # Drawn by content: every row, in an order that does not depend on that of the input.
        rows = gradients.cotraining_rows(pool.content_keys, 1.0, seed)
        job = seal_job(bank, config, safe, pool, rows, seed, context.run.work("seal"))
        with gradients.bank_phase(context.run, "train", bank):
            gradients.run_jobs(bank, [job], "seal")
        measure = partial(gradients.adapter_losses, bank, names=config.adapters)
        losses = context.read(pool, measure, "seal", forwards=len(config.adapters))
        logits = np.load(job.folder / "logits.npy", allow_pickle=False)
        losses["logit"] = gradients.mean_over_copies(pool.content_keys, rows, logits)
        score = losses["logit"] if config.rank_by == "logits" else -implied_difference(losses)
        weight = np.exp(losses["logit"] - losses["logit"].max()) if self.gives_weights else None
        return Scores(score, signals=dict(losses), report={"steps": job.steps}, weight=weight)


def seal_job(
    bank: AdapterBank, config: SealConfig, safe: Sequences, pool: Sequences, rows: IntArray, seed: int, folder: Path
) -> Job:
    """Training of models and logits, in which every row of the pool is visited `SealConfig.epochs` times.

    theta follows (1 - g) mean_u l_u + g mean_j w_j l_j, theta_hat follows mean_j w_j l_j on the same batches, with
    w = N softmax(omega). The logits omega of visited rows follow the softmax gradient of the gap between the two l_j.
    Safe references are the upper level, the pool's rows, in the order of the logits, the lower one.
    """
    size, steps = config.batch_size, -(-config.epochs * len(rows) // config.batch_size)
    pool_stream = batch_stream(len(rows), size, steps, derive(seed, "pool"))
    safe_stream = batch_stream(len(safe.lengths), size, steps, derive(seed, "safe"))
    logits = torch.zeros(len(rows), dtype=torch.float64)

    def step_loss(step: int) -> torch.Tensor:
        visited, g = pool_stream[step], config.pool_weight(step, len(rows))
        weights = gradients.row_weights(logits)[visited]
        with nullcontext() if g > 0 else torch.no_grad():
            informed = bank.losses(INFORMED, pool, rows[visited])
        total = informed.new_zeros(())
        if g < 1:
            total = (1 - g) * bank.losses(INFORMED, safe, safe_stream[step]).mean()
        if g > 0:
            total = total + g * (weights.to(informed) * informed).mean()
        gap = informed.detach()
        if config.auxiliary:
            plain = bank.losses(PLAIN, pool, rows[visited])
            total = total + (weights.to(plain) * plain).mean()
            gap = gap - plain.detach()
        gradients.move_logits(logits, visited, weights, gap, config.weight_rate, 1.0)
        return total

    return Job(config.adapters, folder, steps, step_loss, logits=logits)


def implied_difference(losses: dict[str, FloatArray]) -> FloatArray:
    """The difference that logits descend on: l(theta) - l(theta_hat), or l(theta) without the auxiliary model."""
    return losses[f"loss_{INFORMED}"] - losses.get(f"loss_{PLAIN}", 0.0)
