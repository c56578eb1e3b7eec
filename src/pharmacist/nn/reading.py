"""Token losses of a forward pass that never holds the logits of all tokens, by far the largest tensor of a model.

The output head runs on the positions whose loss is needed, in parts, and losses are computed in even smaller parts, so
that logits in single precision stay in the cache.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional

from pharmacist.data.batches import TOKENS_PER_BATCH
from pharmacist.nn.batching import Batch
from pharmacist.nn.hooks import capture, evaluating, head_at, head_gets
from pharmacist.nn.locate import output_head
from pharmacist.nn.losses import mean_losses, target_losses, token_losses


_LARGE = 2**14
"""Vocabulary from which on logits are computed in parts; smaller ones are a small share of a pass."""
_LOGITS = {"cpu": (2**24, 2**18), "cuda": (2**28, 2**28)}
"""Logits that the head computes at a time, and of which losses are computed at a time. On a CPU (SmolLM2, bfloat16)
head and losses together then take half the time that they take on a whole batch."""
_LOGITS_TO_DERIVE = {"cpu": 2**22, "cuda": 2**28}
"""Logits that are computed and differentiated at a time. On a CPU, the allocator would get the memory of many more
from the system each time anew."""
_HEAD_IS_LAST: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()
"""Output head -> whether its results are the model's logits, neither capped nor scaled."""


def tokens_per_batch(model: Any, device: torch.device) -> int:
    """Padded tokens per batch, such that all logits at once fit into memory where the vocabulary is not large.

    On a CPU no pass is faster with more tokens than the minimum (`benchmarks/throughput.py`).
    """
    budget = 2**25 if device.type == "cpu" else 2**30
    return max(1024, min(TOKENS_PER_BATCH, budget // int(getattr(model.config, "vocab_size", 32768))))


def large_head(model: nn.Module) -> nn.Module | None:
    """The output head of a model whose vocabulary is so large that logits should be computed in parts; else None."""
    head = output_head(model)
    return None if head is None or int(getattr(head, "out_features", 0)) < _LARGE else head


def head_is_last(head: nn.Module, model: nn.Module) -> bool:
    """Whether what a model's output head gives are its logits, neither capped nor scaled; by a pass over a token."""
    if head not in _HEAD_IS_LAST:
        ones = head_gets(head, torch.ones_like)  # a padding token may have states of 0, which no scale changes
        with torch.no_grad(), evaluating(model), ones, capture({"head": head}, inputs=True) as seen:
            logits = _of_one_token(model)
            _HEAD_IS_LAST[head] = torch.equal(head(seen["head"]), logits)
    return _HEAD_IS_LAST[head]


def logits_from(model: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Logits of what the output head gets, as the model computes them: where it caps or scales those of its head, too.

    In that case the model reads a single token, and its head gets the states, of shape [positions, width], instead.
    """
    head = output_head(model)
    assert head is not None
    if head_is_last(head, model):
        logits: torch.Tensor = head(states)
        return logits
    with head_gets(head, lambda own: states):
        return _of_one_token(model)


def _of_one_token(model: nn.Module) -> torch.Tensor:
    ids = torch.zeros((1, 1), dtype=torch.long, device=next(model.parameters()).device)
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits


def derived_at_a_time(model: nn.Module, device: torch.device) -> int | None:
    """Positions whose logits are best computed and differentiated at a time; None for all of them.

    All of them also where each call of `logits_from` takes a pass of the whole model.
    """
    head = large_head(model)
    if head is None or not head_is_last(head, model):
        return None
    return max(1, _LOGITS_TO_DERIVE[device.type] // int(getattr(head, "out_features", 1)))


def read_losses(model: nn.Module, batch: Batch, *, prompt: bool = True, **options: Any) -> tuple[torch.Tensor, Any]:
    """Cross-entropy of each token given the tokens before it, by one forward pass of a causal language model.

    Without `prompt` the losses of prompt tokens may be 0. `options` are those of the forward pass, such as
    ``output_hidden_states``.

    Returns:
        Losses, shape [rows, length - 1], entry t of token t + 1, where padding may be 0; and the model's output, which
        may lack ``logits``.
    """

    def forward() -> Any:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)

    head = large_head(model)
    if head is None:
        output = forward()
        return token_losses(output.logits, batch.input_ids), output
    position = torch.arange(1, batch.input_ids.shape[1], device=batch.input_ids.device)[None, :]
    needed = position < batch.lengths[:, None]
    if not prompt:
        needed &= position >= batch.prompt_lengths[:, None]
    tokens = batch.input_ids[:, 1:][needed]
    if torch.is_grad_enabled() or not head_is_last(head, model):
        with head_at(head, functional.pad(needed, (0, 1))):
            output = forward()
        losses = target_losses(output.logits, tokens)
    else:
        nowhere = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        with capture({"head": head}, inputs=True) as seen, head_at(head, nowhere):
            output = forward()
        losses = _losses_in_parts(head, seen["head"][:, :-1][needed], tokens)
    return losses.new_zeros(needed.shape).masked_scatter(needed, losses), output


def _losses_in_parts(head: nn.Module, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    some, few = (max(1, n // int(getattr(head, "out_features", 1))) for n in _LOGITS[tokens.device.type])
    parts = [
        target_losses(logits, following)
        for part, of_part in zip(states.split(some), tokens.split(some), strict=True)  # type: ignore[no-untyped-call]
        for logits, following in zip(head(part).split(few), of_part.split(few), strict=True)
    ]
    return torch.cat(parts)


def read_row_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean completion losses of a batch's rows; the logits of prompts are not computed."""
    losses, _ = read_losses(model, batch, prompt=False)
    return mean_losses(losses, batch.lengths, batch.prompt_lengths)
