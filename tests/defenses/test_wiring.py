"""Modules are found by structure in every supported architecture, and every defense acts on them."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pharmacist.core.errors import CompatibilityError, NoMatchError
from pharmacist.defenses import DEFENSES
from pharmacist.nn.grads import add_to_grad, trainable
from pharmacist.nn.hooks import activation_gradients, add_offsets, capture, head_at
from pharmacist.nn.locate import attention_modules, decoder_layers, final_norm, mlp_modules, output_head
from pharmacist.nn.losses import batch_loss, targets
from pharmacist.training.strategy import StepContext
from tests.support import toy
from tests.support.architectures import ARCHITECTURES, LAYERS, VOCABULARY, tiny, tiny_lora
from tests.support.defense_cases import NAMES, OFF, build
from tests.support.training_toy import sft


EVERY = pytest.mark.parametrize("name", ARCHITECTURES)
WHERE = {  # decoder layer, self-attention, feed-forward part, final normalisation
    "llama": ("model.layers.1", "self_attn", "mlp", "model.norm"),
    "qwen3": ("model.layers.1", "self_attn", "mlp", "model.norm"),
    "mistral": ("model.layers.1", "self_attn", "mlp", "model.norm"),
    "gemma3": ("model.layers.1", "self_attn", "mlp", "model.norm"),
    "opt": ("model.decoder.layers.1", "self_attn", "fc2", "model.decoder.final_layer_norm"),
    "gpt2": ("transformer.h.1", "attn", "mlp", "transformer.ln_f"),
    "neox": ("gpt_neox.layers.1", "attention", "mlp", "gpt_neox.final_layer_norm"),
    "phi": ("model.layers.1", "self_attn", "mlp", "model.final_layernorm"),
    "by hand": ("layers.1", "attend", "feed", "norm"),
}
SAFE, HARMFUL = toy.rows(3, seed=1), toy.rows(3, seed=2)
DATA = toy.batch(SAFE, pad=1)


def side():
    class Pairs:
        def batch(self, rows):
            return list(range(len(rows))), toy.batch(HARMFUL)

    streams = {
        name: toy.endless(toy.batch(toy.rows(2, seed=seed)))
        for seed, name in enumerate(("harmful", "held_out", "retain"), start=5)
    }
    return streams | {"paired": Pairs()}


def step_gradient(strategy, model, streams=None, data=DATA):
    """A step of the Trainer without one."""
    model.zero_grad()
    step = StepContext(model=model, batch=data, streams=streams or side(), rows=[1, 2, 3])
    extra = strategy.auxiliary(step)
    if extra is not None:
        add_to_grad(step.parameters, extra, 1.0)
    with strategy.around(step):
        out = step.output(data)
        strategy.objective(step, batch_loss(out.logits, data["labels"]), out).backward()
    strategy.after_backward(step)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trainable(model).items()}


@EVERY
@pytest.mark.parametrize("make", [tiny, tiny_lora])
def test_modules_are_found(name, make):
    model, (layer, attention, mlp, norm) = make(name), WHERE[name]
    prefix = "base_model.model." if make is tiny_lora else ""
    inner = model.base_model.model if make is tiny_lora else model
    assert list(decoder_layers(model))[1] == prefix + layer and len(decoder_layers(model)) == LAYERS
    assert list(attention_modules(model))[1] == f"{prefix}{layer}.{attention}"
    assert list(mlp_modules(model))[1] == f"{prefix}{layer}.{mlp}"
    assert all(len(found) == LAYERS for found in (attention_modules(model), mlp_modules(model)))
    assert final_norm(model) is inner.get_submodule(norm)
    assert output_head(model) is (inner.lm_head if hasattr(inner, "lm_head") else inner.embed_out)


@EVERY
def test_what_is_found_is_what_the_model_computes_with(name):
    """Captured states lead to the logits, and an offset on every module changes them."""
    model = tiny(name)
    layers, tail = decoder_layers(model), nn.Sequential(final_norm(model), output_head(model))
    run = lambda: model(input_ids=DATA["input_ids"], attention_mask=DATA["attention_mask"]).logits  # noqa: E731
    with torch.no_grad():
        with capture(layers) as hidden, capture(layers, inputs=True) as given:
            logits = run()
        assert list(hidden) == list(layers) == list(given)
        assert torch.allclose(tail(hidden[list(layers)[-1]]), logits, atol=1e-6)
        for below, above in itertools.pairwise(layers):
            assert torch.equal(hidden[below], given[above])
        for modules in (attention_modules(model), mlp_modules(model)):
            for one, module in modules.items():
                with capture({one: module}) as found:
                    run()
                offset = torch.zeros_like(found[one])
                offset[..., ::2] = 1.0  # the same for all channels would be lost in a normalisation
                with add_offsets({one: module}, {one: offset}):
                    assert not torch.allclose(run(), logits, atol=1e-4)
        keep, tokens = targets(DATA["labels"])
        with head_at(output_head(model), keep):
            assert torch.allclose(run(), logits[keep], atol=1e-6) and len(tokens) == int(keep.sum())
        assert torch.equal(run(), logits) and toy.hooks(model) == 0


@EVERY
@pytest.mark.parametrize("method", NAMES)
def test_every_defense_acts(name, method):
    model = tiny_lora(name)
    plain, found = step_gradient(sft(), model), {}
    for kind, options in (("on", None), ("off", OFF[method])):
        if method == "t-vaccine" and kind == "off":
            options = options | {"layers": LAYERS}
        strategy = build(method, options)
        strategy.setup(model, 0)
        found[kind] = step_gradient(strategy, model)
        strategy.close()
    assert toy.same(found["off"], plain)
    assert all(value.isfinite().all() for value in found["on"].values())
    assert toy.difference(found["on"], plain) > 1e-4
    assert toy.hooks(model) == 0


@EVERY
def test_features_of_every_architecture_leave_padding_out(name):
    """OPT's feed-forward layers see the tokens of all rows in one."""
    found = []
    for pad, options in ((0, {}), (3, {}), (0, {"lam": 0.0})):
        model, strategy = tiny_lora(name).eval(), DEFENSES.build("ldifs", options)
        strategy.setup(model, 0)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter *= 1.5
        found.append(step_gradient(strategy, model, data=toy.batch(SAFE, pad=pad)))
    assert toy.difference(found[0], found[1]) < 1e-4
    assert toy.difference(found[0], found[2]) > 1e-2


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_non_reentrant_checkpointing_changes_no_gradient(name, method):
    found = []
    for saving in (False, True):
        model = tiny_lora(name)
        if saving:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        calls = []
        first = next(iter(attention_modules(model).values()))
        handle = first.register_forward_hook(lambda module, args, out, calls=calls: calls.append(None))
        strategy = build(method)
        strategy.setup(model, 0)
        found.append((step_gradient(strategy, model), len(calls)))
        handle.remove()
    assert toy.difference(found[0][0], found[1][0]) < 1e-5
    assert found[1][1] > found[0][1] or method == "t-vaccine", "the forward does run again"


