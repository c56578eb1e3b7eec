"""Tiny models with random weights of the architectures that are to be supported."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pharmacist.nn.locate import linear_names
from tests.support.tiny import TinyDecoder


VOCABULARY, LAYERS = 40, 3
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_COMMON, num_key_value_heads=1, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_COMMON, num_key_value_heads=1)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_COMMON, num_key_value_heads=1, head_dim=8)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            dropout=0.0,
            **_ENDS,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=16,
            n_layer=LAYERS,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **_ENDS,
        )
    ),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_COMMON)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_COMMON)),
    "by hand": lambda: TinyDecoder(VOCABULARY, layers=LAYERS).float(),
}


def tiny(name: str) -> nn.Module:
    """The model with its own weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ARCHITECTURES[name]().eval()


def tiny_lora(name: str) -> nn.Module:
    """The same with a LoRA adapter on all linear layers whose weights are not zero."""
    model = tiny(name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = get_peft_model(model, LoraConfig(r=2, target_modules=linear_names(model), init_lora_weights=False))
    return found.train()
