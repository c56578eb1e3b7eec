"""LESS: how well the optimizer's step on a row agrees with the gradients of the safe references."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pharmacist.core.errors import DataError
from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast1, Share
from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.nn.adapters import AdapterBank, AdapterOptions, TrainingState, learning_rate_factor
from pharmacist.nn.batching import Batch, Sequences
from pharmacist.nn.grads import Gradient, norm
from pharmacist.nn.passes import Measure
from pharmacist.selectors.base import Scores, SelectionContext, Selector
from pharmacist.selectors.gradients import Job, bank_phase, batches, cotraining_rows, pool_job, row_tape, run_jobs


LEARNER = "learner"
BETAS, EPS = (0.9, 0.999), 1e-8
"""AdamW's, as `nn.adapters.AdapterBank.train` leaves them."""
_SMALLEST = 1e-30


@dataclass
class LessConfig(AdapterOptions):
    """Options of the selector."""

    epochs: AtLeast1 = 4
    """Passes over the rows of the warm-up; the pool is read with the model after each of them."""
    share: Share = 0.05
    """Share of the pool (at least 256 rows) that the model warms up on."""
    features: Literal["projected", "exact"] = "projected"
    """projected: Adam's step on each row, including momentum, projected at random, as published. exact: inner product
    of the row's gradient and the references' direction in Adam's scale, without projection and without forming the
    gradient."""
    dimensions: AtLeast1 = 8192
    """Number of dimensions of the projected features; their noise is about 1 / sqrt(dimensions) of a cosine
    similarity."""


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
        with bank_phase(context.run, "train", bank):
            run_jobs(bank, [warm_up_job(bank, pool, rows, config.epochs, seed, folder)], "less, warm-up")
        shapes = {name: parameter.shape for name, parameter in bank.parameters(LEARNER).items()}
        sketch = Sketch(shapes, config.dimensions, seed, bank.device) if config.features == "projected" else None
        score, signals = np.zeros(len(pool)), {}
        for epoch, weight in enumerate(checkpoint_weights(len(rows), config)):
            checkpoint = load_checkpoint(folder, epoch)
            bank.add(LEARNER, checkpoint.weight)
            with bank_phase(context.run, "score", bank):
                cosines = _projected(bank, safe, checkpoint, sketch) if sketch else _exact(bank, safe, checkpoint)
            found = context.read(pool, cosines, f"less-cosines{epoch}", backward=True)["cosine"]
            signals[f"cosine_{epoch}"] = found
            score += weight * found
        return Scores(score, signals=signals, report={"warm_up_rows": len(rows)})


