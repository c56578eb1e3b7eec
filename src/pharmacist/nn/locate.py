"""Finds the parts of a language model by structure, never by class name."""

import inspect
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from pharmacist.core.errors import NoMatchError


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that turns hidden states into logits; None where the model names none."""
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if get_head is not None else getattr(model, "lm_head", None)


def linear_names(model: nn.Module) -> list[str]:
    """Names of all linear layers but the output head, the usual targets of LoRA; `NoMatchError` without any."""
    head = output_head(model)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    if not names:
        raise NoMatchError(f"{type(model).__name__}: no linear layer found to attach LoRA adapters to")
    return names


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers in order, by name: the list of modules of which each holds a self-attention module.

    Where there are several such lists (a vision tower), it is the one as long as the configuration says the text
    model is deep, else the longest. `NoMatchError` where there is none.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_attention(layer) for layer in module)
    }
    if not lists:
        raise _nothing(model, "decoder layers (a list of modules, each with a self-attention module)")
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(config, "num_hidden_layers", None)
    name = max(lists, key=lambda name: (len(lists[name]) == depth, len(lists[name])))
    return {f"{name}.{number}": layer for number, layer in enumerate(lists[name])}


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The self-attention module of each decoder layer, by name: the part with linear layers that takes a mask.

    Of a layer with a state-space part beside it (Falcon-H1), it is the one that is called so.
    """
    found = {}
    for name, layer in decoder_layers(model).items():
        child, module = max(_attention(layer), key=lambda item: "att" in item[0])
        found[f"{name}.{child}"] = module
    return found


def mlp_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The feed-forward module of each decoder layer, by name.

    It is the largest part of a layer with matrices (linear layers, or experts in one tensor) that takes no mask; where
    those are linear layers that are children of the decoder layer itself (OPT), the last of them. `NoMatchError` where
    a layer has none.
    """
    found = {}
    for name, layer in decoder_layers(model).items():
        attention = [module for _, module in _attention(layer)]
        rest = [
            (child, module)
            for child, module in layer.named_children()
            if module not in attention and any(parameter.ndim > 1 for parameter in module.parameters())
        ]
        if not rest:
            raise _nothing(model, f"a feed-forward part with matrices in {name}")
        blocks = [item for item in rest if not _is_linear(item[1])]
        child, module = max(blocks, key=lambda item: sum(p.numel() for p in item[1].parameters()), default=rest[-1])
        found[f"{name}.{child}"] = module
    return found


def final_norm(model: nn.Module) -> nn.Module:
    """The normalisation between the last decoder layer and the output head.

    It is the last sibling of the decoder layers whose parameters are all vectors; `NoMatchError` where there is none.
    """
    parent = model.get_submodule(next(iter(decoder_layers(model))).rpartition(".")[0].rpartition(".")[0])
    found = [
        module
        for module in parent.children()
        if (weights := list(module.parameters())) and all(weight.ndim == 1 for weight in weights)
    ]
    if not found:
        raise _nothing(model, "a final normalisation beside the decoder layers")
    return found[-1]


def _attention(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in layer.named_children()
        if any(map(_is_linear, module.modules()))
        and not _is_linear(module)
        and any("mask" in argument for argument in inspect.signature(type(module).forward).parameters)
    ]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | BaseTunerLayer)


def _nothing(model: nn.Module, what: str) -> NoMatchError:
    return NoMatchError(f"{type(model).__name__}: looked for {what} and found nothing; this method cannot act on it")
