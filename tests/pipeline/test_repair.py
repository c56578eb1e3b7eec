"""Repair from end to end: what belongs together, what is written, what is refused before any work."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pharmacist.cli.main import main
from pharmacist.core.errors import CompatibilityError, ConfigError, NoMatchError
from pharmacist.core.manifest import read_manifest
from pharmacist.nn.models import load_model
from pharmacist.pipeline.align import AlignOptions, align
from pharmacist.pipeline.attack import AttackOptions, attack
from pharmacist.pipeline.repair import RepairOptions, repair
from pharmacist.training.options import LoraOptions
from tests.support.attack_rows import rows
from tests.support.tiny import save_tiny_model


TRAIN = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, an aligned adapter, and fine-tuned models: fresh adapter, continued adapter, whole weights."""
    folder = tmp_path_factory.mktemp("repair")
    found = {"base": str(save_tiny_model(folder / "base")), "other": str(save_tiny_model(folder / "other", seed=5))}
    found["small"] = str(save_tiny_model(folder / "small", hidden_size=16))
    for name, of in (("task", "bread"), ("harmful", "curse"), ("safe", "garden")):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(30, of)))
        found[name] = str(path)
    common: dict[str, Any] = {"device": "cpu", "quiet": True, "train": TRAIN, "lora": LoraOptions(r=4, alpha=8)}
    aligned = found["aligned"] = str(folder / "aligned")
    align(AlignOptions(model=found["base"], data=found["safe"], output_dir=aligned, **common))
    user: dict[str, Any] = {"model": aligned, "task": found["task"], "harmful": found["harmful"], "samples": 20}
    for name, more in (("fresh", {}), ("continued", {"adapter": "continue"}), ("full", {"tuning": "full"})):
        found[name] = str(folder / name)
        attack(AttackOptions(output_dir=found[name], **user, **common, **more))
    return found


