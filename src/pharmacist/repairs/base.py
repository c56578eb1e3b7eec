"""What every repair is: a plan, computed without touching the model, and its application."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pharmacist.core.errors import NoMatchError
from pharmacist.core.method import Method
from pharmacist.nn.batching import Sequences, make_batch
from pharmacist.nn.hooks import evaluating, hooked
from pharmacist.nn.locate import linear_names
from pharmacist.nn.lowrank import Factors, adapter_factors, adapter_layers


Form = Literal["adapter", "weights"]
Tensors = dict[str, torch.Tensor]


@dataclass
class Side:
    """One of the models that a repair looks at.

    Attributes:
        model: In evaluation mode.
        form: ``adapter``: a PEFT model, only its factors count. ``weights``: its linear layers count.
    """

    model: nn.Module
    form: Form

    def factors(self) -> dict[str, Factors]:
        """Factors by module, in the form adapter."""
        return adapter_factors(self.model)

    def tensors(self) -> Tensors:
        """What may be changed: views of the parameters, shape [out, in] each.

        Of an adapter ``MODULE.lora_A`` and ``MODULE.lora_B``, else ``MODULE``.
        """
        return {name: _weight(module) for name, module in self.modules().items()}

    def modules(self) -> dict[str, nn.Module]:
        """The module of each of `tensors`, by the same name; its input is what the tensor is multiplied with."""
        if self.form == "weights":
            return {name: self.model.get_submodule(name) for name in linear_names(self.model)}
        found: dict[str, nn.Module] = {}
        for name, (a, b, _) in adapter_layers(self.model).items():
            found |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        return found


def _weight(module: Any) -> torch.Tensor:
    weight: torch.Tensor = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


@dataclass
class References:
    """What a repair may read besides the model.

    Attributes:
        aligned: The model before the fine-tuning, in the same form (an adapter of its own where `continued`).
        update: What alignment has added to the base, by module.
        harmful: Tokenised harmful rows of the defender.
        safe: Tokenised safe rows of the defender.
        continued: The fine-tuned adapter began as the aligned one, on the same base.
        device: Where the models are.
        seed: Of random draws.
    """

    aligned: Side | None = None
    update: Mapping[str, Factors] | None = None
    harmful: Sequences | None = None
    safe: Sequences | None = None
    continued: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0


@dataclass
class Plan:
    """New values of tensors as in `Side.tensors`, and what was found per module or tensor, for `repair.json`."""

    tensors: Tensors
    findings: list[dict[str, Any]]


@dataclass
class Change:
    """What became of a tensor: entries in all and changed, Frobenius norm before and after."""

    tensor: str
    entries: int
    changed: int
    norm_before: float
    norm_after: float


class Repair(Method, ABC):
    """Takes safety lost in fine-tuning back, without training.

    Attributes:
        needs: Of ``aligned``, ``base``, ``harmful`` and ``safe``, what must be given.
    """

    def check(self, form: Form, *, continued: bool) -> None:  # noqa: B027
        """Raises `CompatibilityError` on what it cannot repair, before any model is loaded; see `References`."""

    @abstractmethod
    def plan(self, tuned: Side, references: References) -> Plan:
        """Finds the new values; changes nothing.

        Raises:
            PharmacistError: The references do not fit.
        """


@torch.no_grad()
def apply(tuned: Side, plan: Plan) -> list[Change]:
    """Writes the new values.

    Raises:
        NoMatchError: Not a single entry changes. A repair that does nothing is never passed off as one.
    """
    tensors, changes = tuned.tensors(), []
    for name, value in plan.tensors.items():
        tensor = tensors[name]
        value = value.to(tensor.dtype).to(tensor.device)
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
def each_input(
    side: Side,
    rows: Sequences,
    see: Callable[[str, torch.Tensor], None],
    *,
    device: torch.device,
    completion_only: bool,
    rows_per_batch: int = 16,
) -> None:
    """Shows what every tensor of a model is multiplied with on some rows, by ordinary forward passes.

    It calls `see` with a tensor's name and inputs of shape [tokens, in], padding (and prompts) left out, and raises
    `NoMatchError` where a module was not run.
    """
    modules = side.modules()
    seen: set[str] = set()
    keep = torch.empty(0)

    def read(name: str, module: nn.Module, args: Sequence[torch.Tensor], kwargs: Any) -> None:
        seen.add(name)
        see(name, args[0][keep])

    with hooked(modules, read, before=True), evaluating(side.model):
        for start in range(0, len(rows.lengths), rows_per_batch):
            batch = make_batch(rows, range(start, min(start + rows_per_batch, len(rows.lengths))), device)
            mask = batch.attention_mask
            keep = mask.bool()
            if completion_only:
                position = torch.arange(mask.shape[1], device=device)[None, :]
                keep = keep & (position >= batch.prompt_lengths[:, None])
            side.model(input_ids=batch.input_ids, attention_mask=mask)
    missed = modules.keys() - seen
    if missed:
        raise NoMatchError(f"{min(missed)}: did not run in the forward pass")
