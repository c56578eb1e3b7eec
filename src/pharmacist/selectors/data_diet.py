"""EL2N and GraNd: how wrong the model is about a completion, and how long the row's gradient is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from pharmacist.core.errors import ConfigError
from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast1, Checked
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import Batch
from pharmacist.nn.hooks import activation_gradients, capture
from pharmacist.nn.locate import output_head
from pharmacist.nn.losses import mean_losses, precise, token_losses
from pharmacist.nn.row_gradients import Tape
from pharmacist.selectors.base import Scores, SelectionContext, Selector
from pharmacist.selectors.gradients import row_tape


@dataclass
class EL2NConfig(Checked):
    """Options of the selector."""

    keep: Literal["high", "low"] = "high"
    """Which rows rank first: those with the largest errors of the model, or the smallest."""


class EL2NSelector(Selector):
    """Prefers completions that the base model gets wrong: mean norm of the error p - y over their tokens."""

    Config = EL2NConfig
    name = "el2n"
    needs = frozenset({"model"})
    paper = "Paul et al. 2021, arXiv 2107.07075"

    def rank(self, context: SelectionContext) -> Scores:
        model = context.model.model

        def errors(batch: Batch) -> torch.Tensor:
            return error_norms(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits, batch)

        error = context.read_numbers(context.encoded_pool, errors, "el2n")
        return Scores.by_size(error, "error", largest=self.config.keep == "high")


def error_norms(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean over completion tokens of the length of p - y, p the prediction and y the token as a one-hot vector.

    Between 0, where the model is sure and right, and the root of 2, where it is sure and wrong. From logits of shape
    [rows, length, vocabulary]; shape [rows].
    """
    error = precise(logits[:, :-1]).softmax(-1)
    # Subtracted in place: the closed form sum p^2 - 2 p_y + 1 loses all digits where the model is nearly right.
    error.scatter_add_(-1, batch.input_ids[:, 1:, None], torch.full_like(error[..., :1], -1))
    return mean_losses(error.norm(dim=-1), batch.lengths, batch.prompt_lengths)


@dataclass
class GraNdConfig(Checked):
    """Options of the selector."""

    by: Literal["head", "lora"] = "head"
    """Weights of the gradient: those of the output head, in one forward pass, or those of a fresh LoRA adapter on all
    linear layers, in a forward and a backward pass."""
    keep: Literal["high", "low"] = "high"
    """Which rows rank first: those with the largest gradient, or the smallest."""
    r: AtLeast1 = 8
    """Rank of the LoRA adapter."""


class GraNdSelector(Selector):
    """Prefers rows whose loss has a large gradient, from which a training step would learn most.

    Rows with many tokens have smaller gradients, since their loss is a mean over tokens.
    """

    Config = GraNdConfig
    name = "grand"
    needs = frozenset({"model"})
    paper = "Paul et al. 2021, arXiv 2107.07075"

    def rank(self, context: SelectionContext) -> Scores:
        """Reads the pool once; no gradient is ever formed."""
        config, model = self.config, context.model.model
        tape: Callable[[Batch], Tape]
        if config.by == "lora":
            # With its second factor 0 a fresh adapter's first factor has no gradient, and its first, drawn at random,
            # projects the gradient of the full weight.
            options = AdapterOptions(r=config.r, alpha=2 * config.r)
            bank = AdapterBank(model, options, derive(context.seed, "grand"))
            tape = partial(row_tape, bank, "start")
        elif (head := output_head(model)) is not None:
            tape = partial(head_tape, model, head)
        else:
            raise ConfigError("selector.by head: the model does not name its output head; take --selector.by lora")

        def norms(batch: Batch) -> torch.Tensor:
            return tape(batch).square_norms().sqrt()

        name, backward = f"grand-{config.by}", config.by == "lora"
        size = context.read_numbers(context.encoded_pool, norms, name, backward=backward)
        return Scores.by_size(size, "gradient_norm", largest=config.keep == "high")


def head_tape(model: nn.Module, head: nn.Module, batch: Batch) -> Tape:
    """What a model's output head read, and the derivative of the summed row losses by what it put out.

    Where the head shares its weight with the embedding, the gradient is the head's part alone.
    """

    def loss() -> torch.Tensor:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        losses = token_losses(logits, batch.input_ids)
        return mean_losses(losses, batch.lengths, batch.prompt_lengths).sum()

    with capture({"head": head}, inputs=True) as read_in:
        _, derivatives = activation_gradients({"head": head}, loss)
    return Tape({"head": read_in["head"].detach()}, derivatives)
