"""Token sequences, batches of them, and the order in which a pass reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pharmacist.core.seeding import derive
from pharmacist.data.arrays import IntArray
from pharmacist.data.batches import cut, pad


class Sequences(Protocol):
    """Interface of tokenised rows, such as `data.tokenize.Encoded`.

    Attributes:
        lengths: Tokens per row, shape [rows].
        prompt_lengths: Tokens before the completion, shape [rows].
        content_keys: 64-bit hash of each row's tokens and prompt length, equal for equal rows, shape [rows].
    """

    lengths: npt.NDArray[np.int32]
    prompt_lengths: npt.NDArray[np.int32]
    content_keys: npt.NDArray[np.uint64]

    def token_ids(self, rows: Sequence[int] | IntArray) -> list[npt.NDArray[np.int32]]:
        """The token ids of some rows."""


@dataclass(frozen=True)
class Batch:
    """A right-padded batch on a device.

    Attributes:
        input_ids: Shape [rows, length].
        lengths: Tokens without padding, shape [rows].
        prompt_lengths: Tokens before the completion, shape [rows].
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    prompt_lengths: torch.Tensor

    @property
    def attention_mask(self) -> torch.Tensor:
        """1 on tokens and 0 on padding, shape [rows, length]; from the lengths, never from the padding id."""
        position = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return (position[None, :] < self.lengths[:, None]).long()

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.lengths.sum())


def make_batch(sequences: Sequences, rows: Sequence[int] | IntArray, device: torch.device) -> Batch:
    """Pads some rows into a batch. The padding id is 0; no mask ever depends on it."""
    ids, mask = pad(sequences.token_ids(rows))
    prompts = torch.from_numpy(sequences.prompt_lengths[np.asarray(rows)].astype(np.int64))
    return Batch(*(tensor.to(device) for tensor in (ids, mask.sum(1), prompts)))


@dataclass(frozen=True)
class PassPlan:
    """The batches of a pass over some rows.

    Equal rows are read once, and batches depend on content alone, so that neither duplicates nor the order of the
    input can change a score.

    Attributes:
        batches: Row numbers per batch; one representative of all equal rows.
        representative: For each row the equal row that is read, shape [rows].
    """

    batches: list[IntArray]
    representative: IntArray


def plan_pass(sequences: Sequences, tokens_per_batch: int, rows: IntArray | None = None) -> PassPlan:
    """Orders rows by length (ties by content) and cuts them into batches of at most `tokens_per_batch` padded tokens.

    A longer row is a batch by itself. Only `rows` are read, by default all.
    """
    keys = sequences.content_keys
    chosen = np.arange(len(keys), dtype=np.int64) if rows is None else np.asarray(rows, dtype=np.int64)
    _, first, inverse = np.unique(keys[chosen], return_index=True, return_inverse=True)
    representative = np.arange(len(keys), dtype=np.int64)
    representative[chosen] = chosen[first][inverse]
    distinct = chosen[first]
    lengths = sequences.lengths[distinct].astype(np.int64)
    order = distinct[np.lexsort((keys[distinct], -lengths))]
    return PassPlan(list(cut(order, sequences.lengths, tokens_per_batch)), representative)


def batch_stream(n: int, batch_size: int, steps: int, seed: int) -> IntArray:
    """Row numbers for every step, shape [steps, batch_size]: reshuffled each time all n rows were used.

    The same seed gives the same order for every set of n rows, so that two sets differ in their rows alone.
    """
    needed = steps * batch_size
    epochs = range(-(-needed // n))
    order = [np.random.default_rng(derive(seed, "batches", epoch)).permutation(n) for epoch in epochs]
    return np.concatenate(order)[:needed].reshape(steps, batch_size).astype(np.int64)
