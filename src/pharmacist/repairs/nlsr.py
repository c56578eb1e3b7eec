"""NLSR: restore safety-critical neurons to their values in a safe reference model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from pharmacist.core.errors import CompatibilityError
from pharmacist.core.seeding import derive
from pharmacist.core.typed import Checked, NotNegative, Share
from pharmacist.nn.batching import Sequences
from pharmacist.nn.grads import replaced
from pharmacist.nn.lowrank import Factors, cosine
from pharmacist.repairs.base import Form, ModelWeights, Plan, References, Repair, Tensors, sum_over_inputs


_SHARED = 0.5
"""Least cosine between the factors of two adapters of which one was trained from the other."""


@dataclass
class NLSRConfig(Checked):
    """Options of NLSR."""

    beta: NotNegative = 0.9
    """Amplification of the reference: its update is multiplied by 1 + beta."""
    rank_share: Share = 0.8
    """Share of the rank of each matrix that its low-rank approximation keeps."""
    region: Share = 0.2
    """Share of the entries that make up the safety region."""
    prune_rate: Share = 0.5
    """Mean probability that a module's safety region is restored."""
    epsilon: NotNegative = 0.2
    """Spread of this probability around its mean; it is highest for the module least similar to the reference."""
    compat: Literal["none", "reference"] = "none"
    """reference: the published ranking, under which the most similar module is the most likely to be restored, and the
    published amplification, which multiplies the update by 4 * beta^2."""


def output_basis(weight: torch.Tensor, gram: torch.Tensor, share: float, *, of_outputs: bool = False) -> torch.Tensor:
    """The directions in which a matrix's outputs vary most, shape [out, q], orthonormal.

    They are the top eigenvectors of ``W G W^T``, where q = share * min(out, in), at least 1, and the Gram matrix G is
    ``sum x x^T`` over the inputs; with `of_outputs` it is that of the outputs already. With more outputs than inputs
    they are found by way of W = Q R, so that nothing is ever [out, out].
    """
    out, width = weight.shape
    keep = max(1, int(share * min(out, width) + 1e-9))
    basis, small = torch.linalg.qr(weight) if out > width and not of_outputs else (None, weight)
    varying = gram if of_outputs else small @ gram @ small.T
    vectors: torch.Tensor = torch.linalg.eigh(varying).eigenvectors[:, -keep:]
    return vectors if basis is None else basis @ vectors


def safety_region(weight: torch.Tensor, basis: torch.Tensor, region: float) -> torch.Tensor:
    """The largest entries of a matrix's projection onto an `output_basis`, bool of its shape [out, in].

    Exactly ``round(region * entries)`` of them; of equal ones the first.
    """
    size = (basis @ (basis.T @ weight)).abs().flatten()
    mask = torch.zeros_like(size, dtype=torch.bool)
    mask[size.argsort(descending=True, stable=True)[: max(1, int(region * len(size) + 0.5))]] = True
    return mask.view_as(weight)


def probabilities(
    similarities: Sequence[float], prune_rate: float, epsilon: float, *, inverted: bool = False
) -> list[float]:
    """Probability per module, linear in its rank from ``prune_rate + epsilon`` for the least similar down to
    ``prune_rate - epsilon``, clipped to [0, 1]; modules without a similarity rank as least similar.

    The similarity is a cosine; `inverted` is as published: highest for the most similar module.
    """
    n = len(similarities)
    order = np.argsort(np.nan_to_num(similarities, nan=-math.inf), kind="stable")
    spread = 1 - 2 * np.arange(n) / (n - 1) if n > 1 else np.zeros(n)
    chances = np.empty(n)
    chances[order[::-1] if inverted else order] = np.clip(prune_rate + epsilon * spread, 0, 1)
    return chances.tolist()


