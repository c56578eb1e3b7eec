"""Base of all repairs: new weights are planned without touching the model, then written into it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pharmacist.core.errors import CompatibilityError, NoMatchError
from pharmacist.core.method import Method
from pharmacist.nn.batching import Sequences, make_batch
from pharmacist.nn.hooks import evaluating, hooked
from pharmacist.nn.locate import linear_names, output_head
from pharmacist.nn.lowrank import Factors, adapter_factors, adapter_layers


Form = Literal["adapter", "weights"]
Tensors = dict[str, torch.Tensor]
_UNREACHED = 0.5
"""Share of the weights, in no linear layer, above which a model is not repaired."""


@dataclass
class ModelWeights:
    """The weights of a model that a repair compares or changes.

    Attributes:
        model: In evaluation mode.
        form: ``adapter``: the factors of a PEFT model's adapter. ``weights``: the weights of the linear layers.

    Raises:
        CompatibilityError: Weights are quantised, or most of them are in no linear layer, so that a repair would leave
            them as they are.
    """

    model: nn.Module
    form: Form

    def __post_init__(self) -> None:
        if self.form == "adapter":
            return
        for name, tensor in self.tensors().items():
            if not tensor.is_floating_point():
                raise CompatibilityError(f"{name} is quantised; give the model in float32 or bfloat16 to repair it")
        if (share := self.unreached()) > _UNREACHED:
            raise CompatibilityError(
                f"--form weights repairs linear layers, and {share:.0%} of the weights between embeddings and output "
                "head are in none (experts in one tensor): the repair would leave them as they are"
            )

    def unreached(self) -> float:
        """Share of the weights between embeddings and output head that are not among `tensors`."""
        ends = [part for part in self.model.modules() if isinstance(part, nn.Embedding)] + [output_head(self.model)]
        inner = set(self.model.parameters()) - {
            weight for part in ends if part is not None for weight in part.parameters()
        }
        reached = sum(tensor.numel() for tensor in self.tensors().values())
        return 1 - reached / sum(weight.numel() for weight in inner)

    def factors(self) -> dict[str, Factors]:
        """Factors of the adapter by module, in the form ``adapter``."""
        return adapter_factors(self.model)

    def tensors(self) -> Tensors:
        """Views of the weights by name, shape [out, in] each.

        In the form ``adapter`` the names are ``MODULE.lora_A`` and ``MODULE.lora_B``, else ``MODULE``.
        """
        modules: dict[str, Any] = self.modules()
        return {name: m.weight.T if isinstance(m, Conv1D) else m.weight for name, m in modules.items()}

    def modules(self) -> dict[str, nn.Module]:
        """The module of each of `tensors`, by the same name, whose input the tensor is multiplied with."""
        if self.form == "weights":
            return {name: self.model.get_submodule(name) for name in linear_names(self.model)}
        found: dict[str, nn.Module] = {}
        for name, (a, b, _) in adapter_layers(self.model).items():
            found |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        return found


@dataclass
class References:
    """Models and rows that a repair may read besides the fine-tuned model.

    Attributes:
        aligned: The model before the fine-tuning, in the same form.
        update: The update of the alignment, aligned minus base model, by module.
        harmful: Tokenised harmful rows of the defender.
        safe: Tokenised safe rows of the defender.
        seed: Of random draws.
    """

    aligned: ModelWeights | None = None
    update: Mapping[str, Factors] | None = None
    harmful: Sequences | None = None
    safe: Sequences | None = None
    seed: int = 0


@dataclass
class Plan:
    """New values of some of `ModelWeights.tensors`, and findings per module or tensor for ``repair.json``."""

    tensors: Tensors
    findings: list[dict[str, Any]]


@dataclass
class Change:
    """Change of a tensor: number of entries, how many of them changed, Frobenius norm before and after."""

    tensor: str
    entries: int
    changed: int
    norm_before: float
    norm_after: float


class Repair(Method, ABC):
    """A post-fine-tuning defense: restores safety lost in fine-tuning, without training.

    Attributes:
        needs: Which of ``aligned``, ``base``, ``harmful`` and ``safe`` it reads.
    """

    def check(self, form: Form, *, continued: bool) -> None:  # noqa: B027
        """Refuses models that it cannot repair, before any is loaded.

        Args:
            form: As in `ModelWeights`.
            continued: Whether the fine-tuned adapter was trained on from the aligned one, on the same base model.

        Raises:
            CompatibilityError: It cannot repair them.
        """

    @abstractmethod
    def plan(self, tuned: ModelWeights, references: References) -> Plan:
        """Computes the new weights; changes nothing.

        Args:
            tuned: The fine-tuned model.
            references: All that the repair `needs`.

        Raises:
            PharmacistError: The references do not fit.
        """


@torch.no_grad()
def apply(tuned: ModelWeights, plan: Plan) -> list[Change]:
    """Writes the planned values into the model; a NoMatchError if no entry would change, or a value is not finite."""
    tensors, changes = tuned.tensors(), []
    for name, value in plan.tensors.items():
        tensor = tensors[name]
        value = value.to(tensor)
        if not torch.isfinite(value).all():
            raise NoMatchError(f"{name}: the repaired values are not finite; the models cannot be repaired like this")
        changed = int((value != tensor).sum())
        before, after = float(tensor.float().norm()), float(value.float().norm())
        changes.append(Change(name, tensor.numel(), changed, before, after))
    if not any(change.changed for change in changes):
        raise NoMatchError("the repair would not change a single weight; look at its options and at the models given")
    for name, value in plan.tensors.items():
        tensors[name].copy_(value)
    return changes


@torch.no_grad()
def sum_over_inputs(
    weights: ModelWeights,
    rows: Sequences,
    statistic: Callable[[str, torch.Tensor], torch.Tensor],
    *,
    completion_only: bool = False,
    rows_per_batch: int = 16,
) -> Tensors:
    """Sums a statistic of the inputs that each tensor is multiplied with, over some rows, by ordinary forward passes.

    Args:
        weights: The model.
        rows: Tokenised rows.
        statistic: Name of a tensor and its inputs, shape [tokens, in], padding left out -> summand of any shape.
        completion_only: Leave the tokens of prompts out too.
        rows_per_batch: Rows per forward pass.

    Returns:
        One sum for each of `ModelWeights.tensors`.

    Raises:
        NoMatchError: A module was not run.
    """
    modules, device = weights.modules(), next(weights.model.parameters()).device
    sums: Tensors = {}
    keep = torch.empty(0)

    def add(name: str, module: nn.Module, args: Sequence[torch.Tensor], kwargs: Any) -> None:
        found = statistic(name, args[0].flatten(0, -2)[keep])  # OPT's feed-forward layers see all tokens in one row
        sums[name] = sums[name] + found if name in sums else found

    with hooked(modules, add, before=True), evaluating(weights.model):
        for start in range(0, len(rows.lengths), rows_per_batch):
            batch = make_batch(rows, range(start, min(start + rows_per_batch, len(rows.lengths))), device)
            mask = batch.attention_mask
            keep = mask.bool()
            if completion_only:
                position = torch.arange(mask.shape[1], device=device)[None, :]
                keep = keep & (position >= batch.prompt_lengths[:, None])
            keep = keep.flatten()
            weights.model(input_ids=batch.input_ids, attention_mask=mask)
    missed = modules.keys() - sums.keys()
    if missed:
        raise NoMatchError(f"{min(missed)}: did not run in the forward pass")
    return sums
