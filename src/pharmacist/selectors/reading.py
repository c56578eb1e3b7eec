"""Passes over pool or references that measure every row with the ranking's model."""

from collections.abc import Callable

import torch

from pharmacist.nn.batching import Batch, Sequences
from pharmacist.nn.passes import Measure, run_pass
from pharmacist.selectors.base import FloatArray, SelectionContext


def read(
    context: SelectionContext,
    sequences: Sequences,
    measure: Measure,
    name: str,
    *,
    forwards: int = 1,
    backward: bool = False,
) -> dict[str, FloatArray]:
    """Measures every row of `sequences` once, as phase ``score``; finished chunks lie in ``work/read/NAME``.

    The same name means the same measurement of the same rows. `forwards` says how often `measure` (of a pass) sends
    a batch through the model, for the count of tokens; `backward` that it keeps what a backward pass needs, so that
    batches must be smaller.
    """
    with context.run.phase("score") as phase:

        def counted(batch: Batch) -> dict[str, FloatArray]:
            phase.tokens += forwards * batch.tokens
            return measure(batch)

        return run_pass(
            context.model.model,
            sequences,
            counted,
            work=context.run.work("read", name),
            description=f"reading rows ({name})",
            backward=backward,
        )


def read_numbers(
    context: SelectionContext, sequences: Sequences, measure: Callable[[Batch], torch.Tensor], name: str
) -> FloatArray:
    """As `read`, of one number per row, shape [rows]."""
    return read(context, sequences, lambda batch: {"number": measure(batch).double().cpu().numpy()}, name)["number"]
