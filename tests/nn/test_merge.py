"""Adapters in the weights give the logits that they give apart, or are refused; two stacked give what both give."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pharmacist.core.errors import CompatibilityError, DataError
from pharmacist.nn.lowrank import Factors, adapter_factors
from pharmacist.nn.merge import is_lora, merge_adapter, save_stacked, stack
from pharmacist.nn.models import load_model, model_fingerprint
from tests.support.architectures import ARCHITECTURES, VOCABULARY, tiny
from tests.support.tiny import save_tiny_model


IDS = torch.arange(1, 12)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its output head shares its weight with the embedding."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits.float()
    return found


def save_adapter(base: Path, folder: Path, config: Any, seed: int = 0) -> Path:
    """A random adapter of this kind."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    model.save_pretrained(folder)
    return folder


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)


KINDS = {
    "on the head": lora(target_modules=["q_proj", "lm_head"]),
    "on the embedding": lora(target_modules=["q_proj", "embed_tokens"]),
    "a head of its own": lora(modules_to_save=["lm_head"]),
    "an embedding of its own": lora(modules_to_save=["embed_tokens"]),
    "ranks by module": lora(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, lora_alpha=9),
    "rank-stabilised": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "LoHa": LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "IA3": IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_merged_is_what_the_adapter_gives_and_can_be_saved(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", KINDS[kind])
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    assert float((logits(AutoModelForCausalLM.from_pretrained(base)) - expected).abs().max()) > 2e-3
    loaded = load_model(str(adapter), device="cpu")
    torch.testing.assert_close(logits(loaded.model), expected, rtol=0, atol=1e-4)
    loaded.model.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-4)


def test_a_merge_that_changes_the_model_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(init_lora_weights=False))
    monkeypatch.setattr(model.base_model, "merge_and_unload", model.base_model.unload, raising=False)
    with pytest.raises(CompatibilityError, match=r"mine: .* \(lora\) cannot be merged .* logits change"):
        merge_adapter(model.eval(), "mine")