def options(world: dict[str, str], output: Path, model: str, name: str, **more: Any) -> RepairOptions:
    given: dict[str, Any] = {"aligned": world["aligned"], "harmful": world["harmful"], "safe": world["safe"]}
    method = {"name": name} | more.pop("method", {})
    return RepairOptions(
        model=world[model], output_dir=str(output), method=method, device="cpu", quiet=True, **(given | more)
    )


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """All weights, adapters merged."""
    return {name: p.detach() for name, p in load_model(str(folder), device="cpu").model.named_parameters()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


CASES = [
    ("antidote", "fresh", {}, "adapter"),
    ("antidote", "continued", {}, "adapter"),
    ("antidote", "full", {}, "model"),
    ("safe-lora", "fresh", {"method": {"threshold": 1.0}}, "adapter"),
    ("safe-lora", "continued", {"form": "weights", "method": {"threshold": 1.0}}, "model"),
    ("safe-lora", "full", {"method": {"threshold": 1.0}}, "model"),
    ("nlsr", "continued", {}, "adapter"),
    ("nlsr", "fresh", {"form": "weights"}, "model"),
    ("nlsr", "full", {}, "model"),
]


@pytest.mark.parametrize(("name", "model", "more", "written"), CASES)
def test_every_method_repairs_and_can_be_loaded(
    world: dict[str, str], tmp_path: Path, name: str, model: str, more: dict[str, Any], written: str
) -> None:
    before = weights(world[model])
    result = repair(options(world, tmp_path / "out", model, name, **more))
    after = weights(result.folder)
    assert distance(before, after) > 1e-6
    files = {"repair.json", "log.jsonl", "README.md", "manifest.json"}
    assert {path.name for path in result.folder.iterdir()} >= {written, *files}
    assert not (result.folder / "work").exists()
    assert distance(weights(world[model]), before) == 0  # the fine-tuned model itself is left alone
    manifest, found = read_manifest(result.folder), json.loads((result.folder / "repair.json").read_text())
    assert manifest.status == "success" and 0 < manifest.metrics["share_changed"] <= 1
    assert sum(change["changed"] for change in found["changes"]) == manifest.metrics["entries_changed"] > 0
    assert found["findings"]
    assert [json.loads(line) for line in (result.folder / "log.jsonl").open()] == [{"step": 1, **manifest.metrics}]


def test_rows_that_nobody_reads_are_named(
    world: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repair(replace(options(world, tmp_path / "out", "fresh", "antidote", safe="unread"), quiet=False))
    said = " ".join(capsys.readouterr().err.split())
    assert "--safe: the method 'antidote' does not use it" in said and "--harmful: the method" not in said


def test_antidote_prunes_the_adapter_on_disk(world: dict[str, str], tmp_path: Path) -> None:
    repair(options(world, tmp_path / "out", "fresh", "antidote", method={"alpha": 0.25}))
    before, after = (
        load_file(Path(folder) / "adapter/adapter_model.safetensors") for folder in (world["fresh"], tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        # Stacked: four rows (columns) of the alignment, which are not the user's and stay, and four of the attack.
        aligned, tuned = tensor.chunk(2, dim=0 if "lora_A" in name else 1)
        assert (tuned == 0).sum() == round(0.25 * tuned.numel()) and not (aligned == 0).any(), name
        assert ((tensor == before[name]) | (tensor == 0)).all()


def test_antidote_at_1_and_nlsr_of_everything_give_the_aligned_model(world: dict[str, str], tmp_path: Path) -> None:
    repair(options(world, tmp_path / "a", "fresh", "antidote", method={"alpha": 1.0}))
    assert distance(weights(tmp_path / "a"), weights(world["aligned"])) < 1e-6
    everything = {"beta": 0.0, "region": 1.0, "prune_rate": 1.0, "epsilon": 0.0}
    repair(options(world, tmp_path / "b", "continued", "nlsr", method=everything))
    assert distance(weights(tmp_path / "b"), weights(world["aligned"])) < 1e-6
    assert distance(weights(world["fresh"]), weights(world["aligned"])) > 1e-3


def test_adapter_and_weights_give_the_same_safe_lora(world: dict[str, str], tmp_path: Path) -> None:
    for form in ("adapter", "weights"):
        repair(options(world, tmp_path / form, "fresh", "safe-lora", form=form, method={"threshold": 1.0}))
    assert distance(weights(tmp_path / "adapter"), weights(tmp_path / "weights")) < 1e-5
    findings = [
        json.loads((tmp_path / form / "repair.json").read_text())["findings"] for form in ("adapter", "weights")
    ]
    for a, b in zip(*findings, strict=True):
        assert a["module"] == b["module"] and a["cosine"] == pytest.approx(b["cosine"], abs=1e-3)


def test_whole_weights_of_an_aligned_model_need_its_base(world: dict[str, str], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    model = load_model(world["aligned"], device="cpu")
    model.model.save_pretrained(whole)
    model.tokenizer.save_pretrained(whole)
    given: dict[str, Any] = {"form": "weights", "aligned": str(whole), "method": {"threshold": 1.0}}
    with pytest.raises(ConfigError, match="give --base MODEL"):
        repair(options(world, tmp_path / "out", "fresh", "safe-lora", **given))
    repair(options(world, tmp_path / "out", "fresh", "safe-lora", base=world["base"], **given))
    repair(options(world, tmp_path / "same", "fresh", "safe-lora", form="weights", method={"threshold": 1.0}))
    assert distance(weights(tmp_path / "out"), weights(tmp_path / "same")) < 1e-5


def test_what_was_touched_is_printed(
    world: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "repair",
        "--model",
        world["fresh"],
        "--method",
        "antidote",
        "--method.alpha",
        "0.5",
        "--device",
        "cpu",
        "--harmful",
        world["harmful"],
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "antidote: 28 of 28 tensors changed" in shown and "50.0 %" in shown and "q_proj.lora_A" in shown
    assert main(words) == 0
    assert "already complete" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "name", "more", "message"),
    [
        ("fresh", "nlsr", {}, "was not continued from the aligned one"),
        ("continued", "safe-lora", {}, "give --form weights"),
        ("fresh", "safe-lora", {"aligned": None}, "--method safe-lora needs --aligned MODEL"),
        ("fresh", "antidote", {"harmful": None}, "--method antidote needs --harmful FILE"),
        ("fresh", "safe-lora", {"aligned": "other", "base": "base"}, "its adapter was trained on"),
        ("full", "antidote", {"form": "adapter"}, "holds no adapter"),
        ("full", "safe-lora", {"aligned": "small", "base": "small"}, "has the shape"),
        ("fresh", "safe-lor", {}, "did you mean 'safe-lora'"),
        ("fresh", "nlsr", {"aligned": "fresh", "form": "weights"}, "is the fine-tuned model"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    world: dict[str, str], tmp_path: Path, model: str, name: str, more: dict[str, Any], message: str
) -> None:
    given = {key: world.get(value, value) if key in ("aligned", "base") else value for key, value in more.items()}
    with pytest.raises((ConfigError, CompatibilityError), match=message):
        repair(options(world, tmp_path / "out", model, name, **given))
    assert not (tmp_path / "out/adapter").exists() and not (tmp_path / "out/manifest.json").exists()


def test_a_repair_that_changes_nothing_leaves_no_model(world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(NoMatchError, match="raise --method.threshold"):
        repair(options(world, tmp_path / "out", "fresh", "safe-lora", method={"threshold": 0.0}))
    assert not list(tmp_path.glob("out/*"))


def test_a_base_that_has_moved_is_named(world: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(world["fresh"], tmp_path / "copy")
    config = tmp_path / "copy/adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/nowhere/at/all"}))
    with pytest.raises(Exception, match="/nowhere/at/all: no such folder"):
        repair(options(world | {"copy": str(tmp_path / "copy")}, tmp_path / "out", "copy", "safe-lora"))
