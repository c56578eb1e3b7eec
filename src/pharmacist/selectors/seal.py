"""SEAL: bilevel weights of pool rows, by how well a model that also learns the safe references fits each of them."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from pharmacist.core.errors import ConfigError
from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast1, Fraction, NotNegative
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import Batch, IntArray, Sequences, batch_stream, make_batch
from pharmacist.nn.distributed import barrier
from pharmacist.selectors.base import RANKED, Scores, SelectionContext, Selector
from pharmacist.selectors.jobs import Job, run_jobs
from pharmacist.selectors.pharmacist.twins import batch_weight_gradient, cotraining_rows, mean_over_copies, save_logits
from pharmacist.selectors.reading import read


FloatArray = npt.NDArray[np.float64]

INFORMED, PLAIN = "informed", "plain"
"""The model that learns safe references and weighted pool, and the auxiliary one that learns the pool alone."""


@dataclass
class SealConfig(AdapterOptions):
    """Options of the selector."""

    auxiliary: bool = True
    """Compare with an auxiliary model that learns the weighted pool alone (Alg. 1); else take the loss itself, at two
    thirds of the cost (Alg. 2, which the paper's experiments use)."""
    epochs: AtLeast1 = 3
    """Passes over the pool."""
    gamma: Fraction = 0.5
    """Weight of the pool against the safe references in the last epoch; grows in equal steps from gamma / epochs."""
    weight_rate: NotNegative = 0.3
    """Step size of the rows' logits; 0 keeps all weights equal."""
    rank_by: Literal["losses", "logits"] = "losses"
    """losses: what the trained models say of each row, in one more pass. logits: the weights learned on the way, as
    published, most of which come from models that were not trained yet."""

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


class SealSelector(Selector):
    """Prefers rows that a model fits better for having learned the safe references too."""

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
        self.weighs = config.weight_rate > 0

    def rank(self, context: SelectionContext) -> Scores:
        """Trains the models together with the rows' weights, then reads the pool once under each."""
        config, seed, pool = self.config, derive(context.seed, "seal"), context.encoded_pool
        safe = context.encoded_references("safe")
        bank = AdapterBank(context.model.model, config, seed, context.checkpoint_seconds)
        # Drawn by content: every row, in an order that does not depend on that of the input.
        rows = cotraining_rows(pool.content_keys, 1.0, seed)
        problem = SealProblem(safe, pool, rows, config.gamma, config.epochs, seed)
        folder = context.run.work("seal")
        with context.run.phase("train") as phase:
            run_jobs(bank, [seal_job(bank, problem, config, folder)], "seal")
            for name in config.adapters:
                bank.load(name, folder / name)
            phase.tokens += bank.tokens
        losses = read(
            context,
            pool,
            lambda batch: seal_losses(bank, config.adapters, batch),
            "seal",
            forwards=len(config.adapters),
        )
        barrier()
        logits = np.load(folder / "logits.npy", allow_pickle=False)
        losses["logit"] = mean_over_copies(pool.content_keys, rows, logits)
        score = losses["logit"] if config.rank_by == "logits" else -implied_difference(losses)
        report = {"steps": problem.steps(config.batch_size)}
        weight = np.exp(losses["logit"] - losses["logit"].max()) if self.weighs else None
        return Scores(score, np.full(len(score), RANKED), dict(losses), report, weight=weight)


@dataclass(frozen=True)
class SealProblem:
    """Data of the bilevel problem.

    Attributes:
        safe: Safe references in tokens, the upper level.
        pool: The pool in tokens, the lower level.
        pool_rows: Its rows in the order of the logits.
        gamma: Weight of the pool in the last epoch, in [0, 1].
        epochs: Passes over the pool.
        seed: Of the batches.
    """

    safe: Sequences
    pool: Sequences
    pool_rows: IntArray
    gamma: float
    epochs: int
    seed: int

    def steps(self, batch_size: int) -> int:
        """Updates in all: every row is visited `epochs` times."""
        return -(-self.epochs * len(self.pool_rows) // batch_size)

    def pool_weight(self, step: int, batch_size: int) -> float:
        """The weight g in the step's epoch."""
        epoch = min(self.epochs - 1, step * batch_size // len(self.pool_rows))
        return self.gamma * (epoch + 1) / self.epochs


def seal_job(bank: AdapterBank, problem: SealProblem, config: SealConfig, folder: Path) -> Job:
    """Training of models and logits; the logits are saved beside the adapters as ``logits.npy``.

    theta follows (1 - g) mean_u l_u + g mean_j w_j l_j, theta_hat follows mean_j w_j l_j on the same batches, with
    w = N softmax(omega). The logits of visited rows follow the softmax gradient of the gap l_j(theta) - l_j(theta_hat)
    by plain descent: Adam on N logits would lift every row that is not visited.
    """
    size, steps = config.batch_size, problem.steps(config.batch_size)
    pool = batch_stream(len(problem.pool_rows), size, steps, derive(problem.seed, "pool"))
    safe = batch_stream(len(problem.safe.lengths), size, steps, derive(problem.seed, "safe"))
    logits = torch.zeros(len(problem.pool_rows), dtype=torch.float64)

    def losses(adapter: str, sequences: Sequences, rows: IntArray) -> torch.Tensor:
        return bank.row_losses(adapter, make_batch(sequences, rows, bank.device)).completion

    def step_loss(step: int) -> torch.Tensor:
        rows, g = pool[step], problem.pool_weight(step, size)
        weights = (torch.softmax(logits, 0) * len(logits))[torch.from_numpy(rows)]
        with nullcontext() if g > 0 else torch.no_grad():
            informed = losses(INFORMED, problem.pool, problem.pool_rows[rows])
        total = informed.new_zeros(())
        if g < 1:
            total = (1 - g) * losses(INFORMED, problem.safe, safe[step]).mean()
        if g > 0:
            total = total + g * (weights.to(informed) * informed).mean()
        gap = informed.detach()
        if config.auxiliary:
            plain = losses(PLAIN, problem.pool, problem.pool_rows[rows])
            total = total + (weights.to(plain) * plain).mean()
            gap = gap - plain.detach()
        gradient = batch_weight_gradient(weights.numpy(), gap.double().cpu().numpy(), 1.0)
        logits.index_add_(0, torch.from_numpy(rows), torch.from_numpy(-config.weight_rate * gradient))
        return total

    def restore(tensors: dict[str, torch.Tensor]) -> None:
        logits.copy_(tensors["logits"])

    def run(checkpoint: Path, advance: Callable[[], object]) -> None:
        for name in config.adapters:
            bank.add(name)
        bank.train(
            config.adapters,
            step_loss,
            steps=steps,
            checkpoint=checkpoint,
            advance=advance,
            extra=lambda: {"logits": logits.clone()},
            restore=restore,
        )
        save_logits(folder, logits.numpy())

    return Job(config.adapters, folder, steps, run)


def seal_losses(bank: AdapterBank, adapters: tuple[str, ...], batch: Batch) -> dict[str, FloatArray]:
    """Completion losses of a batch, ``loss_informed`` and, with the auxiliary model, ``loss_plain``; shape [rows]."""
    return {f"loss_{name}": bank.row_losses(name, batch).completion.double().cpu().numpy() for name in adapters}


def implied_difference(losses: dict[str, FloatArray]) -> FloatArray:
    """What the logits descend on: l(theta) - l(theta_hat), or l(theta) without the auxiliary model; shape [rows]."""
    return losses[f"loss_{INFORMED}"] - losses.get(f"loss_{PLAIN}", 0.0)
