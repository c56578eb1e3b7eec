"""Adapters merged into weights, with a check of the result, and stacked LoRA adapters joined into a single one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from pharmacist.core.errors import CompatibilityError, DataError, one_line
from pharmacist.core.files import read_json, write_json
from pharmacist.nn.libraries import failures_as
from pharmacist.nn.lowrank import Factors, adapter_factors


STACK_FILE = "pharmacist_stack.json"

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative error of logits up to which merging is rounding, `_ROUNDING` for shorter number formats."""
_ROUNDING = 0.1
_PREFIX = "base_model.model."
_LAST = ("r", "lora_alpha", "lora_dropout", "target_modules", "fan_in_fan_out")
_SELECTIVE = ("use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules")
"""Settings that a stack leaves out: what they do is written as its rank, its scale and the full names of modules."""


@dataclass(frozen=True)
class MergedBase:
    """A plain base model and the LoRA adapters that are merged into it: what a new adapter is trained on.

    Attributes:
        name: Hub id or folder of the plain base model, which any tool finds; None where there is none: whole weights
            in an earlier run's folder, or an adapter that is more than LoRA on linear layers.
        factors: Update of the merged adapters, by module.
        fingerprint: Of the model that the adapter was trained on, where the adapter is part of a stack.
    """

    name: str | None = None
    factors: Mapping[str, Factors] = field(default_factory=dict)
    fingerprint: str | None = None


