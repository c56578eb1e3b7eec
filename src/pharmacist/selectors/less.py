"""LESS: how far the optimizer's step on a row points the way that the safe references' gradients point."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from pharmacist.core.errors import DataError
from pharmacist.core.files import atomic_path
from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast1, Share
from pharmacist.nn.adapters import AdapterBank, AdapterOptions, learning_rate_factor
from pharmacist.nn.batching import Batch, IntArray, Sequences, make_batch
from pharmacist.nn.grads import Gradient, norm
from pharmacist.nn.passes import Measure, run_pass
from pharmacist.nn.reading import tokens_per_batch
from pharmacist.selectors.base import RANKED, Scores, SelectionContext, Selector
from pharmacist.selectors.gradients import pool_job, row_tape
from pharmacist.selectors.jobs import Job, run_jobs
from pharmacist.selectors.pharmacist.twins import cotraining_rows


if TYPE_CHECKING:
    from pharmacist.data.tokenize import Encoded

FloatArray = npt.NDArray[np.float64]

LEARNER = "learner"
BETAS, EPS = (0.9, 0.999), 1e-8
"""AdamW's, as `nn.adapters.AdapterBank.train` leaves them."""
_SMALLEST = 1e-30


@dataclass
class LessConfig(AdapterOptions):
    """Options of the selector."""

    epochs: AtLeast1 = 4
    """Passes over the rows of the warm-up; the pool is read with the model as it is after each."""
    share: Share = 0.05
    """Share of the pool (at least 256 rows) that the model warms up on."""
    features: Literal["projected", "exact"] = "projected"
    """projected: Adam's step on each row, momentum included, projected at random, as published. exact: the row's
    gradient against the references' direction in Adam's scale, without projection and without forming it."""
    dimensions: AtLeast1 = 8192
    """Of the projected features; their noise is about 1 / sqrt(dimensions) of a cosine."""


class LessSelector(Selector):
    """Prefers rows on which an optimizer step resembles one on the safe references.

    The score is sum_c eta_c cos_c: over checkpoints c of a warm-up on the pool, weighted by their learning rates, the
    mean over references of the cosine between the row's feature and the reference's gradient.
    """

    Config = LessConfig
    name = "less"
    needs = frozenset({"safe", "model"})
    paper = "Xia et al. 2024, arXiv 2402.04333"

    def rank(self, context: SelectionContext) -> Scores:
        """Warms up on the pool, then reads references and pool with gradients, once per checkpoint."""
        config, seed, pool = self.config, derive(context.seed, "less"), context.encoded_pool
        safe = context.encoded_references("safe")
        bank = AdapterBank(context.model.model, config, seed, context.checkpoint_seconds)
        rows = cotraining_rows(pool.content_keys, config.share, seed)
        folder = context.run.work("less")
        with context.run.phase("train") as phase:
            run_jobs(bank, [warm_up_job(bank, pool, rows, config.epochs, seed, folder)], "less, warm-up")
            phase.tokens += bank.tokens
        score = np.zeros(len(pool))
        signals = {}
        with context.run.phase("score") as phase:
            before = bank.tokens
            for epoch, weight in enumerate(checkpoint_weights(len(rows), config)):
                checkpoint = Checkpoint.load(folder / f"epoch{epoch}.safetensors")
                bank.add(LEARNER, checkpoint.weights)
                where = context.run.work("less", f"cosines{epoch}")
                found = (_projected if config.features == "projected" else _exact)(
                    context, bank, checkpoint, safe, seed, config, where
                )
                signals[f"cosine_{epoch}"] = found
                score += weight * found
            phase.tokens += bank.tokens - before
        return Scores(score, np.full(len(score), RANKED), signals, {"warm_up_rows": len(rows)})


