"""EL2N: how far the model's predictions lie from the tokens of the completion. One forward pass."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pharmacist.nn.batching import Batch
from pharmacist.selectors.base import RANKED, FloatArray, Scores, SelectionContext, Selector
from pharmacist.selectors.reading import read


@dataclass
class EL2NConfig:
    """Options of the selector."""

    keep: Literal["high", "low"] = "high"
    """Which rows rank first: those that the model gets most wrong, or least."""


class EL2NSelector(Selector):
    """Prefers completions that the base model gets wrong: mean length of the error p - y over their tokens."""

    Config = EL2NConfig
    name = "el2n"
    needs = frozenset({"model"})
    paper = "Paul et al. 2021, arXiv 2107.07075"

    def rank(self, context: SelectionContext) -> Scores:
        """Reads the pool once."""
        model = context.model.model

        def measure(batch: Batch) -> dict[str, FloatArray]:
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            return {"error": error_norms(logits, batch).double().cpu().numpy()}

        error = read(context, context.encoded_pool, measure, "el2n")["error"]
        score = error if self.config.keep == "high" else -error
        return Scores(score, np.full(len(score), RANKED), {"error": error})


def error_norms(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean over completion tokens of the length of p - y, p the prediction and y the token as a one-hot vector.

    Between 0, where the model is sure and right, and the root of 2, where it is sure and wrong.

    Args:
        logits: Shape [rows, length, vocabulary].
        batch: The rows.

    Returns:
        Shape [rows].
    """
    logits = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    error = logits.softmax(-1)
    # Subtracted in place: the closed form sum p^2 - 2 p_y + 1 loses all digits where the model is nearly right.
    error.scatter_add_(-1, batch.input_ids[:, 1:, None], torch.full_like(error[..., :1], -1))
    position = torch.arange(1, batch.input_ids.shape[1], device=batch.input_ids.device)[None, :]
    counted = (position >= batch.prompt_lengths[:, None]) & (position < batch.lengths[:, None])
    return torch.where(counted, error.norm(dim=-1), 0.0).sum(1) / counted.sum(1)
