"""Auxiliary batches of a training: endless draws from a second set, and harmful partners of the main batch's rows."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Literal

import datasets
import numpy as np
import numpy.typing as npt
import torch

from pharmacist.core.env import process_index, world_size
from pharmacist.core.seeding import derive
from pharmacist.data.batches import collate
from pharmacist.data.normalise import prompt_key
from pharmacist.data.tokenize import Encoded


class EndlessRows(Iterator[dict[str, torch.Tensor]]):
    """Endless batches: every row once per round, in a fresh order each round, batches of exact size.

    The rows of a batch follow from seed and `position` (batches drawn so far) alone, so that a run that resumes at a
    position draws on as if nothing had happened. In a data-parallel run the processes share out each batch of
    ``processes x batch_size`` rows. `batch` makes a batch of row numbers.
    """

    def __init__(
        self, rows: int, batch_size: int, batch: Callable[[Sequence[int]], dict[str, torch.Tensor]], *, seed: int
    ) -> None:
        self.rows, self.batch_size, self.batch, self.seed = rows, batch_size, batch, seed
        self.position = 0
        self._order = lru_cache(2)(self._ordered)

    def __next__(self) -> dict[str, torch.Tensor]:
        size = self.batch_size * world_size()
        numbers = range(self.position * size + process_index(), (self.position + 1) * size, world_size())
        self.position += 1
        return self.batch([int(self._order(number // self.rows)[number % self.rows]) for number in numbers])

    def _ordered(self, turn: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng(derive(self.seed, "round", turn)).permutation(self.rows)


class SideStream(EndlessRows):
    """`EndlessRows` of tokenised rows, whose batches go to `device`."""

    def __init__(
        self, encoded: Encoded, batch_size: int, *, pad_token_id: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        batch = partial(_batch, encoded, pad_token_id=pad_token_id, device=device)
        super().__init__(len(encoded), batch_size, batch, seed=seed)


class PairedRows:
    """The harmful partner of each alignment row: same prompt, harmful answer. It holds no state.

    `partners` maps the number of an alignment row to the position of its partner in `encoded`, the harmful rows.
    """

    def __init__(
        self, encoded: Encoded, partners: Mapping[int, int], *, pad_token_id: int, device: torch.device | str = "cpu"
    ) -> None:
        self.partners = dict(partners)
        self._batch = partial(_batch, encoded, pad_token_id=pad_token_id, device=device)

    def __len__(self) -> int:
        return len(self.partners)

    def batch(self, rows: Sequence[int]) -> tuple[list[int], dict[str, torch.Tensor] | None]:
        """Which of some alignment rows have a partner (positions in `rows`), and the partners' batch if any has."""
        having = [position for position, row in enumerate(rows) if row in self.partners]
        partners = [self.partners[rows[position]] for position in having]
        return having, self._batch(partners) if having else None


def pair_rows(
    alignment: datasets.Dataset, harmful: datasets.Dataset, by: Literal["prompt", "row", "turn"]
) -> dict[int, int]:
    """Finds the harmful partner of each alignment row: ``row`` of an alignment row -> ``row`` of its partner.

    By ``prompt``: equal up to case, white space and final punctuation, with the same system prompt if there is such a
    row, else with any; where a prompt occurs several times, its n-th alignment row gets the n-th harmful row, over and
    over. By ``row``: equal row numbers. By ``turn``: the n-th
    alignment row gets the n-th harmful row, over and over, whatever their prompts.
    """
    rows, partners = alignment["row"][:], harmful["row"][:]
    if by == "turn":
        return dict(zip(rows, itertools.cycle(partners), strict=False))
    if by == "row":
        known = set(partners)
        return {row: row for row in rows if row in known}
    of_prompt = defaultdict[tuple[str, int], list[int]](list)
    for keys, partner in zip(_prompts(harmful), partners, strict=True):
        for key in keys:
            of_prompt[key].append(partner)
    turns = {key: itertools.cycle(found) for key, found in of_prompt.items()}
    pairs: dict[int, int] = {}
    for row, keys in zip(rows, _prompts(alignment), strict=True):
        if found := [turns[key] for key in keys if key in turns]:
            pairs[row] = next(found[0])
    return pairs


def _prompts(rows: datasets.Dataset) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    """Keys of each row's prompt, with and without system prompts."""
    for prompt, key in zip(rows["prompt"][:], rows["prompt_key"][:], strict=True):
        yield ("whole", prompt_key(prompt)), ("asked", key)


def _batch(
    encoded: Encoded, rows: Sequence[int], pad_token_id: int, device: torch.device | str
) -> dict[str, torch.Tensor]:
    items: list[dict[str, Any]] = [
        {"input_ids": ids, "n_prompt": int(encoded.prompt_lengths[row])}
        for row, ids in zip(rows, encoded.token_ids(rows), strict=True)
    ]
    return {name: tensor.to(device) for name, tensor in collate(items, pad_token_id).items()}