def merge_adapter(model: PeftModel, name: str) -> PreTrainedModel:
    """Merges an adapter into the weights of its base model.

    An output head that shares its weight with the input embedding gets a weight of its own first where the adapter
    acts on one of the two. Quantised weights are dequantised first, for the update would be lost in those that are
    quantised again. The model must be in evaluation mode and is used up; messages call the adapter `name`.

    Raises:
        CompatibilityError: The adapter cannot be merged, or the merged model gives other logits.
    """
    kind = str(model.active_peft_config.peft_type).rpartition(".")[2]
    refusal = f"{name}: this kind of adapter ({kind.lower().replace('_', ' ')}) cannot be merged into its base model"
    quantised = getattr(model.get_base_model(), "is_quantized", False)
    _untie(model)
    before = _logits(model)
    remedy = "merge it with the tool that made it"
    with failures_as(CompatibilityError, lambda error: f"{refusal} ({one_line(error)}); {remedy}"):
        merged: PreTrainedModel = (_dequantised(model) if quantised else model).merge_and_unload()
    merged.__dict__.pop("peft_config", None)  # PEFT 0.18 leaves it, and takes the next adapter for a second one
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        for config in {id(c): c for c in (merged.config, merged.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    # The median, as single tokens may be sent to other experts by rounding alone.
    change = (_logits(merged) - before).norm(dim=-1).median() / before.norm(dim=-1).mean().clamp(min=1e-6)
    if not change <= (_ROUNDING if quantised else _TOLERANCE.get(merged.dtype, _ROUNDING)):
        raise CompatibilityError(f"{refusal}: logits change by {100 * float(change):.0f} %; merge it by other means")
    return merged


def _dequantised(model: PeftModel) -> PeftModel:
    """The model, which is used up, with its adapter on dequantised weights."""
    config, weights = model.active_peft_config, get_peft_model_state_dict(model)
    base = model.unload()
    dtype = base.dtype  # of the weights that are not quantised, whatever the model was loaded for
    found: PeftModel = get_peft_model(base.dequantize(dtype).to(dtype), config)
    set_peft_model_state_dict(found, weights)
    return found.eval()


def _untie(model: PeftModel) -> None:
    """Gives head and embedding weights of their own where they share one and the adapter acts on either."""
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    plain, kinds = [_plain(layer) for layer in (head, embedding)], (BaseTunerLayer, ModulesToSaveWrapper)
    touched = isinstance(head, kinds) or isinstance(embedding, kinds)
    if touched and None not in plain and plain[0].weight is plain[1].weight:
        plain[0].weight = nn.Parameter(plain[0].weight.detach().clone(), requires_grad=plain[0].weight.requires_grad)


def _plain(layer: Any) -> Any:
    """The layer of the base model within PEFT's wrapper."""
    if isinstance(layer, ModulesToSaveWrapper):
        return layer.original_module
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    """Logits of a few tokens from all over the vocabulary, shape [1, 8, vocabulary], in float32."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    weight = _plain(base.get_input_embeddings()).weight
    ids = torch.linspace(0, weight.shape[0] - 1, 8, device=weight.device).long()[None]
    found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    return found


def is_lora(model: PeftModel, names: Iterable[str] | None = None) -> bool:
    """Whether an adapter is LoRA on linear layers and nothing else, by its settings and its tensors' names."""
    config = model.active_peft_config
    names = get_peft_model_state_dict(model, save_embedding_layers=False) if names is None else names
    simple = config.peft_type == PeftType.LORA and str(config.init_lora_weights) in ("True", "False", "gaussian")
    other = ("layer_replication", "alora_invocation_tokens", "target_parameters", "use_dora", "use_qalora")
    return (
        simple
        and all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
        and not any(getattr(config, name, None) for name in other)
    )


def lora_factors(model: PeftModel, folder: Path) -> dict[str, Factors] | None:
    """Copies on the CPU of the factors of an adapter that was loaded from a folder; None if it is no plain LoRA."""
    if not is_lora(model, load_peft_weights(str(folder), device="cpu")):
        return None
    return {name: _copy(own, own.A, own.B) for name, own in adapter_factors(model).items()}


def _copy(own: Factors, a: torch.Tensor, b: torch.Tensor) -> Factors:
    a, b = (tensor.detach().to("cpu", torch.float32, copy=True) for tensor in (a, b))
    return replace(own, A=a, B=b)


def stack(first: Mapping[str, Factors], last: Mapping[str, Factors]) -> dict[str, Factors]:
    """One adapter whose update is the sum of two; the factors of the last are its last rows (A) and columns (B).

    All modules get the same rank, filled up with 0, and the same scale, that of the last.
    """
    ranks = [max((own.A.shape[0] for own in part.values()), default=0) for part in (first, last)]
    scale = next(iter(last.values())).scale
    found: dict[str, Factors] = {}
    for part, start in ((first, 0), (last, ranks[0])):
        for name, own in part.items():
            if name not in found:
                shapes = (sum(ranks), own.A.shape[1]), (own.B.shape[0], sum(ranks))
                found[name] = Factors(torch.zeros(shapes[0]), torch.zeros(shapes[1]), scale)
            rows = slice(start, start + own.A.shape[0])
            found[name].A[rows] = own.A.detach().cpu()
            found[name].B[:, rows] = own.B.detach().cpu() * (own.scale / scale)
    return found


def save_stacked(model: PeftModel, base: MergedBase, folder: Path, fingerprint: str) -> None:
    """Writes a plain LoRA adapter and those merged into its base as one PEFT adapter on the plain base model.

    `model` has the adapter that was trained last, on `base`, a model of this `fingerprint`. The folder gets the files
    of PEFT, and `STACK_FILE`, by which `split` tells the last adapter from the others.
    """
    config, last = model.active_peft_config, adapter_factors(model)
    stacked = stack(base.factors, last)
    rank = next(iter(stacked.values())).A.shape[0]
    targets = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    trained_last = {name: getattr(config, name) for name in _LAST} | {"target_modules": targets}
    usual = LoraConfig()
    if any(getattr(config, name) != getattr(usual, name) for name in _SELECTIVE):
        r = max(own.A.shape[0] for own in last.values())
        trained_last |= {"r": r, "lora_alpha": _alpha(last, r), "target_modules": sorted(last)}
    tensors = {
        f"{_PREFIX}{name}.lora_{which}.weight": getattr(own, which).contiguous()
        for name, own in sorted(stacked.items())
        for which in "AB"
    }
    written = LoraConfig(
        r=rank,
        lora_alpha=_alpha(stacked, rank),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=config.fan_in_fan_out,
        inference_mode=True,
        base_model_name_or_path=base.name,
    )
    # Not as an argument, of which it would make a set: equal trainings write equal files.
    written.target_modules = trained_last["target_modules"] if stacked.keys() == last.keys() else sorted(stacked)
    written.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / STACK_FILE, {"trained_last": trained_last, "trained_on": fingerprint})


def _alpha(factors: Mapping[str, Factors], rank: int) -> float:
    """LoRA's alpha for the scale of the first factors, which is that of all in a stack."""
    alpha = next(iter(factors.values())).scale * rank
    return int(alpha) if alpha == int(alpha) else alpha


def read_stack(folder: Path) -> dict[str, Any] | None:
    """Reads `STACK_FILE` beside an adapter; None where the adapter is a single one."""
    path = folder / STACK_FILE
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = read_json(path)
        LoraConfig(**found["trained_last"])
        if found["trained_last"].keys() ^ {*_LAST} or not isinstance(found["trained_on"], str):
            raise KeyError
    except (DataError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is damaged; delete it to take the adapter for one of a single part") from error
    return found


def split(model: PeftModel, parts: Mapping[str, Any], name: str) -> tuple[PeftModel, dict[str, Factors]]:
    """Takes stacked adapters apart: the one that was trained last stays an adapter, the others are merged.

    `model` has the stack as its adapter and is used up; `parts` are those of `read_stack`, and messages call the
    adapter `name`.

    Returns:
        A PEFT model, trainable, and the factors that were merged.
    """
    rank = int(parts["trained_last"]["r"])
    factors = adapter_factors(model)
    merged = {key: _copy(own, own.A[:-rank], own.B[:, :-rank]) for key, own in factors.items()}
    last = {key: _copy(own, own.A[-rank:], own.B[:, -rank:]) for key, own in factors.items()}
    with torch.no_grad():
        for own in factors.values():
            own.B[:, -rank:] = 0
    config = LoraConfig(**parts["trained_last"], bias="none", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        found: PeftModel = get_peft_model(merge_adapter(model, name), config)
    with torch.no_grad():
        for key, own in adapter_factors(found).items():
            own.A.copy_(last[key].A)
            own.B.copy_(last[key].B)
    return found, merged
