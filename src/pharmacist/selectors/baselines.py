"""Baselines that any selector must beat: everything, a random order, and the length of completions."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from pharmacist.core.seeding import derive
from pharmacist.core.typed import Checked
from pharmacist.data.arrays import FloatArray
from pharmacist.selectors.base import Scores, SelectionContext, Selector


if TYPE_CHECKING:
    import datasets


class FullSelector(Selector):
    """Equal scores; ties keep the input order. Use it with ``--top 1``."""

    name = "full"
    paper = "baseline"
    keeps_all = True

    def rank(self, context: SelectionContext) -> Scores:
        return Scores(np.zeros(len(context.pool)))


@dataclass
class RandomConfig(Checked):
    """The order follows from the run's seed."""

    draw: int = 0
    """Number of the random order, for several orders with the same seed."""


class RandomSelector(Selector):
    """Uniform random scores, which depend on content and not on order; copies of a row get different scores."""

    Config = RandomConfig
    name = "random"
    paper = "baseline"
    is_random = True

    def rank(self, context: SelectionContext) -> Scores:
        draw = [self.config.draw] if self.config.draw else []
        return Scores(draws(context.pool.dataset, derive(context.seed, "random", "scores", *draw)))


def draws(rows: "datasets.Dataset", seed: int) -> FloatArray:
    """Uniform numbers in [0, 1) by content, whatever the order of the rows; copies of a row draw different ones."""
    copies, drawn = Counter[int](), np.empty(len(rows))
    for position, key in enumerate(text_hashes(rows, seed).tolist()):
        copy = xxhash.xxh3_64_intdigest(key.to_bytes(8, "big"), seed=copies[key])
        copies[key] += 1
        drawn[position] = (copy >> 11) / 2**53
    return drawn


def text_hashes(rows: "datasets.Dataset", seed: int = 0) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each row's texts, shape [rows]."""
    batches = rows.select_columns(["prompt", "completion"]).iter(4096)
    pairs = (pair for batch in batches for pair in zip(batch["prompt"], batch["completion"], strict=True))
    texts = ("\x1f".join(pair).encode("utf-8", "surrogatepass") for pair in pairs)
    return np.fromiter((xxhash.xxh3_64_intdigest(text, seed=seed) for text in texts), np.uint64, len(rows))


@dataclass
class LengthConfig(Checked):
    """Options of the selector."""

    keep: Literal["longest", "shortest"] = "longest"
    """Which completions rank first."""


class LengthSelector(Selector):
    """Prefers long (or short) completions, in characters. Needs neither model nor references."""

    Config = LengthConfig
    name = "length"
    paper = "Zhao et al. 2024, arXiv 2402.04833 (longest)"

    def rank(self, context: SelectionContext) -> Scores:
        batches = context.pool.dataset.select_columns(["completion"]).iter(4096)
        characters = np.array([len(text) for batch in batches for text in batch["completion"]], dtype=np.int64)
        return Scores.by_size(characters, "characters", largest=self.config.keep == "longest")
