import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from pharmacist.core.errors import CompatibilityError, ConfigError, DataError
from pharmacist.core.manifest import RunManifest
from pharmacist.data.templates import Template, save_template
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import make_batch
from pharmacist.nn.devices import resolve_device, resolve_dtype
from pharmacist.nn.models import load_model, model_fingerprint, wrap_model
from pharmacist.nn.tokenizers import tokenizer_fingerprint
from tests.support.tiny import random_token_rows, save_tiny_model, tiny_llama, tiny_tokenizer


IDS = torch.arange(1, 12)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory) -> Path:
    """The folder of a stage that wrote an adapter, with the logits that it gives."""
    root = tmp_path_factory.mktemp("adapter")
    bank = AdapterBank(AutoModelForCausalLM.from_pretrained(folder), AdapterOptions(r=2, learning_rate=0.05), 0)
    batch = make_batch(random_token_rows(6, 40), range(6), torch.device("cpu"))
    bank.add("safe")
    bank.train(("safe",), lambda step: bank.row_losses("safe", batch).mean(), steps=5, checkpoint=root / "c")
    bank.save("safe", root / "adapter")
    with bank.using("safe") as model, torch.no_grad():
        torch.save(model(input_ids=IDS).logits, root / "logits.pt")
    return root


def logits(name: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(str(name), device="cpu").model(input_ids=IDS).logits


def test_a_model_folder_is_loaded_frozen(folder):
    loaded = load_model(str(folder), device="cpu")
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert (loaded.max_length, loaded.template.kind, loaded.name) == (128, "chat", str(folder))
    assert loaded.model.dtype == torch.float32 and loaded.device.type == "cpu"
    assert load_model(str(folder), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_model(str(folder), device="cpu", template="alpaca").template.kind == "alpaca"


def test_an_adapter_is_merged_into_its_base(folder, adapter):
    expected = torch.load(adapter / "logits.pt", weights_only=True)
    for name in (adapter, adapter / "adapter"):
        torch.testing.assert_close(logits(name), expected, rtol=0, atol=1e-5)
    assert (logits(folder) - expected).abs().max() > 1e-2
    assert not any("lora" in name for name, _ in load_model(str(adapter), device="cpu").model.named_parameters())


def test_a_stage_folder_is_a_model_and_its_template_travels(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    save_template(tmp_path, Template("alpaca"))
    assert torch.equal(logits(tmp_path), logits(folder))
    assert load_model(str(tmp_path), device="cpu").template.kind == "alpaca"
    assert load_model(str(tmp_path), device="cpu", template="chat").template.kind == "chat"


def test_a_model_without_pad_token_pads_with_the_end(tmp_path):
    folder = save_tiny_model(tmp_path / "m")
    tiny_tokenizer(pad=False).save_pretrained(folder)
    assert load_model(str(folder), device="cpu").tokenizer.pad_token == "</s>"


def broken(folder: Path, target: Path, what: str) -> Path:
    shutil.copytree(folder, target)
    if what == "no config":
        (target / "config.json").unlink()
    elif what == "no weights":
        (target / "model.safetensors").unlink()
    elif what == "other kind":
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | {"model_type": "vit", "architectures": ["ViTModel"]}))
    elif what == "no end":
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None
        tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    "what, message",
    [
        ("no config", "without config.json"),
        ("no weights", "without safetensors weights"),
        ("other kind", "cannot be loaded as a causal language model"),
        ("no end", "no end-of-sequence token"),
    ],
)
def test_a_folder_that_is_no_model_is_one_clear_line(folder, tmp_path, what, message):
    with pytest.raises((DataError, CompatibilityError), match=message) as caught:
        load_model(str(broken(folder, tmp_path / "m", what)), device="cpu")
    assert "\n" not in str(caught.value) and str(tmp_path / "m") in str(caught.value)


@pytest.mark.parametrize(
    "stage, status, message",
    [
        ("align", "started", "its run of 'align' is not finished; run the same command again to resume it"),
        ("curate", "success", "a run of 'curate' without a model; give the folder of an align, attack or repair"),
    ],
)
def test_a_run_without_a_model_says_so(tmp_path, stage, status, message):
    RunManifest(stage=stage, status=status, key="", config={}, inputs={}).write(tmp_path)
    with pytest.raises(DataError, match=f"^{tmp_path}: {message}$"):
        load_model(str(tmp_path), device="cpu")


def test_names_that_lead_nowhere_say_so(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="no such folder"):
        load_model(str(tmp_path / "none"))
    with pytest.raises(DataError, match="HF_HUB_OFFLINE forbids downloads"):
        load_model("someone/some-model")
    with pytest.raises(DataError, match="is a file"):
        load_model(str(folder / "config.json"))


