"""Devices and number formats by the names that options give them."""

from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM

from pharmacist.core.errors import CompatibilityError


_LARGE = 50_000_000
"""Parameters from which on `resolve_dtype` may take bfloat16 on a CPU."""


def resolve_device(device: str) -> torch.device:
    """A device by its name, ``cpu`` or ``cuda``; ``auto`` is the (local) GPU where there is one.

    A CompatibilityError for ``cuda`` where torch sees no such device.
    """
    visible = torch.cuda.is_available()
    if device == "cuda" and not visible:
        raise CompatibilityError("device cuda: no CUDA device is visible to torch; use the device cpu")
    if device == "cpu" or not visible:
        return torch.device("cpu")
    return torch.device("cuda", PartialState().local_process_index)


def resolve_dtype(
    dtype: str, device: torch.device, config: Any = None, *, trust_remote_code: bool = False
) -> torch.dtype:
    """A number format by its name; ``auto`` is bfloat16 on a GPU and, on some CPUs, for some models.

    Those are CPUs that multiply in bfloat16, and large models that were saved in it. There a forward pass of SmolLM2
    (135M) takes a third of the time in float32, a LoRA training step half. A small model would gain little, and one
    that was saved in float32 would lose digits that it has. `config` is that of the model, a
    `transformers.PretrainedConfig`; without one a CPU takes float32.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16
    # Torch tells from 2.10 on whether this CPU multiplies in bfloat16.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = device.type == "cpu" and (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    if not fast or getattr(config, "dtype", None) != torch.bfloat16:
        return torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return torch.bfloat16 if model.num_parameters() >= _LARGE else torch.float32