class NLSR(Repair):
    """Amplifies the aligned model, finds its safety region, and copies that region into modules that moved away.

    Entries of factors can be compared in a common basis only: the fine-tuned adapter must have been continued from the
    aligned one. For others there is ``--form weights``, which does the same with whole weights.

    Paper: Yi et al., "NLSR: Neuron-Level Safety Realignment of Large Language Models Against Harmful Fine-Tuning",
    AAAI 2025. One pass through the unchanged reference finds all regions; the paper projects layer after layer.
    """

    Config = NLSRConfig
    needs = frozenset({"aligned", "base", "safe"})
    paper = "arXiv 2412.12497"
    config: NLSRConfig

    def check(self, form: Form, *, continued: bool) -> None:
        """Refuses adapters without a common basis."""
        if form == "adapter" and not continued:
            raise CompatibilityError(
                "--method nlsr: the fine-tuned adapter was not continued from the aligned one, so their entries have "
                "no common meaning; give --form weights, or fine-tune with --adapter continue"
            )

    def plan(self, tuned: ModelWeights, references: References) -> Plan:
        """Finds safety regions in one pass over the safe rows, and draws the modules to restore by similarity."""
        aligned, update, safe, config = references.aligned, references.update, references.safe, self.config
        assert aligned is not None and update is not None and safe is not None
        if tuned.form == "adapter":
            _check_common_basis(tuned.factors(), aligned.factors())
        reference = self._amplified(aligned, update)
        masks = self._regions(aligned, reference, safe)
        own = {name: tensor.detach().double() for name, tensor in tuned.tensors().items() if name in reference}
        similar = self._similarities(aligned, own, reference, masks, update)
        published = config.compat == "reference"
        chances = probabilities([*similar.values()], config.prune_rate, config.epsilon, inverted=published)
        drawn = np.random.default_rng(derive(references.seed, "nlsr")).random(len(similar)) < chances
        new, findings = {}, []
        for (name, value), chance, picked in zip(similar.items(), chances, drawn.tolist(), strict=True):
            similarity = None if math.isnan(value) else round(value, 6)
            about = {"module": name, "similarity": similarity, "probability": round(chance, 6), "replaced": picked}
            findings.append(about)
            for tensor in (f"{name}.lora_A", f"{name}.lora_B") if tuned.form == "adapter" else (name,):
                if picked:
                    new[tensor] = torch.where(masks[tensor], reference[tensor], own[tensor])
        return Plan(new, findings)

    def _amplified(self, aligned: ModelWeights, update: Mapping[str, Factors]) -> Tensors:
        """Tensors of the aligned model, with its update of the base model multiplied by 1 + beta."""
        published = self.config.compat == "reference"
        factor = 4 * self.config.beta**2 if published else 1 + self.config.beta
        found = {name: tensor.detach().double() for name, tensor in aligned.tensors().items()}
        if aligned.form == "adapter":
            # As published both factors grow; here one of them does, so that entries of the other stay comparable.
            each = {"A": math.sqrt(factor), "B": math.sqrt(factor)} if published else {"A": 1.0, "B": factor}
            return {name: each[name[-1]] * tensor for name, tensor in found.items()}
        for name in found.keys() & update.keys():
            found[name] = found[name] + (factor - 1) * update[name].double().dense()
        return found

    def _regions(self, aligned: ModelWeights, reference: Tensors, safe: Sequences) -> Tensors:
        """Safety regions of the reference, on the completions of the safe rows."""

        def by_outputs(name: str) -> bool:
            # Of a factor with few outputs the Gram matrix of these: [r, r] instead of [in, in].
            return aligned.form == "adapter" and name.endswith(".lora_A")

        def gram(name: str, inputs: torch.Tensor) -> torch.Tensor:
            rows = inputs.double() @ reference[name].T if by_outputs(name) else inputs.double()
            return rows.T @ rows

        with torch.no_grad(), replaced(aligned.tensors(), reference):
            grams = sum_over_inputs(aligned, safe, gram, completion_only=True)
        share, region = self.config.rank_share, self.config.region
        return {
            name: safety_region(weight, output_basis(weight, grams[name], share, of_outputs=by_outputs(name)), region)
            for name, weight in reference.items()
        }

    def _similarities(
        self, aligned: ModelWeights, own: Tensors, reference: Tensors, masks: Tensors, update: Mapping[str, Factors]
    ) -> dict[str, float]:
        """Cosine per module between the fine-tuned and the reference model's weights in the safety region."""
        if aligned.form == "adapter":

            def kept(tensors: Tensors, name: str) -> Factors:
                a, b = f"{name}.lora_A", f"{name}.lora_B"
                return Factors(tensors[a] * masks[a], tensors[b] * masks[b])

            return {name: float(cosine(kept(own, name), kept(reference, name))) for name in aligned.factors()}
        weights, found = aligned.tensors(), {}
        for name in [name for name in own if name in update]:
            base = weights[name].detach().double() - update[name].double().dense()
            a, b = ((tensor - base)[masks[name]] for tensor in (own[name], reference[name]))
            found[name] = float(a @ b / (a.norm() * b.norm()))
        return found


def _check_common_basis(tuned: Mapping[str, Factors], aligned: Mapping[str, Factors]) -> None:
    """Refuses two adapters of different shapes, or of which neither was trained from the other."""
    shapes = [{name: (f.A.shape, f.B.shape) for name, f in factors.items()} for factors in (tuned, aligned)]
    if shapes[0] != shapes[1]:
        raise CompatibilityError("--aligned: its adapter has other modules or another rank than that of --model")
    cosines = []
    for name in tuned:
        a, b = (factors[name].A.detach().double().flatten() for factors in (tuned, aligned))
        cosines.append(functional.cosine_similarity(a, b, dim=0))
    mean = float(torch.stack(cosines).mean())
    if not mean > _SHARED:
        raise CompatibilityError(
            f"--aligned: the two adapters have no common basis (mean cosine of their factors A: {mean:.2f}); give the "
            "adapter that the fine-tuning started from, or --form weights"
        )