def test_an_adapter_without_a_base_or_of_another_shape_is_one_clear_line(adapter, tmp_path):
    orphan = tmp_path / "orphan"
    shutil.copytree(adapter / "adapter", orphan)
    config = json.loads((orphan / "adapter_config.json").read_text())
    (orphan / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    for act in (load_model, model_fingerprint):
        with pytest.raises(DataError, match="names no base model"):
            act(str(orphan))
    other = save_tiny_model(tmp_path / "other", hidden_size=16)
    (orphan / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    with pytest.raises(DataError, match="does not fit its base model") as caught:
        load_model(str(orphan), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_fingerprint_is_of_content(folder, adapter, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert model_fingerprint(str(tmp_path / "copy")) == model_fingerprint(str(folder))
    other = save_tiny_model(tmp_path / "other", seed=1)
    assert model_fingerprint(str(other)) != model_fingerprint(str(folder))
    assert model_fingerprint(str(adapter)) != model_fingerprint(str(folder))
    assert model_fingerprint("org/name") == "hub:org/name"
    # An adapter's content includes its base's.
    shutil.copytree(adapter / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    before = model_fingerprint(str(tmp_path / "adapter"))
    save_tiny_model(tmp_path / "base", seed=0)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    middle = model_fingerprint(str(tmp_path / "adapter"))
    save_tiny_model(tmp_path / "base", seed=1)
    assert len({before, middle, model_fingerprint(str(tmp_path / "adapter"))}) == 3


def test_a_fingerprint_of_a_loaded_model_knows_its_adapters(folder):
    def loaded(alpha: int, active: str = "default") -> str:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj"]))
        model.add_adapter("second", LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
        model.set_adapter(active)
        return model_fingerprint(wrap_model(model, tiny_tokenizer()))

    assert loaded(4) == loaded(4)
    assert len({loaded(4), loaded(8), loaded(4, "second")}) == 3


def test_a_model_that_is_no_decoder_only_language_model_is_named():
    shape = {"vocab_size": 70, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    t5 = T5Config(vocab_size=70, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    bert = BertConfig(**shape, intermediate_size=8)
    other = [T5ForConditionalGeneration(t5), BertForMaskedLM(bert), BertForSequenceClassification(bert)]
    for model in (*other, get_peft_model(other[0], LoraConfig(r=2, target_modules=["q", "v"]))):
        with pytest.raises(ConfigError, match="a loaded causal language model, not (T5For|BertFor)") as caught:
            wrap_model(model, tiny_tokenizer())
        assert "\n" not in str(caught.value)


def test_tokenizer_fingerprints_tell_special_tokens_apart():
    tokenizer = tiny_tokenizer()
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(tiny_tokenizer())
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(tiny_tokenizer(pad=False))


def test_devices_and_number_formats():
    assert resolve_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert resolve_device("auto").type == "cpu"
        with pytest.raises(CompatibilityError, match="no CUDA device"):
            resolve_device("cuda")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(
    ("saved", "capabilities", "large", "expected"),
    [
        (torch.bfloat16, {"avx512_bf16": True}, 1, torch.bfloat16),
        (torch.bfloat16, {"amx_bf16": True}, 1, torch.bfloat16),
        (torch.float32, {"avx512_bf16": True}, 1, torch.float32),
        (torch.bfloat16, {"avx2": True}, 1, torch.float32),
        (torch.bfloat16, {"avx512_bf16": True}, 50_000_000, torch.float32),
    ],
    ids=["saved so", "AMX", "saved in float32", "a CPU without", "small"],
)
def test_bfloat16_on_a_cpu(tmp_path, monkeypatch, saved, capabilities, large, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr("pharmacist.nn.devices._LARGE", large)
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer).to(saved).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    assert loaded.model.dtype == loaded.dtype == expected
    assert loaded.facts["dtype"] == str(expected).removeprefix("torch.")
    assert load_model(str(tmp_path), device="cpu", dtype="float32").model.dtype == torch.float32
    assert {value.dtype for value in AdapterBank(loaded.model, AdapterOptions(), 0).state("start").values()} == {
        torch.float32
    }


def test_a_gated_model_says_how_to_get_it(monkeypatch):
    def refuse(*_, **__):
        response = SimpleNamespace(headers={}, request=None, status_code=403)
        raise OSError("You are trying to access a gated repo.") from GatedRepoError("403", response=response)

    monkeypatch.setattr("pharmacist.nn.models.AutoConfig.from_pretrained", refuse)
    with pytest.raises(DataError, match=r"^somebody/model: is gated: accept its terms on the Hub and log in"):
        load_model("somebody/model", device="cpu")
