"""Reference adapters: one small LoRA per class; the class whose adapter finds a row easiest is the likeliest."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import log_softmax

from pharmacist.core.seeding import derive
from pharmacist.nn.adapters import AdapterBank
from pharmacist.nn.batching import Batch, IntArray, Sequences, make_batch


FloatArray = npt.NDArray[np.float64]

PROMPT_WEIGHT = 0.5
"""w_p: what a prompt token counts against a completion token; it is what separates over-refusals from refusals."""


def batch_stream(n: int, batch_size: int, steps: int, seed: int) -> IntArray:
    """Row numbers for every step, shape [steps, batch_size]: reshuffled each time all n rows were used.

    The same seed gives the same order for every set of n rows, so that two sets differ in their rows alone.
    """
    needed = steps * batch_size
    epochs = range(-(-needed // n))
    order = [np.random.default_rng(derive(seed, "batches", epoch)).permutation(n) for epoch in epochs]
    return np.concatenate(order)[:needed].reshape(steps, batch_size).astype(np.int64)


def train_class_adapter(
    bank: AdapterBank,
    name: str,
    sequences: Sequences,
    rows: IntArray,
    *,
    steps: int,
    seed: int,
    checkpoint: Path,
    advance: Callable[[], object] = lambda: None,
) -> None:
    """Trains adapter `name` on some rows: prompt and completion losses, each normalised by its own length."""
    stream = batch_stream(len(rows), bank.options.batch_size, steps, seed)

    def loss(step: int) -> torch.Tensor:
        losses = bank.row_losses(name, make_batch(sequences, rows[stream[step]], bank.device))
        return (PROMPT_WEIGHT * losses.prompt + losses.completion).mean()

    bank.add(name)
    bank.train((name,), loss, steps=steps, checkpoint=checkpoint, advance=advance)


def adapter_losses(bank: AdapterBank, names: Sequence[str], batch: Batch) -> dict[str, FloatArray]:
    """Losses of a batch under several adapters.

    Returns:
        ``prompt_loss`` and ``completion_loss``, shape [rows, adapters]; ``n_prompt`` and ``n_completion``, shape
        [rows].
    """
    losses = [bank.row_losses(name, batch) for name in names]
    return {
        "prompt_loss": torch.stack([item.prompt for item in losses], 1).double().cpu().numpy(),
        "completion_loss": torch.stack([item.completion for item in losses], 1).double().cpu().numpy(),
        "n_prompt": losses[0].n_prompt.double().cpu().numpy(),
        "n_completion": losses[0].n_completion.double().cpu().numpy(),
    }


def energy_log_posterior(losses: dict[str, FloatArray]) -> FloatArray:
    """Log-softmax over k of e_ik = -( w_p sqrt(n_p) l^prompt_ik + sqrt(n_c) l^completion_ik ), shape [rows, classes].

    sqrt(n) lies between the mean per token (too timid on long rows) and the likelihood ratio (too sure of itself).
    """
    energy = -(
        PROMPT_WEIGHT * np.sqrt(losses["n_prompt"])[:, None] * losses["prompt_loss"]
        + np.sqrt(losses["n_completion"])[:, None] * losses["completion_loss"]
    )
    result: FloatArray = log_softmax(energy, axis=1)
    return result
