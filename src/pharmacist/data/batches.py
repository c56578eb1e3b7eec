"""Batches of tokenised rows: which rows go together, and how they are padded; for passes, training and generation."""

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
    """Cuts rows into batches of at most so many padded tokens; a single longer row makes a batch of its own.

    Args:
        order: Row numbers, the longest row first.
        lengths: Tokens per row, shape [all rows].
        tokens: Upper bound of rows x longest row.
        most: Upper bound of rows.
    """
    start = 0
    while start < len(order):
        size = max(1, min(tokens // int(lengths[order[start]]), most or len(order)))
        yield order[start : start + size]
        start += size


def without_middle(ids: Sequence[int], length: int) -> list[int]:
    """The first and the last ids of a row, so many in all: what frames a prompt stays whole."""
    head = length // 2
    return [*ids[:head], *ids[len(ids) - (length - head) :]]


def pad(
    ids: Sequence[Sequence[int] | npt.NDArray[np.int32]], fill: int = 0, *, left: bool = False, multiple_of: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads rows to the length of the longest, or the next multiple of `multiple_of`.

    Args:
        ids: Token ids of each row.
        fill: Stands on padding; no mask ever depends on it.
        left: Whether padding goes in front, as generation needs it, and not behind.
        multiple_of: Of which the padded length is a multiple.

    Returns:
        Token ids, and 1 on tokens and 0 on padding: int64 of shape [rows, length].
    """
    shape = (len(ids), -(-max(map(len, ids)) // multiple_of) * multiple_of)
    padded, mask = np.full(shape, fill, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for i, row in enumerate(ids):
        where = slice(shape[1] - len(row), None) if left else slice(len(row))
        padded[i, where], mask[i, where] = row, 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


def collate(items: Sequence[Mapping[str, Any]], pad_token_id: int, multiple_of: int = 1) -> dict[str, torch.Tensor]:
    """Pads rows on the right into a batch to train on.

    Args:
        items: Rows with ``input_ids`` and ``n_prompt``.
        pad_token_id: Fills `input_ids`; masks and labels never depend on it.
        multiple_of: The padded length is a multiple of this.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape [rows, length]; a label is its token on the
        completion and its EOS, and `IGNORED` on prompt and padding.
    """
    input_ids, attention_mask = pad([item["input_ids"] for item in items], pad_token_id, multiple_of=multiple_of)
    position = torch.arange(input_ids.shape[1])
    prompts = torch.tensor([int(item["n_prompt"]) for item in items])
    labels = input_ids.masked_fill((attention_mask == 0) | (position < prompts[:, None]), IGNORED)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