@dataclass(frozen=True)
class Checkpoint:
    """A model in training, with Adam's state.

    Attributes:
        weights: Of the adapter.
        m: First moments.
        v: Second moments.
        step: Updates so far.
    """

    weights: Gradient
    m: Gradient
    v: Gradient
    step: int

    def save(self, path: Path) -> None:
        """Writes it as safetensors."""
        parts = {"weights": self.weights, "m": self.m, "v": self.v}
        tensors = {f"{part}/{key}": value for part, values in parts.items() for key, value in values.items()}
        with atomic_path(path) as temporary:
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                | {"step": torch.tensor(self.step)},
                temporary,
            )

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Reads what `save` wrote."""
        if not path.is_file():
            raise DataError(f"{path}: missing; delete the folder {path.parent}, and the warm-up is done again")
        tensors = load_file(path)
        step = int(tensors.pop("step"))
        parts: dict[str, Gradient] = {"weights": {}, "m": {}, "v": {}}
        for name, value in tensors.items():
            part, _, key = name.partition("/")
            parts[part][key] = value
        return cls(**parts, step=step)


def epoch_steps(n_rows: int, batch_size: int) -> int:
    """Updates per epoch of the warm-up."""
    return -(-n_rows // batch_size)


def warm_up_job(bank: AdapterBank, pool: Sequences, rows: IntArray, epochs: int, seed: int, folder: Path) -> Job:
    """Training on rows of the pool; leaves ``epochN.safetensors`` (a `Checkpoint`) after each epoch."""
    per_epoch = epoch_steps(len(rows), bank.options.batch_size)

    def observe(step: int, optimizer: torch.optim.AdamW) -> None:
        epoch, rest = divmod(step + 1, per_epoch)
        if rest:
            return
        parameters = bank.parameters(LEARNER)
        states = {key: optimizer.state[parameter] for key, parameter in parameters.items()}
        Checkpoint(
            bank.state(LEARNER),
            {key: state["exp_avg"] for key, state in states.items()},
            {key: state["exp_avg_sq"] for key, state in states.items()},
            step + 1,
        ).save(folder / f"epoch{epoch - 1}.safetensors")

    return pool_job(bank, LEARNER, pool, rows, epochs * per_epoch, seed, folder, observe)


def checkpoint_weights(n_rows: int, config: LessConfig) -> FloatArray:
    """Mean learning rate of each epoch of the warm-up, as shares of their sum; shape [epochs]."""
    per_epoch = epoch_steps(n_rows, config.batch_size)
    steps = config.epochs * per_epoch
    rates = np.array([learning_rate_factor(step, steps) for step in range(steps)]).reshape(config.epochs, per_epoch)
    weights: FloatArray = rates.mean(1) / rates.mean(1).sum()
    return weights


def adam_direction(gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: int) -> torch.Tensor:
    """The next update of Adam per unit of learning rate, with its bias correction, if it met this gradient.

    Args:
        gradient: Shape [..., *weight].
        m: First moment so far, shape of the weight.
        v: Second moment so far.
        step: Updates so far.
    """
    first = BETAS[0] * m + (1 - BETAS[0]) * gradient
    second = BETAS[1] * v + (1 - BETAS[1]) * gradient.square()
    first, second = first / (1 - BETAS[0] ** (step + 1)), second / (1 - BETAS[1] ** (step + 1))
    return first / (second.sqrt() + EPS)


def adam_scale(v: torch.Tensor, step: int) -> torch.Tensor:
    """What Adam multiplies first moments by, at the second moments as they are; shape of the weight."""
    return 1 / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)


class Sketch:
    """A random projection of tensors by name: permuted, with random signs, folded to few dimensions and added up.

    Inner products keep their expectation, with the noise of a dense projection, but no matrix is ever formed.

    Args:
        shapes: Name -> shape of the tensors.
        dimensions: Of the projection.
        seed: The same seed gives the same projection.
    """

    def __init__(self, shapes: dict[str, torch.Size], dimensions: int, seed: int, device: torch.device) -> None:
        self.dimensions = dimensions
        self._order, self._place, self._sign = {}, {}, {}
        for name, shape in shapes.items():
            generator = torch.Generator().manual_seed(derive(seed, "sketch", name))
            # Folding takes neighbours apart; the permutation also fills up to a whole number of folds with blanks.
            size = shape.numel()
            padded = -(-size // dimensions) * dimensions
            order = torch.randperm(padded, generator=generator)
            sign = torch.randint(0, 2, (padded,), generator=generator) * 2 - 1
            if padded == dimensions:  # one fold, mostly blanks: only where each number goes
                place = order.argsort()[:size]
                self._place[name], sign = place.to(device), sign[place]
            else:
                self._order[name] = order.to(device)
            self._sign[name] = sign.to(device, torch.int8)

    def __call__(self, name: str, tensors: torch.Tensor) -> torch.Tensor:
        """Projects a batch of tensors called `name`, shape [rows, *shape] -> [rows, dimensions]."""
        flat = tensors.flatten(1)
        if name in self._place:
            spread = flat.new_zeros(len(flat), self.dimensions)
            spread[:, self._place[name]] = flat * self._sign[name]
            return spread
        order = self._order[name]
        flat = torch.nn.functional.pad(flat, (0, len(order) - flat.shape[1]))
        mixed: torch.Tensor = flat[:, order] * self._sign[name]
        return mixed.view(len(flat), -1, self.dimensions).sum(1)


def row_features(bank: AdapterBank, sketch: Sketch, batch: Batch, checkpoint: Checkpoint | None) -> torch.Tensor:
    """Normalised features of a batch: projected gradients, or with a checkpoint projected steps of Adam.

    Returns:
        Shape [rows, dimensions].
    """
    total: torch.Tensor | None = None
    for name, gradient in row_tape(bank, LEARNER, batch).gradients():
        if checkpoint is not None:
            m, v = checkpoint.m[name].to(gradient), checkpoint.v[name].to(gradient)
            gradient = adam_direction(gradient, m, v, checkpoint.step)
        part = sketch(name, gradient)
        total = part if total is None else total.add_(part)
    assert total is not None
    length: torch.Tensor = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    return total.div_(length.clamp(min=_SMALLEST))


def _projected(
    context: SelectionContext,
    bank: AdapterBank,
    checkpoint: Checkpoint,
    safe: "Encoded",
    seed: int,
    config: LessConfig,
    work: Path,
) -> FloatArray:
    shapes = {name: parameter.shape for name, parameter in bank.parameters(LEARNER).items()}
    sketch = Sketch(shapes, config.dimensions, seed, bank.device)
    target = torch.zeros(config.dimensions, dtype=torch.float64, device=bank.device)
    for batch in _batches(bank, safe):
        target += row_features(bank, sketch, batch, None).double().sum(0) / len(safe.lengths)

    def cosines(batch: Batch) -> dict[str, FloatArray]:
        return {"cosine": (row_features(bank, sketch, batch, checkpoint).double() @ target).cpu().numpy()}

    return _read(context, cosines, work, "less, features")["cosine"]


def exact_direction(bank: AdapterBank, safe: Sequences, checkpoint: Checkpoint) -> Gradient:
    """The mean of the references' gradients, each of length 1, in Adam's scale."""
    total: Gradient = {}
    for batch in _batches(bank, safe):
        tape = row_tape(bank, LEARNER, batch)
        length = tape.square_norms().sqrt().clamp(min=_SMALLEST)
        for name, gradient in tape.gradients():
            part = (gradient / length.to(gradient)[:, None, None]).sum(0) / len(safe.lengths)
            total[name] = total[name] + part if name in total else part
    return {name: value * adam_scale(checkpoint.v[name].to(value), checkpoint.step) for name, value in total.items()}


def exact_cosines(bank: AdapterBank, direction: Gradient, batch: Batch) -> FloatArray:
    """Inner product of each row's gradient with a direction over the gradient's length, shape [rows]."""
    tape = row_tape(bank, LEARNER, batch)
    found: FloatArray = (tape.inner(direction) / tape.square_norms().sqrt().clamp(min=_SMALLEST)).cpu().numpy()
    return found


def _exact(
    context: SelectionContext,
    bank: AdapterBank,
    checkpoint: Checkpoint,
    safe: "Encoded",
    seed: int,
    config: LessConfig,
    work: Path,
) -> FloatArray:
    direction = exact_direction(bank, safe, checkpoint)
    # One unit for all checkpoints: in Adam's scale the direction's length has no meaning of its own.
    size = max(float(norm(direction)), _SMALLEST)
    return _read(
        context, lambda batch: {"cosine": exact_cosines(bank, direction, batch) / size}, work, "less, gradients"
    )["cosine"]


def _read(context: SelectionContext, measure: Measure, work: Path, description: str) -> dict[str, FloatArray]:
    device = context.model.device
    # A backward pass keeps what a forward pass forgets.
    budget = max(256, tokens_per_batch(context.model.model, device) // 8)
    return run_pass(
        context.encoded_pool, measure, work=work, device=device, tokens_per_batch=budget, description=description
    )


def _batches(bank: AdapterBank, sequences: Sequences) -> Iterator[Batch]:
    size, n = bank.options.batch_size, len(sequences.lengths)
    return (make_batch(sequences, np.arange(start, min(start + size, n)), bank.device) for start in range(0, n, size))