def warm_up_job(bank: AdapterBank, pool: Sequences, rows: IntArray, epochs: int, seed: int, folder: Path) -> Job:
    """Training on rows of the pool that keeps the state after each epoch (`load_checkpoint`)."""
    per_epoch = -(-len(rows) // bank.options.batch_size)
    keep = {per_epoch * (epoch + 1): _checkpoint(folder, epoch) for epoch in range(epochs)}
    return pool_job(bank, LEARNER, pool, rows, epochs * per_epoch, seed, folder, keep=keep)


def load_checkpoint(folder: Path, epoch: int) -> TrainingState:
    """The adapter as the warm-up left it after an epoch."""
    path = _checkpoint(folder, epoch)
    if not path.is_file():
        raise DataError(f"{path}: missing; delete the folder {folder}, and the warm-up is done again")
    return TrainingState.load(path).of(LEARNER)


def _checkpoint(folder: Path, epoch: int) -> Path:
    return folder / f"after-epoch{epoch}.safetensors"


def checkpoint_weights(n_rows: int, config: LessConfig) -> FloatArray:
    """Mean learning rate of each epoch of the warm-up, as shares of their sum; shape [epochs]."""
    per_epoch = -(-n_rows // config.batch_size)
    steps = config.epochs * per_epoch
    rates = np.array([learning_rate_factor(step, steps) for step in range(steps)]).reshape(config.epochs, per_epoch)
    return np.asarray(rates.mean(1) / rates.mean(1).sum())


def adam_direction(gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: int) -> torch.Tensor:
    """The next update of Adam per unit of learning rate, with its bias correction, if it met this gradient.

    The gradient has the shape [..., *weight]; the moments m and v are those after so many steps.
    """
    first = BETAS[0] * m + (1 - BETAS[0]) * gradient
    second = BETAS[1] * v + (1 - BETAS[1]) * gradient.square()
    first, second = first / (1 - BETAS[0] ** (step + 1)), second / (1 - BETAS[1] ** (step + 1))
    return first / (second.sqrt() + EPS)


class Sketch:
    """A random projection of tensors by name: permuted, with random signs, folded to few dimensions and added up.

    Inner products keep their expectation, with the noise of a dense projection, but no matrix is ever formed. The same
    seed gives the same projection.
    """

    def __init__(self, shapes: dict[str, torch.Size], dimensions: int, seed: int, device: torch.device) -> None:
        self.dimensions = dimensions
        self._order, self._sign = {}, {}
        for name, shape in shapes.items():
            generator = torch.Generator().manual_seed(derive(seed, "sketch", name))
            # Folding takes neighbours apart; the permutation also fills up to a whole number of folds with blanks.
            padded = -(-shape.numel() // dimensions) * dimensions
            self._order[name] = torch.randperm(padded, generator=generator).to(device)
            sign = torch.randint(0, 2, (padded,), generator=generator) * 2 - 1
            self._sign[name] = sign.to(device, torch.int8)

    def __call__(self, name: str, tensors: torch.Tensor) -> torch.Tensor:
        """Projects a batch of tensors called `name`, shape [rows, *shape] -> [rows, dimensions]."""
        flat, order = tensors.flatten(1), self._order[name]
        flat = torch.nn.functional.pad(flat, (0, len(order) - flat.shape[1]))
        mixed: torch.Tensor = flat[:, order] * self._sign[name]
        return mixed.view(len(flat), -1, self.dimensions).sum(1)


def row_features(bank: AdapterBank, sketch: Sketch, batch: Batch, checkpoint: TrainingState | None) -> torch.Tensor:
    """Normalised features of a batch, shape [rows, dimensions]: projected gradients, or with a checkpoint projected
    steps of Adam.
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


def _projected(bank: AdapterBank, safe: Sequences, checkpoint: TrainingState, sketch: Sketch) -> Measure:
    """Measures the mean ``cosine`` to the references, as published."""
    features = (row_features(bank, sketch, batch, None) for batch in batches(bank, safe))
    target: torch.Tensor = sum(some.double().sum(0) / len(safe.lengths) for some in features)  # type: ignore[assignment]
    return lambda batch: {"cosine": (row_features(bank, sketch, batch, checkpoint).double() @ target).cpu().numpy()}


def _exact(bank: AdapterBank, safe: Sequences, checkpoint: TrainingState) -> Measure:
    """Measures the ``cosine`` to the references' direction, that direction taken as of length 1."""
    direction = exact_direction(bank, safe, checkpoint)
    # One unit for all checkpoints: in Adam's scale the direction's length has no meaning of its own.
    size = max(float(norm(direction)), _SMALLEST)
    return lambda batch: {"cosine": exact_cosines(bank, direction, batch) / size}


def exact_direction(bank: AdapterBank, safe: Sequences, checkpoint: TrainingState) -> Gradient:
    """The mean of the references' gradients, each of length 1, in Adam's scale."""
    total: Gradient = {}
    for batch in batches(bank, safe):
        tape = row_tape(bank, LEARNER, batch)
        length = tape.square_norms().sqrt().clamp(min=_SMALLEST)
        for name, gradient in tape.gradients():
            part = (gradient / length.to(gradient)[:, None, None]).sum(0) / len(safe.lengths)
            total[name] = total[name] + part if name in total else part
    # What Adam multiplies first moments by, at the second moments as they are.
    correction = 1 - BETAS[1] ** checkpoint.step
    return {
        name: value * (1 / ((checkpoint.v[name].to(value) / correction).sqrt() + EPS)) for name, value in total.items()
    }


def exact_cosines(bank: AdapterBank, direction: Gradient, batch: Batch) -> FloatArray:
    """Inner product of each row's gradient with a direction over the gradient's length, shape [rows]."""
    tape = row_tape(bank, LEARNER, batch)
    return (tape.inner(direction) / tape.square_norms().sqrt().clamp(min=_SMALLEST)).cpu().numpy()
