"""Perplexity and instruction-following difficulty: selectors by the base model's losses of completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from pharmacist.core.typed import Checked
from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.nn.batching import Sequences
from pharmacist.nn.reading import read_row_losses
from pharmacist.selectors.base import RANKED, Scores, SelectionContext, Selector


NO_HELP = "prompt_does_not_help"
"""The reason of rows whose completion is likelier without its prompt."""


def completion_losses(context: SelectionContext, sequences: Sequences, name: str) -> FloatArray:
    """Mean cross-entropy of each row's completion tokens under the base model, in nats, shape [rows]."""
    model = context.model.model
    return context.read_numbers(sequences, lambda batch: read_row_losses(model, batch), name)


@dataclass
class PerplexityConfig(Checked):
    """Options of the selector."""

    keep: Literal["low", "middle", "high"] = "middle"
    """Which rows rank first: those with the lowest perplexity, those in the middle of the pool, or those with the
    highest."""


class PerplexitySelector(Selector):
    """Prefers a band of the completion's perplexity (exp of its mean cross-entropy), by default the middle."""

    Config = PerplexityConfig
    name = "perplexity"
    needs = frozenset({"model"})
    paper = "Marion et al. 2023, arXiv 2309.04564"

    def rank(self, context: SelectionContext) -> Scores:
        loss = completion_losses(context, context.encoded_pool, "losses")
        perplexity = np.exp(loss)
        # The middle is the median row, and distance from it a ratio: far too low is as far as far too high.
        score = {"low": -perplexity, "middle": -np.abs(loss - np.median(loss)), "high": perplexity}[self.config.keep]
        return Scores(score, signals={"perplexity": perplexity})


@dataclass
class IFDConfig(Checked):
    """Options of the selector."""

    most: float = 1.0
    """Rows with a larger ratio rank last, the largest at the very end; the paper's code drops rows above 1."""


class Alone:
    """Completions without their prompts, each after a start token (its id is `start`), so that the first token follows
    something; equal completions are equal rows.
    """

    def __init__(self, sequences: Sequences, start: int) -> None:
        self._sequences, self._start = sequences, np.array([start], dtype=np.int32)
        self.lengths = (sequences.lengths - sequences.prompt_lengths + 1).astype(np.int32)
        self.prompt_lengths = np.ones(len(self.lengths), dtype=np.int32)
        keys = (xxhash.xxh3_64_intdigest(self.token_ids([row])[0].tobytes()) for row in range(len(self.lengths)))
        self.content_keys = np.fromiter(keys, dtype=np.uint64, count=len(self.lengths))

    def token_ids(self, rows: Sequence[int] | IntArray) -> list[npt.NDArray[np.int32]]:
        """The token ids of some rows."""
        pairs = zip(self._sequences.token_ids(rows), self._sequences.prompt_lengths[np.asarray(rows)], strict=True)
        return [np.concatenate([self._start, tokens[prompt:]]) for tokens, prompt in pairs]


class IFDSelector(Selector):
    """Prefers completions that the prompt hardly helps to predict: mean loss given the prompt over mean loss without
    it.

    Refusals depend little on their prompt, so that many ratios lie near 1; the report says how many lie above.
    """

    Config = IFDConfig
    name = "ifd"
    needs = frozenset({"model"})
    paper = "Li et al. 2023, arXiv 2308.12032"

    def rank(self, context: SelectionContext) -> Scores:
        tokenizer = context.model.tokenizer
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        given = completion_losses(context, context.encoded_pool, "losses")
        alone = completion_losses(context, Alone(context.encoded_pool, start), "losses-alone")
        # A completion that the model is sure of either way (its rounded loss is 0) is not helped by the prompt.
        sure = alone == 0
        ratio = np.where(sure, 1.0, given / np.where(sure, 1.0, alone))
        last = ratio > self.config.most
        return Scores(
            np.where(last, -ratio, ratio),
            np.where(last, NO_HELP, RANKED),
            {"ifd": ratio, "loss": given, "loss_alone": alone},
            {"above_most": int(last.sum()), "most": self.config.most},
        )
