"""A damaged or mismatched model folder is one line that names the file and the remedy, never a traceback or a hang."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pharmacist.core.errors import DataError, PharmacistError
from pharmacist.nn.models import load_model, model_fingerprint
from tests.support.tiny import CHAT_TEMPLATE, save_tiny_model, tiny_tokenizer


Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and an ``adapter`` on it."""
    place = tmp_path_factory.mktemp("whole")
    base = save_tiny_model(place / "base")
    options = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), options).save_pretrained(place / "adapter")
    return place


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def change(name: str, **values: Any) -> Damage:
    """Other values in a JSON file."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def cut(name: str, share: float) -> Damage:
    """Only the beginning of a file is left."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


def template(source: str) -> Damage:
    return text("chat_template.jinja", source)


MODEL: dict[str, tuple[Damage, str]] = {
    "config cut": (cut("config.json", 0.5), "cannot be loaded as a causal language model"),
    "config a list": (text("config.json", "[]"), "cannot be loaded"),
    "config a word": (text("config.json", '"llama"'), "cannot be loaded"),
    "config nested": (text("config.json", "[" * 100_000), "cannot be loaded"),
    "config not UTF-8": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{}"), "cannot be loaded"),
    "width a word": (change("config.json", hidden_size="wide"), "cannot be loaded"),
    "no heads": (change("config.json", num_attention_heads=0), "cannot be loaded"),
    "other width": (change("config.json", hidden_size=64), "cannot be loaded"),
    "negative vocabulary": (change("config.json", vocab_size=-1), "cannot be loaded"),
    "a layer more": (change("config.json", num_hidden_layers=3), "would be random"),
    "weights cut": (cut("model.safetensors", 0.5), "cannot be loaded"),
    "weights empty": (cut("model.safetensors", 0), "cannot be loaded"),
    "weights a text": (text("model.safetensors", "version https://git-lfs"), "cannot be loaded"),
    "tokenizer cut": (cut("tokenizer.json", 0.5), "cannot be loaded"),
    "tokenizer a list": (text("tokenizer_config.json", "[1]"), "cannot be loaded"),
    "template too long": (template("{% for a in range(1000000000) %}x{% endfor %}"), "its chat template fails"),
    "template cut": (template("{% for m in messages %}{{ m"), "its chat template fails (unexpected end of template"),
    "template broken": (template("{{ 1 / 0 }}"), "its chat template fails (division by zero)"),
    "template deep": (
        template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        "its chat template fails (maximum recursion",
    ),
    "saved template cut": (text("pharmacist_template.json", '{"kind"'), "is not a template"),
}


def one_line(act: Callable[[], object], path: Path, message: str) -> None:
    with pytest.raises(PharmacistError) as caught:
        act()
    said = str(caught.value)
    assert message in said and str(path) in said and "\n" not in said, said


@pytest.mark.parametrize("what", MODEL)
def test_a_damaged_model_is_one_line(what: str, folders: Path, tmp_path: Path) -> None:
    damage, message = MODEL[what]
    damage(Path(shutil.copytree(folders / "base", tmp_path / "model")))
    one_line(lambda: load_model(str(tmp_path / "model"), device="cpu"), tmp_path / "model", message)


class Code:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def as_bin(content: Any) -> Damage:
    """Weights as PyTorch's own file instead."""

    def damage(folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        path = folder / "adapter_model.bin"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)

    return damage


