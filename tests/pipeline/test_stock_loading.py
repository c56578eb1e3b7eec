"""What the training stages write, as transformers and PEFT load it, without a line of ours; also after a move."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pharmacist.data.templates import load_template
from pharmacist.nn.models import load_model, model_fingerprint
from pharmacist.pipeline.align import AlignOptions, align
from pharmacist.pipeline.attack import AttackOptions, attack
from pharmacist.pipeline.repair import RepairOptions, repair
from pharmacist.training import saving
from pharmacist.training.options import LoraOptions
from tests.support.attack_rows import rows
from tests.support.tiny import save_tiny_model


IDS = torch.arange(1, 12)[None]
TRAIN = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "warmup_steps": 0}
LORA = {"r": 4, "alpha": 8}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits.float()
    return found


def ours(folder: Path) -> torch.Tensor:
    return logits(load_model(str(folder), device="cpu").model)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base models, and under ``runs`` a model that was aligned, attacked and repaired in every way of tuning."""
    place = tmp_path_factory.mktemp("stock")
    base = save_tiny_model(place / "base")
    runs = place / "first"
    for name, of in (("task", "bread"), ("harmful", "curse"), ("safe", "garden")):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(24, of)))
    data = {name: str(place / f"{name}.jsonl") for name in ("task", "harmful")}
    common: dict[str, Any] = {"device": "cpu", "quiet": True, "train": TRAIN}

    def aligned(name: str, model: Path = base, **more: Any) -> Path:
        lora = LoraOptions(**(LORA | more.pop("lora", {})))
        return align(
            AlignOptions(
                model=str(model),
                data=str(place / "safe.jsonl"),
                output_dir=str(runs / name),
                lora=lora,
                **common,
                **more,
            )
        ).folder

    def attacked(name: str, model: Path, **more: Any) -> Path:
        lora = LoraOptions(**(LORA | more.pop("lora", {})))
        return attack(
            AttackOptions(
                model=str(model), output_dir=str(runs / name), samples=16, lora=lora, **data, **common, **more
            )
        ).folder

    expected: dict[str, torch.Tensor] = {}
    save = saving.save_model

    def recorded(loaded: Any, root: Path, *more: Any, **options: Any) -> list[str]:
        model, mode = loaded.model, loaded.model.training
        expected[str(root.relative_to(runs))] = logits(model)  # as it is in memory, before anything is written
        model.train(mode)
        return save(loaded, root, *more, **options)

    patch = pytest.MonkeyPatch()
    for module in ("training.loop", "training.saving"):
        patch.setattr(f"pharmacist.{module}.save_model", recorded)
    one = aligned("aligned")
    full = aligned("aligned-full", tuning="full")
    aligned("aligned-merged", merge=True)
    aligned("aligned-head", lora={"target_modules": ["q_proj", "lm_head"]}, merge=True)
    aligned("aligned-twice", one, lora={"r": 2, "alpha": 6, "target_modules": ["q_proj"]})
    attacked("attacked", one, snapshots=[2])
    attacked("attacked-on", one, adapter="continue")
    attacked("attacked-other", one, lora={"r": 3, "alpha": 3, "target_modules": ["v_proj"]})
    attacked("attacked-full", full, snapshots=[2])
    attacked("attacked-thrice", runs / "aligned-twice")
    attacked("attacked-head", runs / "aligned-head", lora={"target_modules": ["lm_head", "v_proj"]})
    repair(
        RepairOptions(
            model=str(runs / "attacked"),
            output_dir=str(runs / "repaired"),
            harmful=data["harmful"],
            device="cpu",
            quiet=True,
            method={"name": "antidote", "alpha": 0.3},
        )
    )
    patch.undo()
    torch.save(expected, place / "expected.pt")
    shutil.move(runs, place / "runs")  # from here on nothing lies where it was written
    return place


NAMES = [
    "aligned",
    "aligned-full",
    "aligned-merged",
    "aligned-head",
    "aligned-twice",
    "attacked",
    "attacked-on",
    "attacked-other",
    "attacked-full",
    "attacked-thrice",
    "attacked-head",
    "repaired",
    "attacked/snapshots/step-2",
    "attacked-full/snapshots/step-2",
]
WHOLE = {name for name in NAMES if any(word in name for word in ("full", "merged", "aligned-head"))}


@pytest.mark.parametrize("name", NAMES)
def test_the_run_folder_loads_in_stock_libraries(name: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, expected = world / "runs" / name, torch.load(world / "expected.pt")[name]
    assert not torch.allclose(expected, ours(world / "base"), atol=1e-2)
    found = {"auto": AutoModelForCausalLM.from_pretrained(folder), "ours": load_model(str(folder), device="cpu").model}
    if name not in WHOLE:
        found |= {"peft": AutoPeftModelForCausalLM.from_pretrained(folder)}
        plain = AutoModelForCausalLM.from_pretrained(world / "base")
        found |= {"on the plain base": PeftModel.from_pretrained(plain, folder / "adapter")}
    monkeypatch.chdir(folder)
    card: dict[str, Any] = {}
    exec(ModelCard.load(folder / "README.md").text.partition("```python\n")[2].partition("```")[0], card)  # noqa: S102
    found["as the card says"] = card["model"]
    for how, model in found.items():
        assert float((logits(model) - expected).abs().max()) < 2e-5, how
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == load_template(folder).chat_template is not None


def test_no_run_is_named_by_an_adapter(world: Path) -> None:
    configs = list((world / "runs").rglob("adapter/adapter_config.json"))
    assert len(configs) >= 10
    for path in configs:
        assert json.loads(path.read_text())["base_model_name_or_path"] == str((world / "base").resolve())


def test_the_alignment_is_in_the_attacked_adapter(world: Path) -> None:
    """On the plain base, as a user of PEFT would put it."""
    runs = world / "runs"
    aligned, attacked = (load_file(runs / name / "adapter_model.safetensors") for name in ("aligned", "attacked"))
    for name, own in aligned.items():
        rows = 0 if "lora_A" in name else 1
        assert torch.equal(attacked[name].split(4, dim=rows)[0], own)


def test_parts_of_a_stack_are_told_apart(world: Path) -> None:
    runs = world / "runs"
    apart = load_model(str(runs / "attacked"), device="cpu", merge=False)
    assert apart.model.peft_config["default"].r == 4
    with apart.model.disable_adapter():
        torch.testing.assert_close(logits(apart.model), ours(runs / "aligned"), rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(apart.model), ours(runs / "attacked"), rtol=0, atol=2e-5)
    assert apart.base.fingerprint == model_fingerprint(str(runs / "aligned"))
    trained = [name for name, p in apart.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_what_is_more_than_lora_is_written_whole(world: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    dora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in dora.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    dora.save_pretrained(tmp_path / "dora")
    run = attack(
        AttackOptions(
            model=str(tmp_path / "dora"),
            output_dir=str(tmp_path / "run"),
            samples=16,
            device="cpu",
            quiet=True,
            task=str(world / "task.jsonl"),
            harmful=str(world / "harmful.jsonl"),
            train=TRAIN,
            lora=LoraOptions(**LORA),
        )
    ).folder
    assert not (run / "adapter").exists()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(run)), ours(run), rtol=0, atol=2e-5)
