"""Modules found by structure, never by class name."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from pharmacist.core.errors import NoMatchError


def linear_names(model: nn.Module) -> list[str]:
    """Names of all linear layers but the output head, the usual targets of LoRA.

    Raises:
        NoMatchError: The model has none.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else getattr(model, "lm_head", None)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    if not names:
        raise NoMatchError(f"{type(model).__name__}: no linear layer found to attach LoRA adapters to")
    return names