def tensors(act: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Other tensors in the weights."""

    def damage(folder: Path) -> None:
        found = load_file(folder / "adapter_model.safetensors")
        act(found)
        save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return damage


CONFIG, KEY, WEIGHTS = "adapter_config.json", "base_model_name_or_path", "adapter_model.safetensors"
ADAPTER: dict[str, tuple[Damage, str]] = {
    "config cut": (cut(CONFIG, 0.5), f"{CONFIG}: is damaged"),
    "config a list": (text(CONFIG, "[]"), f"{CONFIG}: names no kind of adapter"),
    "config empty": (text(CONFIG, "{}"), f"{CONFIG}: names no kind of adapter"),
    "config nested": (text(CONFIG, "[" * 100_000), f"{CONFIG}: is damaged"),
    "unknown kind": (change(CONFIG, peft_type="NOPE"), "NOPE"),
    "rank a word": (change(CONFIG, r="two"), CONFIG),
    "modules a number": (change(CONFIG, target_modules=5), CONFIG),
    "modules that are not there": (change(CONFIG, target_modules=["spoon"]), "spoon"),
    "no base": (change(CONFIG, **{KEY: None}), f"names no base model; set {KEY}"),
    "base a number": (change(CONFIG, **{KEY: 5}), f"names no base model; set {KEY}"),
    "base has moved": (change(CONFIG, **{KEY: "/no/where/base"}), f"{KEY} names /no/where/base: no such folder; set"),
    "base is no model": (change(CONFIG, **{KEY: "/tmp"}), f"{KEY} names /tmp: a model folder without config.json"),
    "base is itself": (change(CONFIG, **{KEY: "."}), ""),
    "other rank": (change(CONFIG, r=3), "must name the model it was trained on"),
    "weights cut": (cut("adapter_model.safetensors", 0.5), "adapter_model.safetensors: is damaged"),
    "weights empty": (cut("adapter_model.safetensors", 0), "adapter_model.safetensors: is damaged"),
    "weights gone": (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "a tensor gone": (tensors(lambda found: found.pop(min(found))), "1 tensors differ"),
    "a tensor too many": (
        tensors(lambda found: found.update({min(found).replace("layers.0", "layers.7"): torch.ones(2, 2)})),
        "1 tensors differ, such as base_model.model.model.layers.7",
    ),
    "bin cut": (as_bin(b"PK\x03\x04 and no more"), "adapter_model.bin: is damaged"),
    "bin empty": (as_bin(b""), "adapter_model.bin: is damaged"),
    "bin with code": (as_bin(pickle.dumps(Code())), "adapter_model.bin: is damaged"),
    "tokenizer cut": (text("tokenizer_config.json", "{"), "its own tokenizer cannot be loaded"),
    "stack cut": (text("pharmacist_stack.json", "{"), "pharmacist_stack.json: is damaged; delete it"),
    "stack without rank": (text("pharmacist_stack.json", '{"trained_last": {}}'), "pharmacist_stack.json: is damaged"),
}


@pytest.mark.parametrize("what", ADAPTER)
def test_a_damaged_adapter_is_one_line(
    what: str, folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, message = ADAPTER[what]
    adapter = Path(shutil.copytree(folders / "adapter", tmp_path / "adapter"))
    damage(adapter)
    if what == "base is itself":
        change(CONFIG, **{KEY: str(adapter)})(adapter)
        message = f"{KEY} names {adapter}, the adapter itself; set it to the model"
        one_line(lambda: model_fingerprint(str(adapter)), adapter, message)
    merge = not what.startswith("stack")
    one_line(lambda: load_model(str(adapter), device="cpu", merge=merge), adapter, message)
    assert "code ran" not in capfd.readouterr().out


def test_two_adapters_that_name_each_other(folders: Path, tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        shutil.copytree(folders / "adapter", tmp_path / name)
        change(CONFIG, **{KEY: str(tmp_path / other)})(tmp_path / name)
    for act in (lambda: model_fingerprint(str(tmp_path / "a")), lambda: load_model(str(tmp_path / "a"), device="cpu")):
        one_line(act, tmp_path / "b", "the adapter itself")


def test_a_base_beside_the_adapter_is_found_from_anywhere(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders, tmp_path / "moved")
    change(CONFIG, **{KEY: "../base"})(tmp_path / "moved/adapter")
    monkeypatch.chdir("/")
    assert load_model(str(tmp_path / "moved/adapter"), device="cpu").base.name == str(tmp_path / "moved/base")


# --- fingerprints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "modeling_mine.py", "tokenizer.json", "vocab.bpe", "part/adapter_model.safetensors"]
)
def test_all_that_is_loaded_is_fingerprinted(name: str, folders: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(folders / "adapter", tmp_path / "adapter"))
    (adapter / name).parent.mkdir(exist_ok=True)
    prints = [model_fingerprint(str(adapter))]
    for content in ("a", "b"):
        (adapter / name).write_text(content)
        prints.append(model_fingerprint(str(adapter)))
    assert len(set(prints)) == 3


@pytest.mark.parametrize("name", ["README.md", ".git/index", ".cache/x.json", "original.gguf", "__pycache__/m.py"])
def test_what_nothing_loads_changes_no_fingerprint(name: str, folders: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folders / "base", tmp_path / "model"))
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("x")
    assert model_fingerprint(str(model)) == model_fingerprint(str(folders / "base"))


# --- tokenizer and template ----------------------------------------------------------------------------------------


OTHER = CHAT_TEMPLATE.replace("<ans>", "<ans> yes")


def used(adapter: Path, **options: Any) -> tuple[str | None, str]:
    loaded = load_model(str(adapter), device="cpu", **options)
    return loaded.template.chat_template, loaded.template_origin


def test_an_adapters_own_tokenizer_and_template_are_used(folders: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(folders / "adapter", tmp_path / "adapter"))
    assert used(adapter) == (CHAT_TEMPLATE, "the chat template of the model's tokenizer (its base model's)")
    template(OTHER)(adapter)  # a template alone
    assert used(adapter) == (OTHER, "the chat template of the model's tokenizer")
    assert used(adapter, template="chat") == (OTHER, "the chat template, as asked for")
    template("")(adapter)  # an empty one is none
    assert used(adapter) == (CHAT_TEMPLATE, "the chat template of the model's tokenizer (its base model's)")
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.bos_token = "<ans>"
    tokenizer.save_pretrained(adapter)  # a tokenizer, with an empty template and alone
    for there in (True, False):
        assert (adapter / "chat_template.jinja").is_file() == there
        assert used(adapter) == (CHAT_TEMPLATE, "the chat template of the model's tokenizer (its base model's)")
        (adapter / "chat_template.jinja").unlink(missing_ok=True)
    assert load_model(str(adapter), device="cpu").tokenizer.bos_token == "<ans>"
    tokenizer.chat_template = OTHER
    tokenizer.save_pretrained(adapter)
    assert used(adapter) == (OTHER, "the chat template of the model's tokenizer")
    assert used(adapter, template="alpaca") == (None, "the Alpaca template, as asked for")
    text("pharmacist_template.json", '{"kind": "alpaca"}')(adapter)  # what it was trained with goes before all
    assert used(adapter) == (None, "the Alpaca template saved with the model")


def test_an_adapters_own_template_where_its_base_has_none(folders: Path, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", chat=False)
    adapter = Path(shutil.copytree(folders / "adapter", tmp_path / "adapter"))
    change(CONFIG, **{KEY: str(base)})(adapter)
    assert used(adapter) == (None, "the Alpaca template, as the model has no chat template (its base model's)")
    tiny_tokenizer().save_pretrained(adapter)
    assert used(adapter) == (CHAT_TEMPLATE, "the chat template of the model's tokenizer")


def with_tokens(folder: Path, *tokens: str, special: bool = False, **roles: str) -> Path:
    tokenizer = tiny_tokenizer(pad="pad_token" not in roles)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.add_special_tokens(roles)
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_without_an_embedding_are_refused_or_never_looked_up(folders: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folders / "base", tmp_path / "model"))
    rows = len(tiny_tokenizer())
    one_line(
        lambda: load_model(str(with_tokens(model, "broth")), device="cpu"),
        model,
        f"has 1 tokens more than the embedding's {rows} rows (such as 'broth', id {rows})",
    )
    for role in ("eos_token", "bos_token", "unk_token"):
        one_line(lambda r=role: load_model(str(with_tokens(model, **{r: "<x>"})), device="cpu"), model, "'<x>'")
    loaded = load_model(str(with_tokens(model, pad_token="[PAD]")), device="cpu")
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id < rows
    loaded = load_model(str(with_tokens(model, "<image>", special=True)), device="cpu")
    loaded.model(input_ids=torch.tensor([[1, 5]]))
    with pytest.raises(DataError, match="a text holds '<image>', a token that the model has no embedding for"):
        loaded.model(input_ids=torch.tensor([loaded.tokenizer("bread <image>")["input_ids"]]))
