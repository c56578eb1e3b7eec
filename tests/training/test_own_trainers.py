"""A user's own Trainer, and TRL's, with a strategy that draws from a second set of rows."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments
from trl import SFTConfig, SFTTrainer

import pharmacist as ph
from pharmacist.core.errors import CompatibilityError, ConfigError, DataError
from pharmacist.training.checkpoint import newest_checkpoint
from tests.support.pairs import Pairs
from tests.support.training_toy import Stop, rows, same


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class MyTrainer(ph.StrategyMixin, SFTTrainer):
    """All that a user writes for TRL."""


def make(kind: str, model: Path, output: Path, strategy: Any, *callbacks: Any, **more: Any) -> Any:
    """A trainer of either kind, on the same rows."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    given = {
        "output_dir": str(output),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    given |= more.pop("arguments", {})
    shared = {"strategy": strategy, "callbacks": list(callbacks), "processing_class": tokenizer} | more
    if kind == "trl":
        pairs = [{"prompt": row["prompt"], "completion": " " + row["completion"]} for row in rows()]
        arguments = SFTConfig(**given, max_length=64)
        return MyTrainer(own, arguments, train_dataset=datasets.Dataset.from_list(pairs), peft_config=LORA, **shared)
    return ph.StrategyTrainer(
        get_peft_model(own, LORA),
        TrainingArguments(**given),
        train_dataset=ph.tokenize(rows().remove_columns("row"), tokenizer, max_length=64),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        **shared,
    )


def harmful(model: Path) -> datasets.Dataset:
    """Another dozen of rows in tokens."""
    return ph.tokenize(rows(seed=1).remove_columns("row"), AutoTokenizer.from_pretrained(model), max_length=64)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """What was trained."""
    own = trainer.model.named_parameters()
    return {name: value.detach().clone() for name, value in own if value.requires_grad}


def test_rows_in_tokens_are_those_of_the_stages(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    own = [{"prompt": "a b", "chosen": "c", "rejected": "d e"}]
    found, other = ph.tokenize(own, tokenizer), ph.tokenize(own, tokenizer, side="rejected")
    assert found.column_names == ["input_ids", "labels"]
    ids, labels = found[0]["input_ids"], found[0]["labels"]
    targets = [label for label in labels if label != -100]
    assert ids[-1] == tokenizer.eos_token_id and ids[-len(targets) :] == targets and len(targets) == 2
    assert other[0]["input_ids"][: len(ids) - 2] == ids[:-2] and other[0]["input_ids"] != ids


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_a_strategy_acts_in_a_users_own_trainer_and_is_resumed(model: Path, tmp_path: Path, kind: str) -> None:
    booster = {"strategy": ph.Booster(lam=5, alpha=0.1), "streams": {"harmful": harmful(model)}}
    plain = make(kind, model, tmp_path / "plain", ph.SFT())
    straight = make(kind, model, tmp_path / "straight", **booster)
    for trainer in (plain, straight):
        trainer.train()
    assert not same(weights(plain), weights(straight))
    losses = [line["harmful_loss"] for line in straight.state.log_history if "harmful_loss" in line]
    assert len(losses) == 4 and all(loss > 0 for loss in losses)
    cut = make(kind, model, tmp_path / "cut", booster["strategy"], Stop(3), streams=booster["streams"])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = make(kind, model, tmp_path / "cut", **booster)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), weights(straight))
    other = booster | {"streams": {"harmful": iter([])}}
    with pytest.raises(DataError, match="checkpoint-4: was trained with a stream 'harmful' that can resume, and now"):
        make(kind, model, tmp_path / "cut", **other).train(resume_from_checkpoint=True)
    (tmp_path / "cut/checkpoint-4/strategy.json").unlink()  # as after a kill before it was written
    with pytest.raises(DataError, match="checkpoint-4: has no strategy.json, .*; delete it to go on"):
        make(kind, model, tmp_path / "cut", **booster).train(resume_from_checkpoint=True)


def test_what_is_missing_is_said_before_any_step(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match="booster draws from 'harmful' rows; give streams="):
        make("transformers", model, tmp_path, ph.Booster())
    with pytest.raises(DataError, match="'harmful' holds no tokenised rows; pharmacist.tokenize makes them"):
        make("transformers", model, tmp_path, ph.Booster(), streams={"harmful": rows()})
    safe = {"safe": harmful(model)}
    with pytest.raises(CompatibilityError, match="VLGuard.* only mixes the safe rows into the training set"):
        make("transformers", model, tmp_path, ph.VLGuard(), streams=safe)
    make("transformers", model, tmp_path, ph.VLGuard(mode="joint"), streams=safe).train()


def test_pairs_of_rows_without_numbers_are_refused(model: Path, tmp_path: Path) -> None:
    trainer = make("transformers", model, tmp_path, ph.RepNoise(), streams={"paired": Pairs()})
    with pytest.raises(CompatibilityError, match="batches have no column 'row'; .* remove_unused_columns=False"):
        trainer.train()


def test_what_a_strategy_found_is_kept(model: Path, tmp_path: Path) -> None:
    trainer = make(
        "transformers",
        model,
        tmp_path,
        ph.TVaccine(rho=0.5, layers=1, score_rows=2),
        streams={"harmful": harmful(model)},
    )
    trainer.train()
    assert trainer.found["sampled_at_a_time"] == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("strategy", [ph.KL(lam=50), ph.ConstrainedSFT(beta=1)], ids=lambda strategy: strategy.name)
def test_a_strategy_that_reads_outputs_acts_in_trl(model: Path, tmp_path: Path, strategy: Any) -> None:
    plain, defended = (make("trl", model, tmp_path / own.name, own) for own in (ph.SFT(), strategy))
    for trainer in (plain, defended):
        trainer.train()
    assert not same(weights(plain), weights(defended))


def test_batches_and_checkpointing_that_hide_gradients_are_refused(model: Path, tmp_path: Path) -> None:
    packed = {"packing": True}
    with pytest.raises(CompatibilityError, match="vaccine needs batches with an attention_mask, .*='wrapped'"):
        make("trl", model, tmp_path, ph.Vaccine(), arguments=packed).train()
    make("trl", model, tmp_path, ph.SFT(), arguments=packed).train()
    kind: dict[str, Any] = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(CompatibilityError, match="vaccine cannot see gradients under reentrant"):
        make("transformers", model, tmp_path, ph.Vaccine(), arguments=kind).train()
    kind["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    make("transformers", model, tmp_path, ph.Vaccine(), arguments=kind).train()


def test_checkpoints_of_an_adapter_with_a_name_of_its_own_are_whole(model: Path, tmp_path: Path) -> None:
    trainer = make("transformers", model, tmp_path, ph.SFT())
    trainer.model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LORA, adapter_name="mine")
    trainer.train()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / "mine" / "adapter_model.safetensors").write_bytes(b"damaged")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_what_is_no_strategy_or_stream_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="strategy: must be a method such as"):
        make("transformers", model, tmp_path, ph.Vaccine)
    endless = {"harmful": harmful(model).to_iterable_dataset()}
    with pytest.raises(DataError, match="'harmful' .IterableDataset. has no length"):
        make("transformers", model, tmp_path, ph.Booster(), streams=endless)
