"""Pairs that several tests use."""

import numpy as np
import torch

from tests.support import toy
from tests.support.tiny import TokenRows


RNG = np.random.default_rng(0)


def tokens(n):
    return RNG.integers(1, toy.VOCABULARY, size=n).tolist()


PROMPTS = [tokens(n) for n in (3, 2, 4)]


SAFE = TokenRows([(prompt, tokens(n)) for prompt, n in zip(PROMPTS, (4, 5, 2), strict=True)])


HARMFUL = TokenRows([(prompt, tokens(n)) for prompt, n in zip(PROMPTS, (5, 3, 4), strict=True)])


ROWS = [10, 11, 12]


class Pairs:
    """Partners of rows; what `data.streams.PairedRows` is, with a batch made beforehand."""

    def __init__(self, known=ROWS, harmful=HARMFUL, pad=0, dtype=torch.int64):
        self.known, self.harmful, self.pad, self.dtype = known, harmful, pad, dtype

    def batch(self, rows):
        having = [position for position, row in enumerate(rows) if row in self.known]
        if not having:
            return having, None
        found = toy.batch(self.harmful, [self.known.index(rows[position]) for position in having], self.pad)
        return having, found | {"attention_mask": found["attention_mask"].to(self.dtype)}
