"""Training options: checked against transformers, with the reason where one is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from pharmacist.core.config import parse
from pharmacist.core.errors import CompatibilityError, ConfigError, NoMatchError
from pharmacist.nn.models import load_model, wrap_model
from pharmacist.pipeline.align import AlignOptions
from pharmacist.training import options as own
from pharmacist.training.loop import prepare_model
from pharmacist.training.options import (
    LoraOptions,
    PeftLoraOptions,
    TrainingStageOptions,
    check_train_options,
    train_options,
    training_arguments,
)
from tests.support.tiny import save_tiny_model
from tests.support.training_toy import distance, options, setting, sft, trained


REFUSED = {
    "learning_rat": (1, "TrainingArguments has no such field; did you mean 'learning_rate'?"),
    "spoon": (1, "has no such field; its documentation lists them"),
    "warmup_ratio": (0.1, "transformers no longer has it; give warmup_steps below 1, which is the ratio"),
    "overwrite_output_dir": (True, "transformers no longer has it; use --overwrite"),
    "evaluation_strategy": ("no", "transformers no longer has it; use pharmacist evaluate"),
    "seed": (1, "is decided by another option; use --seed"),
    "output_dir": ("x", "is decided by another option; use --output-dir"),
    "fp16": (True, "is decided by another option; use --dtype bfloat16"),
    "save_steps": (1, "is decided by another option; use --checkpoint-seconds"),
    "label_smoothing_factor": (0.1, "cannot be changed here; leave it out"),
    "eval_on_start": (True, "is decided by another option; use pharmacist evaluate"),
    "per_device_eval_batch_size": (4, "is decided by another option; use pharmacist evaluate"),
    "hub_model_id": ("me/mine", "is decided by another option; use the Hub's own tools"),
    "ignore_data_skip": (True, "cannot be changed here; leave it out"),
    "max_steps": ("many", "'many' does not fit"),
    "num_train_epochs": ("nan", "'nan' is not a finite number"),
    "learning_rate": (float("inf"), "inf is not a finite number"),
    "weight_decay": ([1], r"\[1\] does not fit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_a_remedy(name: str) -> None:
    value, message = REFUSED[name]
    with pytest.raises(ConfigError, match=f"^train.{name}: .*{message}".replace("?", r"\?")) as caught:
        check_train_options({"per_device_train_batch_size": 3, name: value})
    assert "\n" not in str(caught.value)


def test_every_name_that_is_spoken_of_is_one() -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)}
    assert {*own._SET_BY_OPTION, *own._FIXED} <= known
    assert not {*own._REMOVED} & known


def test_text_becomes_what_the_field_holds() -> None:
    given = {"learning_rate": "1e-3", "max_steps": "20", "gradient_checkpointing": "true", "optim": "adamw_torch"}
    checked = check_train_options(given)
    assert checked == {"learning_rate": 1e-3, "max_steps": 20, "gradient_checkpointing": True, "optim": "adamw_torch"}
    assert isinstance(checked["learning_rate"], float) and isinstance(checked["max_steps"], int)
    assert check_train_options({}) == {}


def test_the_command_line_and_a_file_give_the_same(tmp_path: Path) -> None:
    config = tmp_path / "align.yaml"
    config.write_text("train:\n  learning_rate: 1e-3\n  max_steps: 20\nlora:\n  r: 2\n  target_modules: [q_proj]\n")
    common = ["--data", "d", "--model", "m", "--output-dir", "o"]
    line = "--train.learning_rate 1e-3 --train.max_steps 20 --lora.r 2 --lora.target_modules [q_proj]".split()
    assert parse(AlignOptions, [*common, "--config", str(config)]) == (on_line := parse(AlignOptions, common + line))
    assert on_line.train == {"learning_rate": 1e-3, "max_steps": 20}
    assert on_line.effective_train["learning_rate"] == 1e-3
    assert on_line.effective_train["num_train_epochs"] == 20.0  # the stage's own default
    assert on_line.lora.target_modules == ["q_proj"]


@pytest.mark.parametrize("given", [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_adapters_of_no_shape_are_refused(given: dict) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(given))} must"):
        LoraOptions(**given)


def test_negative_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^max_length must not be negative, not -1"):
        TrainingStageOptions(output_dir=str(tmp_path), model="m", max_length=-1)


def test_arguments_are_what_the_stage_says(model: Path, tmp_path: Path) -> None:
    given = options(model, tmp_path, lr_scheduler_type="cosine")
    made = training_arguments(given, folder=str(tmp_path), device=torch.device("cpu"), bf16=True, seed=5)
    assert (made.seed, made.data_seed, made.bf16, made.use_cpu) == (5, 5, True, True)
    assert (made.lr_scheduler_type, made.learning_rate) == ("cosine", 1e-2)
    assert (made.report_to, made.remove_unused_columns, made.logging_nan_inf_filter) == ([], False, False)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_recomputed_activations_change_nothing(model: Path, tmp_path: Path, name: str) -> None:
    plain = setting(options(model, tmp_path / "a"))
    recomputed = setting(options(model, tmp_path / "b", **{name: True}))
    calls = {}
    for ours in (plain, recomputed):
        base = ours.loaded.model.get_base_model()
        reads = base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls[id(ours)].append(1))  # noqa: B023
        calls[id(ours)] = []
        trained(ours, sft())
        reads.remove()
    assert [len(made) for made in calls.values()] == [4, 8]  # it does recompute
    assert distance(plain.weights(), recomputed.weights()) < 1e-6


@pytest.mark.parametrize(
    "given", [{"lr_scheduler_type": "spoon"}, {"optim": "spoon"}, {"learning_rate": -1.0}, {"max_grad_norm": "x"}]
)
def test_what_only_transformers_refuses_is_one_line_too(model: Path, tmp_path: Path, given: dict) -> None:
    with pytest.raises(ConfigError, match=r"^train[.:]") as caught:
        trained(setting(options(model, tmp_path, **given)), sft())
    assert "\n" not in str(caught.value)


def test_modules_that_are_not_there(model: Path, tmp_path: Path) -> None:
    given = options(model, tmp_path)
    given.lora.target_modules = ["spoon_proj", "fork_proj"]
    with pytest.raises(NoMatchError, match="^lora.target_modules: .* to spoon_proj, fork_proj of .* not found"):
        setting(given)


@pytest.mark.parametrize(("name", "kind"), [("input_layernorm", "LlamaRMSNorm"), ("mlp", "LlamaMLP")])
def test_modules_that_can_have_no_adapter(name: str, kind: str, model: Path, tmp_path: Path) -> None:
    given = options(model, tmp_path)
    given.lora.target_modules = [name]
    with pytest.raises(NoMatchError, match=rf"no adapter to {name} of .*\(Target module {kind}.*; name linear") as got:
        setting(given)
    assert "\n" not in str(got.value)


@pytest.mark.parametrize("given", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 2}])
def test_rows_that_would_all_be_dropped(given: dict, model: Path, tmp_path: Path) -> None:
    given = given | {"dataloader_drop_last": True}
    with pytest.raises(ConfigError, match="train.dataloader_drop_last: there are fewer rows than a batch"):
        trained(setting(options(model, tmp_path / "refused", per_device_train_batch_size=50, **given)), sft())
    whole = setting(options(model, tmp_path / "kept", per_device_train_batch_size=12, **given))
    assert trained(whole, sft()).steps == 2


def test_the_adapter_goes_where_it_should(model: Path, tmp_path: Path) -> None:
    given = options(model, tmp_path)
    names = setting(given).weights()
    found = {name.split(".lora_")[0].rpartition(".")[2] for name in names}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    given.lora.target_modules = ["q_proj"]
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in setting(given).weights()} == {"q_proj"}


def test_equal_seeds_give_equal_adapters_and_others_do_not(model: Path, tmp_path: Path) -> None:
    given, other = options(model, tmp_path), options(model, tmp_path)
    other.seed += 1
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    first = setting(given).weights()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(1)
    second = setting(given).weights()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    third = setting(other).weights()
    assert not all(torch.equal(value, third[name]) for name, value in first.items())


def test_full_tuning_trains_everything_in_single_precision(model: Path, tmp_path: Path) -> None:
    given = options(model, tmp_path, max_steps=2)
    given.tuning, given.dtype = "full", "bfloat16"
    run = setting(given)
    assert {value.dtype for value in run.weights().values()} == {torch.float32}
    assert len(run.weights()) == len(list(run.model.parameters()))
    before = run.weights()
    trained(run, sft())
    assert all(not torch.equal(value, before[name]) for name, value in run.weights().items())


def prepared(folder: Path, config: LoraConfig) -> tuple[Any, Any]:
    """A model of the caller's, and what is trained of it."""
    own = AutoModelForCausalLM.from_pretrained(folder)
    given = options(folder, folder / "out")
    given.lora = PeftLoraOptions.of(config)
    return own, prepare_model(load_model(wrap_model(own, AutoTokenizer.from_pretrained(folder))), given).model


def test_biases_are_trained_in_a_copy_of_the_callers_model(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, attention_bias=True)
    own, made = prepared(folder, LoraConfig(bias="all", target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trained_ones = {name: value for name, value in made.named_parameters() if value.requires_grad}
    assert any("q_proj" in name and name.endswith("bias") for name in trained_ones)
    assert not {value.data_ptr() for value in trained_ones.values()} & {p.data_ptr() for p in own.parameters()}


def test_a_bias_that_could_not_be_merged_is_refused_before_the_training(model: Path, tmp_path: Path) -> None:
    config = LoraConfig(lora_bias=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(CompatibilityError, match="peft_config: lora_bias has nothing .*q_proj has no bias; leave it"):
        prepared(model, config)
    prepared(save_tiny_model(tmp_path, attention_bias=True), config)


def test_what_arguments_from_python_decide_in_vain_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = TrainingArguments(use_cpu=True, save_steps=3, data_seed=1)
    assert train_options(arguments, {}) == {}
    assert "args: no effect here: save_steps, data_seed" in capsys.readouterr().err
    train_options(TrainingArguments(use_cpu=True, output_dir="elsewhere", seed=3), {})
    assert not capsys.readouterr().err
