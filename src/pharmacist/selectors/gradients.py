"""Tools of the selectors that train adapters: training jobs, learned weights of rows, losses and gradients."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from pharmacist.core.files import atomic_path
from pharmacist.core.progress import bar, track
from pharmacist.core.rundir import RunDir
from pharmacist.core.seeding import derive
from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.nn.adapters import AdapterBank, Names
from pharmacist.nn.batching import Batch, Sequences, batch_stream, make_batch
from pharmacist.nn.distributed import barrier, my_share
from pharmacist.nn.grads import Gradient
from pharmacist.nn.row_gradients import Tape, tape_rows


FEWEST_COTRAINED = 256


@dataclass(frozen=True)
class Job:
    """A joint training of adapters from their common start; a finished one is read from its folder instead.

    Each adapter is saved in ``folder/name``. `loss` and `keep` are as in `AdapterBank.train`; `logits` are those of
    rows' weights, which the loss moves on the way, saved as ``folder/logits.npy``.
    """

    adapters: tuple[str, ...]
    folder: Path
    steps: int
    loss: Callable[[int], torch.Tensor]
    keep: Mapping[int, Path] = field(default_factory=dict)
    logits: torch.Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether all its adapters are saved; the JSON file is written last."""
        return all((self.folder / name / "adapter_config.json").is_file() for name in self.adapters)

    def run(self, bank: AdapterBank, advance: Callable[[], object]) -> None:
        """Trains and saves the adapters; `advance` is called after each step."""
        checkpoint = self.folder / f"{'+'.join(self.adapters)}.partial.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self.adapters:
            bank.add(name)
        bank.train(
            self.adapters,
            self.loss,
            steps=self.steps,
            checkpoint=checkpoint,
            advance=advance,
            extra={} if self.logits is None else {"logits": self.logits},
            keep=self.keep,
        )
        if self.logits is not None:
            with atomic_path(self.folder / "logits.npy") as path:
                # Through memory: numpy's own writing to files drops what a full disk does not take without a word.
                buffer = io.BytesIO()
                np.save(buffer, self.logits.numpy(), allow_pickle=False)
                path.write_bytes(buffer.getbuffer())
        for name in self.adapters:
            bank.save(name, self.folder / name)
        checkpoint.unlink(missing_ok=True)


def run_jobs(bank: AdapterBank, jobs: Sequence[Job], description: str) -> None:
    """Runs the jobs that are not done yet, shared out among processes; every process then has all their adapters."""
    mine = my_share(jobs)
    with bar(description, sum(job.steps for job in mine)) as progress:
        for job in mine:
            if job.done:
                progress.advance(job.steps)
            else:
                job.run(bank, progress.advance)
    barrier()
    for job in jobs:
        for name in job.adapters:
            bank.load(name, job.folder / name)


def pool_job(
    bank: AdapterBank,
    name: str,
    pool: Sequences,
    rows: IntArray,
    steps: int,
    seed: int,
    folder: Path,
    *,
    frozen: tuple[str, ...] = (),
    keep: Mapping[int, Path] = MappingProxyType({}),
) -> Job:
    """Training of an adapter on rows of the pool or of references, all alike.

    `frozen` names further adapters that are active, held constant; `keep` is as in `AdapterBank.train`.
    """
    stream = batch_stream(len(rows), bank.options.batch_size, steps, derive(seed, "pool"))

    def loss(step: int) -> torch.Tensor:
        return bank.losses((name, *frozen), pool, rows[stream[step]]).mean()

    return Job((name,), folder, steps, loss, keep)


@contextmanager
def bank_phase(run: RunDir, name: str, bank: AdapterBank) -> Iterator[None]:
    """Measures a phase, with the tokens that go through the adapters in it."""
    with run.phase(name) as phase:
        before = bank.tokens
        yield
        phase.tokens += bank.tokens - before


def adapter_losses(bank: AdapterBank, batch: Batch, names: Sequence[str]) -> dict[str, FloatArray]:
    """Completion losses of a batch under each adapter, shape [rows]; under ``twin_safe`` they are ``loss_safe``."""
    return {loss_name(name): losses_under(bank, name, batch) for name in names}


def loss_name(adapter: str) -> str:
    """The name of the losses under an adapter."""
    return f"loss_{adapter.removeprefix('twin_')}"


def losses_under(bank: AdapterBank, names: Names, batch: Batch) -> FloatArray:
    """Completion losses of a batch under an adapter, or several together, in float64; shape [rows]."""
    return bank.row_losses(names, batch).double().cpu().numpy()