def test_weights_are_dequantised_before_a_merge(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised weights would lose the update when it is merged into them and they are quantised again."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    quantised = AutoModelForCausalLM.from_pretrained(base)
    quantised.is_quantized = True

    def fails(dtype: torch.dtype) -> Any:
        raise NotImplementedError("no way back")

    monkeypatch.setattr(quantised, "dequantize", lambda dtype: plain)
    model = get_peft_model(quantised, lora(init_lora_weights=False, target_modules=["q_proj", "v_proj"])).eval()
    expected = logits(model)
    merged = merge_adapter(model, "mine")
    assert merged is plain
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    monkeypatch.setattr(quantised, "dequantize", fails)
    with pytest.raises(CompatibilityError, match=r"mine: .* cannot be merged into its base model \(no way back\)"):
        merge_adapter(get_peft_model(quantised, lora()).eval(), "mine")


def test_an_adapter_with_biases_that_the_base_has_not_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", lora(lora_bias=True))
    with pytest.raises(CompatibilityError, match="adapter: this kind of adapter .* has no bias"):
        load_model(str(adapter), device="cpu")


def test_short_number_formats_have_room_for_rounding(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", lora(target_modules="all-linear"))
    assert load_model(str(adapter), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("act", [load_model, model_fingerprint])
def test_adapters_without_weights_to_merge_are_refused(act: Any, base: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(CompatibilityError, match=r"a/adapter_config.json: this kind of adapter \(prompt tuning\)"):
        act(str(tmp_path / "a"))


def test_an_adapter_with_added_tokens_says_what_to_mend(base: Path, tmp_path: Path) -> None:
    larger = AutoModelForCausalLM.from_pretrained(base)
    larger.resize_token_embeddings(larger.config.vocab_size + 3)
    larger.save_pretrained(tmp_path / "larger")
    for file in base.glob("tok*"):
        (tmp_path / "larger" / file.name).write_bytes(file.read_bytes())
    both = lora(modules_to_save=["embed_tokens", "lm_head"])
    adapter = save_adapter(tmp_path / "larger", tmp_path / "adapter", both)
    load_model(str(adapter), device="cpu")
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "larger"), str(base)))
    with pytest.raises(DataError, match="model.safetensors: does not fit .* base_model_name_or_path in") as caught:
        load_model(str(adapter), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_stack_is_the_sum_whatever_ranks_and_scales() -> None:
    def factors(r: int, scale: float, inner: int = 6, outer: int = 5) -> Factors:
        return Factors(torch.randn(r, inner), torch.randn(outer, r), scale)

    torch.manual_seed(0)
    lower = {"a": factors(3, 2.0), "b": factors(1, 0.5, 4, 7)}
    upper = {"a": factors(2, 0.7), "c": factors(4, 0.7)}
    found = stack(lower, upper)
    assert {(own.A.shape[0], own.scale) for own in found.values()} == {(7, 0.7)}
    nothing = torch.zeros(())
    for name, own in found.items():
        parts = [part[name].dense() if name in part else nothing for part in (lower, upper)]
        torch.testing.assert_close(own.dense(), sum(parts))
    assert torch.equal(found["a"].A[-4:-2], upper["a"].A) and torch.equal(found["c"].B[:, -4:], upper["c"].B)
    assert stack({}, upper)["a"].dense().equal(upper["a"].dense())


def test_untied_heads_stay_as_they_are(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=False)
    adapter = save_adapter(base, tmp_path / "adapter", lora(target_modules=["lm_head"]))
    loaded = load_model(str(adapter), device="cpu")
    assert isinstance(loaded.model.lm_head, nn.Linear) and not loaded.model.config.tie_word_embeddings


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "by hand"])
@pytest.mark.filterwarnings("ignore")
def test_two_adapters_become_one_on_every_architecture(name: str, head: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny(name).save_pretrained(base)
    tiny_tokenizer_of(VOCABULARY).save_pretrained(base)
    targets = "all-linear"
    if head:
        model = AutoModelForCausalLM.from_pretrained(base)
        targets = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    aligned = save_adapter(base, tmp_path / "aligned", lora(target_modules="all-linear"))
    loaded = load_model(str(aligned), device="cpu")
    attacked = get_peft_model(loaded.model, lora(target_modules=[targets] if head else targets, r=2)).eval()
    with torch.no_grad():
        for own in adapter_factors(attacked).values():
            own.B.normal_(std=0.2)
    assert is_lora(attacked)
    (tmp_path / "stacked").mkdir()
    save_stacked(attacked, loaded.base, tmp_path / "stacked", "content")
    written = json.loads((tmp_path / "stacked" / "adapter_config.json").read_text())["target_modules"]
    assert written == sorted(written)  # PEFT's own order is another in each process
    stock = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "stacked")
    torch.testing.assert_close(logits(stock), logits(attacked), rtol=1e-4, atol=1e-4)
    again = load_model(str(tmp_path / "stacked"), device="cpu")
    torch.testing.assert_close(logits(again.model), logits(attacked), rtol=1e-4, atol=1e-4)
    again.model.save_pretrained(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole), logits(attacked), rtol=1e-4, atol=1e-4)


SELECTIVE = {
    "rank-stabilised": {"use_rslora": True},
    "ranks by module": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
    "scales by module": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj": 2}},
    "some layers": {"layers_to_transform": [0]},
    "some modules": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
}


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", SELECTIVE)
@pytest.mark.filterwarnings("ignore")
def test_what_an_adapter_selects_survives_in_a_stack(kind: str, both: bool, base: Path, tmp_path: Path) -> None:
    """Merged and continued, the stack gives what the two adapters give, whatever is special about the last."""
    options = SELECTIVE[kind]
    aligned = save_adapter(base, tmp_path / "aligned", lora(**options if both else {"target_modules": "all-linear"}))
    loaded = load_model(str(aligned), device="cpu")
    attacked = get_peft_model(loaded.model, lora(**options)).eval()
    with torch.no_grad():
        for own in adapter_factors(attacked).values():
            own.B.normal_(std=0.2)
    expected, modules = logits(attacked), adapter_factors(attacked).keys()
    (tmp_path / "stacked").mkdir()
    save_stacked(attacked, loaded.base, tmp_path / "stacked", "content")
    stock = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "stacked")
    torch.testing.assert_close(logits(stock), expected, rtol=1e-4, atol=1e-4)
    merged = load_model(str(tmp_path / "stacked"), device="cpu")
    torch.testing.assert_close(logits(merged.model), expected, rtol=1e-4, atol=1e-4)
    continued = load_model(str(tmp_path / "stacked"), device="cpu", merge=False)
    torch.testing.assert_close(logits(continued.model), expected, rtol=1e-4, atol=1e-4)
    assert adapter_factors(continued.model).keys() == modules


def tiny_tokenizer_of(size: int) -> Any:
    """A tokenizer of so many words."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2")
