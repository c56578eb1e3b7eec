"""What selectors by gradients share: an adapter trained on the pool, and its gradients by sets of rows and by rows."""

from collections.abc import Callable
from pathlib import Path

import torch

from pharmacist.core.progress import track
from pharmacist.core.seeding import derive
from pharmacist.nn.adapters import AdapterBank, Names
from pharmacist.nn.batching import Batch, IntArray, Sequences, batch_stream, make_batch
from pharmacist.nn.grads import Gradient
from pharmacist.nn.row_gradients import Tape, tape_rows
from pharmacist.selectors.jobs import Job


def pool_job(
    bank: AdapterBank,
    name: str,
    pool: Sequences,
    rows: IntArray,
    steps: int,
    seed: int,
    folder: Path,
    observe: Callable[[int, torch.optim.AdamW], None] = lambda step, optimizer: None,
    beside: tuple[str, ...] = (),
) -> Job:
    """Training of an adapter on rows of the pool or of references, all alike.

    `observe` as in `AdapterBank.train`; `beside` names further adapters that are active, held constant.
    """
    stream = batch_stream(len(rows), bank.options.batch_size, steps, derive(seed, "pool"))

    def loss(step: int) -> torch.Tensor:
        batch = make_batch(pool, rows[stream[step]], bank.device)
        return bank.row_losses((name, *beside), batch).completion.mean()

    def run(checkpoint: Path, advance: Callable[[], object]) -> None:
        bank.add(name)
        bank.train((name,), loss, steps=steps, checkpoint=checkpoint, advance=advance, observe=observe)

    return Job((name,), folder, steps, run)


def mean_gradient(
    bank: AdapterBank,
    name: str,
    sequences: Sequences,
    rows: IntArray,
    what: str = "mean gradient",
    beside: tuple[str, ...] = (),
) -> Gradient:
    """Derivative of the mean completion loss of some rows by an adapter's weights.

    Args:
        bank: Holds the adapter.
        name: Of the adapter.
        sequences: Where the rows are.
        rows: Their numbers; the batches follow their order.
        what: For the progress bar.
        beside: Further adapters that are active, held constant.
    """
    parameters = bank.parameters(name)
    total = {key: torch.zeros_like(parameter) for key, parameter in parameters.items()}
    with bank.differentiable(name):
        for start in track(range(0, len(rows), bank.options.batch_size), what):
            batch = make_batch(sequences, rows[start : start + bank.options.batch_size], bank.device)
            loss = bank.row_losses((name, *beside), batch).completion.sum() / len(rows)
            for value, part in zip(total.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True):
                value += part
    return total


@torch.no_grad()
def mean_loss(bank: AdapterBank, names: Names, sequences: Sequences) -> float:
    """Mean completion loss of all rows under an adapter, several together, or the base alone."""
    size, n = bank.options.batch_size, len(sequences.lengths)
    parts = (make_batch(sequences, range(start, min(start + size, n)), bank.device) for start in range(0, n, size))
    return sum(float(bank.row_losses(names, batch).completion.double().sum()) for batch in parts) / n


def moved(state: Gradient, direction: Gradient, by: float) -> Gradient:
    """``state + by * direction``, tensor by tensor."""
    return {key: value + by * direction[key].to(value) for key, value in state.items()}


def row_tape(bank: AdapterBank, name: str, batch: Batch) -> Tape:
    """One forward and backward pass over a batch under an adapter, also within a forward-only pass."""
    with torch.inference_mode(False), torch.enable_grad(), bank.differentiable(name):
        # Copies: autograd refuses tensors that were made in inference mode.
        batch = Batch(batch.input_ids.clone(), batch.lengths.clone(), batch.prompt_lengths.clone())
        return tape_rows(bank.linears(name), lambda: bank.row_losses(name, batch).completion)
