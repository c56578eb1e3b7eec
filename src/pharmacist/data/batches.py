"""Batches of tokenised rows: cutting by a token budget, padding and labels."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


IGNORED = -100
"""Label of positions without a target."""
TOKENS_PER_BATCH = 65_536
"""Most padded tokens of a batch, rows x longest row; of an answer's batch the new tokens count too."""


def cut(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[Any], tokens: int, most: int | None = None
) -> Iterator[npt.NDArray[np.int64]]:
    """Cuts rows into batches.

    Args:
        order: Row numbers, the longest row first, shape [rows].
        lengths: Tokens of every row, shape [all rows].
        tokens: Most padded tokens of a batch; a longer row is a batch by itself.
        most: Most rows of a batch.
    """
    start = 0
    while start < len(order):
        size = max(1, min(tokens // int(lengths[order[start]]), most or len(order)))
        yield order[start : start + size]
        start += size


def without_middle(ids: Sequence[int], length: int) -> list[int]:
    """Shortens a row to `length` ids by cutting from its middle, so that the frame of a prompt stays whole."""
    head = length // 2
    return [*ids[:head], *ids[len(ids) - (length - head) :]]


def pad(
    ids: Sequence[Sequence[int] | npt.NDArray[np.int32]], fill: int = 0, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads rows of ids with `fill` to the length of the longest: behind, or in front (`left`) for generation.

    Returns:
        Token ids, and 1 on tokens and 0 on padding: int64 of shape [rows, length].
    """
    shape = (len(ids), max(map(len, ids)))
    padded, mask = np.full(shape, fill, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for i, row in enumerate(ids):
        where = slice(shape[1] - len(row), None) if left else slice(len(row))
        padded[i, where], mask[i, where] = row, 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


def collate(items: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pads rows with ``input_ids`` and ``n_prompt`` on the right into a batch to train on.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape [rows, length]; a label is its token on the
        completion and its EOS, and `IGNORED` on prompt and padding, whatever the padding token is.
    """
    input_ids, attention_mask = pad([item["input_ids"] for item in items], pad_token_id)
    position = torch.arange(input_ids.shape[1])
    prompts = torch.tensor([int(item["n_prompt"]) for item in items])
    labels = input_ids.masked_fill((attention_mask == 0) | (position < prompts[:, None]), IGNORED)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