def cotraining_rows(content_keys: npt.NDArray[np.uint64], share: float, seed: int) -> IntArray:
    """A share of the pool (at least `FEWEST_COTRAINED` rows), drawn by content so that row order cannot matter."""
    if share <= 0:
        return np.zeros(0, dtype=np.int64)
    size = min(len(content_keys), max(FEWEST_COTRAINED, round(share * len(content_keys))))
    salt = np.uint64(derive(seed, "twins", "share"))
    with np.errstate(over="ignore"):  # a multiplicative hash; wrapping round is its point
        mixed = (content_keys ^ salt) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.lexsort((content_keys, mixed))[:size].astype(np.int64)


def weight_gradient(sigma: FloatArray, difference: FloatArray, gamma: float) -> FloatArray:
    """dG/dw_i = (gamma / N) sigma_i (d_i - mean_j sigma_j d_j), the envelope-theorem gradient of V_safe - V_toxic."""
    return np.asarray(gamma / len(sigma) * sigma * (difference - (sigma * difference).mean()))


def batch_weight_gradient(weights: FloatArray, difference: FloatArray, gamma: float) -> FloatArray:
    """`weight_gradient` from a batch that stands for the pool, in units of 1 / pool rows, at weights of pool mean 1.

    The mean is taken over the batch under its own weights: rows with equal differences stay where they are, and so do
    rows that are not visited. At uniform weights its mean over all batches is the gradient, but for a factor.
    """
    return np.asarray(weight_gradient(weights / weights.mean(), difference, gamma) * weights.sum())


def row_weights(logits: torch.Tensor) -> torch.Tensor:
    """Softmax of the rows' logits, with mean 1."""
    return torch.softmax(logits, 0) * len(logits)


def move_logits(
    logits: torch.Tensor, rows: IntArray, weights: torch.Tensor, difference: torch.Tensor, rate: float, gamma: float
) -> None:
    """A step along `batch_weight_gradient`, in place, for the batch's rows; dense Adam would let all others drift."""
    gradient = batch_weight_gradient(weights.numpy(), difference.double().cpu().numpy(), gamma)
    logits.index_add_(0, torch.from_numpy(rows), torch.from_numpy(-rate * gradient))


def mean_over_copies(keys: npt.NDArray[np.uint64], rows: IntArray, values: FloatArray) -> FloatArray:
    """The mean of the values of rows with equal keys, in pool order; `values` are those of `rows`, each row once."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    totals = np.bincount(inverse[rows], weights=values, minlength=len(counts))
    return (totals / counts)[inverse]


def loss_and_gradient(
    bank: AdapterBank,
    name: str,
    sequences: Sequences,
    rows: IntArray,
    what: str = "mean gradient",
    frozen: tuple[str, ...] = (),
) -> tuple[float, Gradient]:
    """Mean completion loss of some rows, and its derivative by an adapter's weights.

    `what` is for the progress bar; `frozen` names further adapters that are active, held constant.
    """
    parameters = bank.parameters(name)
    total, gradient = 0.0, {key: torch.zeros_like(parameter) for key, parameter in parameters.items()}
    with bank.differentiable(name):
        for start in track(range(0, len(rows), bank.options.batch_size), what):
            losses = bank.losses((name, *frozen), sequences, rows[start : start + bank.options.batch_size])
            parts = torch.autograd.grad(losses.sum() / len(rows), list(parameters.values()))
            for value, part in zip(gradient.values(), parts, strict=True):
                value += part
            total += float(losses.detach().double().sum())
    return total / len(rows), gradient


@torch.no_grad()
def mean_loss(bank: AdapterBank, names: Names, sequences: Sequences) -> float:
    """Mean completion loss of all rows under an adapter, several together, or the base alone."""
    losses = (bank.row_losses(names, batch) for batch in batches(bank, sequences))
    return sum(float(part.double().sum()) for part in losses) / len(sequences.lengths)


def batches(bank: AdapterBank, sequences: Sequences) -> Iterator[Batch]:
    """All rows in their order, as many at a time as the adapters are trained on."""
    size, n = bank.options.batch_size, len(sequences.lengths)
    return (make_batch(sequences, range(n)[start : start + size], bank.device) for start in range(0, n, size))


def moved(state: Gradient, direction: Gradient, by: float) -> Gradient:
    """``state + by * direction``, tensor by tensor."""
    return {key: value + by * direction[key].to(value) for key, value in state.items()}


def row_tape(bank: AdapterBank, name: str, batch: Batch) -> Tape:
    """One forward and backward pass over a batch under an adapter, also within a forward-only pass."""
    with torch.enable_grad(), bank.differentiable(name):
        return tape_rows(bank.linears(name), lambda: bank.row_losses(name, batch))
