"""Antidote: prune the weights that matter most for harmful rows."""

from dataclasses import dataclass
from typing import Literal

import torch

from pharmacist.core.typed import Checked, Share
from pharmacist.repairs.base import ModelWeights, Plan, References, Repair, sum_over_inputs


@dataclass
class AntidoteConfig(Checked):
    """Options of Antidote."""

    alpha: Share = 0.1
    """Share of entries that are pruned, in (0, 1], per row of a weight matrix or per factor of an adapter."""
    compat: Literal["none", "reference"] = "none"
    """reference: prune factors per row too, and round the number of pruned entries as the published code does, up to
    one more."""


def scores(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Wanda's score |W_ij| * |x_j|, shape [out, in], by the sums of squares per input over all tokens, shape [in]."""
    return weight.detach().double().abs() * squares.double().sqrt()


def bad_mask(score: torch.Tensor, alpha: float, compat: str = "none") -> torch.Tensor:
    """The entries of the largest scores in each row, ``round(alpha * in)`` of them, bool of the same shape.

    Masks are nested in `alpha`; of equal scores the first columns go first.
    """
    width = score.shape[1]
    count = width - int(width * (1 - alpha)) if compat == "reference" else int(alpha * width + 0.5)
    order = score.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, order[:, :count], True)


def factor_mask(score: torch.Tensor, alpha: float) -> torch.Tensor:
    """The ``round(alpha * entries)`` largest scores of a whole matrix, bool of the same shape, nested in `alpha`.

    A row of lora_B has only r entries, of which a small share would be none.
    """
    return bad_mask(score.reshape(1, -1), alpha).reshape(score.shape)


class Antidote(Repair):
    """Sets the entries that matter most for harmful rows to 0, in each row of a weight matrix or each adapter factor.

    Of an adapter both factors are pruned, each as a whole, never the weights of its base model; at alpha 1
    nothing of the adapter is left. The result depends on the factorisation, not on the product alone.

    Paper: Huang et al., "Antidote: Post-fine-tuning Safety Alignment for Large Language Models against Harmful
    Fine-tuning Attack", ICML 2025.
    """

    Config = AntidoteConfig
    needs = frozenset({"harmful"})
    paper = "arXiv 2408.09600"
    config: AntidoteConfig

    def plan(self, tuned: ModelWeights, references: References) -> Plan:
        """One forward pass over the harmful rows, and a sort per matrix."""
        assert references.harmful is not None
        squares = sum_over_inputs(tuned, references.harmful, lambda _, inputs: inputs.double().square().sum(0))
        new, findings = {}, []
        for name, weight in tuned.tensors().items():
            score, config = scores(weight, squares[name]), self.config
            by_rows = tuned.form == "weights" or config.compat == "reference"
            mask = bad_mask(score, config.alpha, config.compat) if by_rows else factor_mask(score, config.alpha)
            new[name] = weight.detach().masked_fill(mask, 0)
            findings.append({"tensor": name, "pruned": int((mask & (weight != 0)).sum())})
        return Plan(new, findings)