@pytest.mark.parametrize("method", NAMES)
def test_bfloat16_weights_and_passes(method):
    model = tiny_lora("llama").bfloat16()
    strategy = build(method)
    strategy.setup(model, 0)
    before = toy.fingerprint(model)
    assert all(value.isfinite().all() for value in step_gradient(strategy, model).values())
    assert toy.same(before, toy.fingerprint(model))


@pytest.mark.parametrize("method", NAMES)
def test_full_tuning(method):
    model = tiny("llama").train().requires_grad_(True)
    plain, strategy = step_gradient(sft(), model), build(method)
    strategy.setup(model, 0)
    assert toy.difference(step_gradient(strategy, model), plain) > 1e-5


@pytest.mark.parametrize("find", [decoder_layers, attention_modules, mlp_modules, final_norm])
def test_a_model_without_decoder_layers_is_refused(find):
    model = nn.Sequential(nn.Embedding(4, 4), nn.ModuleList([nn.Linear(4, 4)]))
    with pytest.raises(NoMatchError, match="Sequential: looked for decoder layers .*self-attention.* found nothing"):
        find(model)


@pytest.mark.parametrize("method", [name for name in NAMES if name not in ("booster", "tar")])
def test_a_defense_that_finds_nothing_to_act_on_is_refused(method):
    with pytest.raises(NoMatchError, match="looked for"):
        build(method).setup(nn.Sequential(nn.Linear(4, 4)), 0)


def test_the_text_layers_are_chosen_where_there_is_a_vision_tower_as_well():
    model = nn.Module()
    for name, depth in (("vision", 4), ("text", 2)):
        setattr(model, name, tiny("llama").model)
        getattr(model, name).layers = nn.ModuleList([*tiny("llama").model.layers, *tiny("llama").model.layers][:depth])
    assert list(decoder_layers(model))[0] == "vision.layers.0", "the longest, where nothing is said"
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))
    assert list(decoder_layers(model)) == ["text.layers.0", "text.layers.1"]


def test_an_offset_must_fit():
    model = tiny("llama")
    modules = attention_modules(model)
    name = next(iter(modules))
    with pytest.raises(CompatibilityError, match="offset of shape"):
        with add_offsets(modules, {name: torch.zeros(1, 1, 16)}):
            model(input_ids=DATA["input_ids"])
    assert toy.hooks(model) == 0


def test_an_offset_takes_the_number_format_of_the_output():
    layer = nn.Linear(2, 2, dtype=torch.bfloat16)
    rows = torch.ones(3, 2, dtype=torch.bfloat16)
    with torch.no_grad(), add_offsets({"layer": layer}, {"layer": torch.ones(3, 2)}):
        found = layer(rows)
    assert found.dtype == torch.bfloat16 and torch.equal(found, layer(rows) + 1)


def test_a_module_that_does_not_run_is_told():
    model = tiny("llama")
    idle = {"idle": nn.Linear(2, 2)}
    with pytest.raises(CompatibilityError, match="idle: did not run"):
        activation_gradients(idle, lambda: model(input_ids=DATA["input_ids"]).logits.sum())
    assert torch.is_grad_enabled() and VOCABULARY > 12


SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
AFTER_THE_HEAD = {
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.1)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=0.05)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
}


@pytest.mark.parametrize("name", AFTER_THE_HEAD)
def test_repnoise_reads_the_logits_that_the_model_makes_of_those_of_its_head(name):
    torch.manual_seed(0)
    model = AFTER_THE_HEAD[name]().eval()
    output_head(model).weight.data.mul_(20)
    strategy = build("repnoise", {"alpha": 1.0, "beta": 0.0})
    strategy.setup(model, 0)
    step = StepContext(model=model, batch=DATA)
    with capture(strategy.layers) as found:
        logits = step.output(DATA).logits
    keep, tokens = targets(DATA["labels"])
    _, losses = strategy.ascent(step, [found[name][keep] for name in strategy.layers], tokens)
    assert losses[-1] == pytest.approx(float(batch_loss(logits, DATA["labels"])), rel=1e-5)


def test_experts_in_one_tensor_are_a_feed_forward_part():
    shape = SHAPE | {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))
    assert list(mlp_modules(model)) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    with capture(mlp_modules(model)) as found:
        model(input_ids=DATA["input_ids"])
    assert {value.shape for value in found.values()} == {(*DATA["input_ids"].shape, 16)}
