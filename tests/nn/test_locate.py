import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from pharmacist.core.errors import NoMatchError
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import make_batch
from pharmacist.nn.locate import linear_names
from tests.support.tiny import TinyDecoder, random_token_rows, tiny_llama, tiny_tokenizer


VOCABULARY, LAYERS = 40, 2
MODELS = {
    "llama": lambda: tiny_llama(tiny_tokenizer(), num_hidden_layers=LAYERS, vocab_size=VOCABULARY),
    "llama, untied": lambda: tiny_llama(tiny_tokenizer(), vocab_size=VOCABULARY, tie_word_embeddings=False),
    "llama, 4 layers": lambda: tiny_llama(tiny_tokenizer(), num_hidden_layers=4, vocab_size=VOCABULARY),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=LAYERS, n_head=2)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
        )
    ),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    ),
    "by hand": lambda: TinyDecoder(VOCABULARY),
}
PER_LAYER = {"llama": 7, "llama, untied": 7, "llama, 4 layers": 14, "gpt2": 4, "opt": 6, "neox": 4, "by hand": 6}


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_but_the_head_is_found_and_can_be_trained(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    names = linear_names(model)
    assert len(names) == LAYERS * PER_LAYER[name]
    assert not any("head" in n or n == "embed_out" for n in names)
    bank = AdapterBank(model, AdapterOptions(r=2, learning_rate=1e-2), 0)
    assert sum(isinstance(module, LoraLayer) for module in bank.model.modules()) == len(names)
    rows = random_token_rows(8, VOCABULARY)
    batch = make_batch(rows, range(8), torch.device("cpu"))
    bank.add("class")
    before, start = bank.row_losses("class", batch).completion, bank.state("class")
    bank.train(
        ("class",), lambda step: bank.row_losses("class", batch).completion.mean(), steps=8, checkpoint=tmp_path / "c"
    )
    assert bank.row_losses("class", batch).completion.mean() < before.mean() - 0.01
    unchanged = [
        key for key, value in bank.state("class").items() if "lora_B" in key and torch.equal(value, start[key])
    ]
    assert unchanged == [], "every layer learns"


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(NoMatchError, match="no linear layer"):
        linear_names(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)))
