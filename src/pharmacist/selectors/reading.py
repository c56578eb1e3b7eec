"""What selectors read of a row with the base model alone: forward passes over pool or references."""

from torch import nn

from pharmacist.nn.batching import Batch, Sequences
from pharmacist.nn.passes import Measure, run_pass
from pharmacist.nn.reading import read_row_losses, tokens_per_batch
from pharmacist.selectors.base import FloatArray, SelectionContext


def read(
    context: SelectionContext, sequences: Sequences, measure: Measure, name: str, *, forwards: int = 1
) -> dict[str, FloatArray]:
    """Measures every row of `sequences` once, as phase ``score``; finished chunks lie in ``work/read/NAME``.

    Args:
        context: Of the ranking.
        sequences: The rows.
        measure: As in `nn.passes.run_pass`.
        name: Of what is measured; the same name means the same measurement of the same rows.
        forwards: How often `measure` sends a batch through the model, for the count of tokens.
    """
    device = context.model.device
    with context.run.phase("score") as phase:

        def counted(batch: Batch) -> dict[str, FloatArray]:
            phase.tokens += forwards * batch.tokens
            return measure(batch)

        return run_pass(
            sequences,
            counted,
            work=context.run.work("read", name),
            device=device,
            tokens_per_batch=tokens_per_batch(context.model.model, device),
            description=f"reading rows ({name})",
        )


def completion_loss(model: nn.Module, batch: Batch) -> FloatArray:
    """Mean cross-entropy of each row's completion tokens in nats, shape [rows]."""
    found: FloatArray = read_row_losses(model, batch, prompt=False).completion.double().cpu().numpy()
    return found


def completion_losses(context: SelectionContext, sequences: Sequences, name: str) -> FloatArray:
    """`completion_loss` of all rows under the base model, shape [rows]."""
    model = context.model.model
    return read(context, sequences, lambda batch: {"loss": completion_loss(model, batch)}, name)["loss"]
