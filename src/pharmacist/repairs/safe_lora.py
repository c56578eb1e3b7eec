"""Safe LoRA: project a user's update onto the subspace in which alignment has moved the model."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from pharmacist.core.errors import CompatibilityError, ConfigError, NoMatchError
from pharmacist.nn.lowrank import Factors, column_basis, cosine, norm
from pharmacist.repairs.base import Form, ModelWeights, Plan, References, Repair
from pharmacist.repairs.options import SafeLoraConfig


Kind = Literal["orthogonal", "paper", "trace"]


def project(update: Factors, columns: torch.Tensor, kind: Kind = "orthogonal") -> torch.Tensor:
    """``C X``, without forming the [out, out] matrix C.

    Args:
        update: V, the alignment's update of a weight, not 0.
        columns: X, shape [out, any].
        kind: ``orthogonal``: C = U U^T, U a basis of the column space of V. ``paper``: V V^T / |V|. ``trace``:
            V V^T / |V|^2.
    """
    if kind == "orthogonal":
        basis = column_basis(update)
        return basis @ (basis.T @ columns)
    size, left = norm(update), update.scale * update.B
    moved = left @ ((update.A @ update.A.T) @ (left.T @ columns))
    return moved / (size if kind == "paper" else size**2)


def similarity(own: Factors, projected: Factors) -> float:
    """Cosine of an update and its projection, in [0, 1]; NaN where one of them is 0."""
    return float(cosine(own, projected).clamp(0, 1))


def chosen(cosines: Sequence[float], config: SafeLoraConfig) -> list[int]:
    """Positions of the modules that are projected; those without a cosine never are, ties go to the first.

    A ConfigError where there are fewer modules than the number that is asked for.
    """
    known = [position for position, value in enumerate(cosines) if not math.isnan(value)]
    if config.select == "number":
        if config.number > len(known):
            raise ConfigError(
                f"safe-lora: number {config.number}: only {len(known)} modules have an update that can be projected; "
                "ask for at most as many"
            )
        return sorted(sorted(known, key=lambda position: cosines[position])[: config.number])
    return [position for position in known if cosines[position] <= config.threshold]


class SafeLora(Repair):
    """Projects a user's update onto the column space of the alignment update if it points away from it.

    It needs no data. It reads products of factors alone, so the factorisation does not matter.

    Paper: Hsu et al., "Safe LoRA: The Silver Lining of Reducing Safety Risks when Finetuning Large Language Models",
    NeurIPS 2024. Their matrix V V^T / |V| is no projector (`projector paper`).
    """

    Config = SafeLoraConfig
    needs = frozenset({"aligned", "base"})
    paper = "arXiv 2405.16833"
    config: SafeLoraConfig

    def check(self, form: Form, *, continued: bool) -> None:
        """Refuses an adapter that holds the alignment's update and the user's in one."""
        if form == "adapter" and continued:
            raise CompatibilityError(
                "--method safe-lora: the fine-tuned adapter holds alignment and user's update in one; give --form "
                "weights, or a fine-tuning with an adapter of its own on the aligned model"
            )

    def plan(self, tuned: ModelWeights, references: References) -> Plan:
        """Projects all modules' updates, and keeps those projections whose cosine is lowest."""
        assert references.update is not None
        updates = self._user_updates(tuned, references)
        names = [name for name in updates if name in references.update]
        if not names:
            raise NoMatchError("alignment and fine-tuning have no module in common, so there is nothing to project")
        projected, cosines = dict(updates), dict.fromkeys(names, math.nan)
        for name in names:
            own, alignment = updates[name], references.update[name].double()
            if float(norm(alignment)):
                projected[name] = replace(own, B=project(alignment, own.B, self.config.projector))
                cosines[name] = similarity(own, projected[name])
        picked = [names[position] for position in chosen([*cosines.values()], self.config)]
        if not picked:
            known = [value for value in cosines.values() if not math.isnan(value)]
            least = f"the lowest cosine is {min(known):.3f}" if known else "no update is other than 0"
            raise NoMatchError(f"safe-lora would project no module ({least}); raise --method.threshold")
        if tuned.form == "adapter":
            new = {f"{name}.lora_B": projected[name].B for name in picked}
        else:
            assert references.aligned is not None
            aligned = references.aligned.tensors()
            new = {name: aligned[name].detach().double() + projected[name].dense() for name in picked}
        findings = [
            {
                "module": name,
                "cosine": None if math.isnan(cosine) else round(cosine, 6),
                "projected": name in picked,
                "update_norm": float(norm(updates[name])),
                "kept_norm": float(norm((projected if name in picked else updates)[name])),
            }
            for name, cosine in cosines.items()
        ]
        return Plan(new, findings)

    def _user_updates(self, tuned: ModelWeights, references: References) -> dict[str, Factors]:
        """Fine-tuned minus aligned model, by module."""
        if tuned.form == "adapter":
            return {name: own.double() for name, own in tuned.factors().items()}
        assert references.aligned is not None
        aligned = references.aligned.tensors()
        found = {}
        for name, weight in tuned.tensors().items():
            difference = weight.detach().double() - aligned[name].detach().double()
            found[name] = Factors(torch.eye(weight.shape[1], dtype=torch.float64).to(difference.device), difference)
        return found
