"""GraNd: the norm of each row's gradient, from one pass that never forms the gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from pharmacist.core.errors import ConfigError
from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast1, Checked
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import Batch
from pharmacist.nn.hooks import activation_gradients, capture
from pharmacist.nn.locate import output_head
from pharmacist.nn.losses import row_losses
from pharmacist.nn.row_gradients import Tape
from pharmacist.selectors.base import RANKED, FloatArray, Scores, SelectionContext, Selector
from pharmacist.selectors.gradients import row_tape
from pharmacist.selectors.reading import read


@dataclass
class GraNdConfig(Checked):
    """Options of the selector."""

    by: Literal["head", "lora"] = "head"
    """Which weights the gradient is taken by: the output head's, in one forward pass, or those of a fresh LoRA adapter
    on all linear layers, in a forward and a backward pass."""
    keep: Literal["high", "low"] = "high"
    """Which rows rank first: those with the largest gradient, or the smallest."""
    r: AtLeast1 = 8
    """Rank of the LoRA adapter."""


class GraNdSelector(Selector):
    """Prefers rows whose loss has a large gradient: those that a step of training would learn most from.

    Rows with many tokens have smaller gradients, since their loss is a mean over tokens.
    """

    Config = GraNdConfig
    name = "grand"
    needs = frozenset({"model"})
    paper = "Paul et al. 2021, arXiv 2107.07075"

    def rank(self, context: SelectionContext) -> Scores:
        """Reads the pool once."""
        norms = self._by_adapter(context) if self.config.by == "lora" else _by_head(context.model.model)

        def measure(batch: Batch) -> dict[str, FloatArray]:
            return {"norm": norms(batch).cpu().numpy()}

        norm = read(context, context.encoded_pool, measure, f"grand-{self.config.by}")["norm"]
        score = norm if self.config.keep == "high" else -norm
        return Scores(score, np.full(len(score), RANKED), {"gradient_norm": norm})

    def _by_adapter(self, context: SelectionContext) -> Callable[[Batch], torch.Tensor]:
        # With its second factor 0 a fresh adapter's first factor has no gradient, and its first, drawn at random,
        # projects the gradient of the full weight.
        bank = AdapterBank(
            context.model.model,
            AdapterOptions(r=self.config.r, alpha=2 * self.config.r),
            derive(context.seed, "grand"),
        )
        return lambda batch: row_tape(bank, "start", batch).square_norms().sqrt()


def _by_head(model: nn.Module) -> Callable[[Batch], torch.Tensor]:
    head = output_head(model)
    if head is None:
        raise ConfigError("selector.by head: the model does not name its output head; take --selector.by lora")
    return lambda batch: head_tape(model, head, batch).square_norms().sqrt()


def head_tape(model: nn.Module, head: nn.Module, batch: Batch) -> Tape:
    """What the output head read, and the derivative of the summed row losses by what it put out.

    Where the head shares its weight with the embedding, the gradient is the head's part alone.

    Args:
        model: The model.
        head: Its output head, a linear layer.
        batch: The rows.
    """
    with torch.inference_mode(False), torch.no_grad():
        # Copies: autograd refuses tensors that were made in inference mode.
        batch = Batch(batch.input_ids.clone(), batch.lengths.clone(), batch.prompt_lengths.clone())

        def loss() -> torch.Tensor:
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            return row_losses(logits, batch.input_ids, batch.lengths, batch.prompt_lengths).completion.sum()

        with capture({"head": head}, inputs=True) as read_in:
            _, derivatives = activation_gradients({"head": head}, loss)
    return Tape({"head": read_in["head"].detach()}, derivatives)
