import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import FalconH1Config, FalconH1ForCausalLM

from pharmacist.core.errors import NoMatchError
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import make_batch
from pharmacist.nn.locate import attention_modules, linear_names, mlp_modules
from tests.support.architectures import ARCHITECTURES, LAYERS, VOCABULARY
from tests.support.tiny import random_token_rows, tiny_llama, tiny_tokenizer


MODELS = ARCHITECTURES | {"llama, tied": lambda: tiny_llama(tiny_tokenizer(), num_hidden_layers=LAYERS)}
PER_LAYER = {"gpt2": 4, "neox": 4, "opt": 6, "phi": 6, "by hand": 6}
"""Linear layers where there are not seven."""


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_but_the_head_is_found_and_can_be_trained(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    names = linear_names(model)
    assert len(names) == LAYERS * PER_LAYER.get(name, 7)
    assert not any("head" in n or n == "embed_out" for n in names)
    bank = AdapterBank(model, AdapterOptions(r=2, learning_rate=1e-2), 0)
    assert sum(isinstance(module, LoraLayer) for module in bank.model.modules()) == len(names)
    rows = random_token_rows(8, VOCABULARY)
    batch = make_batch(rows, range(8), torch.device("cpu"))
    bank.add("class")
    before, start = bank.row_losses("class", batch), bank.state("class")
    bank.train(("class",), lambda step: bank.row_losses("class", batch).mean(), steps=8, checkpoint=tmp_path / "c")
    assert bank.row_losses("class", batch).mean() < before.mean() - 0.01
    unchanged = [
        key for key, value in bank.state("class").items() if "lora_B" in key and torch.equal(value, start[key])
    ]
    assert unchanged == [], "every layer learns"


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(NoMatchError, match="no linear layer"):
        linear_names(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)))


def test_of_a_hybrid_layer_the_attention_is_found():
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    mamba = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4}
    model = FalconH1ForCausalLM(
        FalconH1Config(vocab_size=8, intermediate_size=24, num_hidden_layers=1, **shape, **mamba)
    )
    assert list(attention_modules(model)) == ["model.layers.0.self_attn"]
    assert list(mlp_modules(model)) == ["model.layers.0.feed_forward"]
