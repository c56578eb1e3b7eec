"""A user's own Trainer, and TRL's, with a strategy that draws from a second set of rows."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import pharmacist as ph
from pharmacist.core.errors import CompatibilityError, ConfigError, DataError
from pharmacist.training import trainer as trainer_module
from pharmacist.training.checkpoint import newest_checkpoint
from pharmacist.training.strategy import StepContext
from pharmacist.training.trainer import token_mean_loss
from tests.support.pairs import Pairs
from tests.support.training_toy import Stop, Toy, distance, rows, same


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class MyTrainer(ph.StrategyMixin, SFTTrainer):
    """All that a user writes for TRL."""


def make(kind: str, model: Path, output: Path, strategy: Any, *callbacks: Any, **more: Any) -> Any:
    """A trainer of either kind (or of all weights, ``full``), on the same rows."""
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
    shared = {
        "model": own if kind == "full" else get_peft_model(own, LORA),
        "train_dataset": ph.tokenize(rows().remove_columns("row"), tokenizer, max_length=64),
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
    } | shared
    return ph.StrategyTrainer(args=TrainingArguments(**given), **shared)


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
    with pytest.raises(DataError, match="checkpoint-4: has no strategy.json, .*; delete it to continue"):
        make(kind, model, tmp_path / "cut", **booster).train(resume_from_checkpoint=True)


def test_what_is_missing_is_said_before_any_step(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match="booster draws from 'harmful' rows; give streams="):
        make("transformers", model, tmp_path, ph.Booster())
    with pytest.raises(DataError, match="'harmful' holds no tokenised rows; pharmacist.tokenize makes them"):
        make("transformers", model, tmp_path, ph.Booster(), streams={"harmful": rows()})
    with pytest.raises(DataError, match="'paired' rows need their partners; give pharmacist.data.streams.PairedRows"):
        make("transformers", model, tmp_path, ph.RepNoise(), streams={"paired": harmful(model)})
    safe = {"safe": harmful(model)}
    with pytest.raises(CompatibilityError, match="VLGuard.* only mixes the safe rows into the training set"):
        make("transformers", model, tmp_path, ph.VLGuard(), streams=safe)
    make("transformers", model, tmp_path, ph.VLGuard(mode="joint"), streams=safe).train()


def test_pairs_of_rows_without_numbers_are_refused(model: Path, tmp_path: Path) -> None:
    trainer = make("transformers", model, tmp_path, ph.RepNoise(), streams={"paired": Pairs()})
    with pytest.raises(CompatibilityError, match="batches have no column 'row'; .* remove_unused_columns=False"):
        trainer.train()


def test_pairs_of_rows_that_are_padded_in_front_are_refused(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    numbered = ph.tokenize(rows().remove_columns("row"), tokenizer, max_length=64)
    own = {
        "streams": {"paired": Pairs()},
        "train_dataset": numbered.add_column("row", list(range(len(numbered)))),
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
        "arguments": {"remove_unused_columns": False},
    }
    with pytest.raises(CompatibilityError, match="set the tokenizer's padding_side to 'right'"):
        make("transformers", model, tmp_path, ph.RepNoise(), **own).train()


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


def test_a_compiled_model_that_passes_over_a_strategy_is_refused(model: Path, tmp_path: Path) -> None:
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    with pytest.raises(CompatibilityError, match="passes over what vaccine does; drop torch_compile"):
        make("full", model, tmp_path, ph.Vaccine(), arguments=compiled).train()
    plain, fast = (make("full", model, tmp_path, ph.SFT(), arguments=own) for own in ({}, compiled))
    for trainer in (plain, fast):
        trainer.train()
    assert distance(weights(plain), weights(fast)) < 1e-5


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
    for endless in (harmful(model).to_iterable_dataset(), DataLoader(harmful(model))):
        with pytest.raises(DataError, match=f"'harmful' .{type(endless).__name__}. holds no rows by number; give a"):
            make("transformers", model, tmp_path, ph.Booster(), streams={"harmful": endless})


TAR_ONE_STEP = ph.TAR(form="one-step", lam=0.1, representation=1.0)
ANCHORED = [ph.KL(lam=50), ph.LDIFS(lam=100), ph.ConstrainedSFT(beta=1), ph.EWC(lam=1e3, rows=4), TAR_ONE_STEP]


@pytest.mark.parametrize("strategy", ANCHORED, ids=lambda strategy: strategy.name)
def test_a_trainer_that_resumes_its_own_training_stays_close_to_what_it_began_with(
    model: Path, tmp_path: Path, strategy: Any
) -> None:
    def of(name: str) -> Any:
        streams = {stream: harmful(model) for stream in strategy.streams}
        return make("full", model, tmp_path / name, type(strategy)(strategy.config), streams=streams)

    straight, cut = of("straight"), of("cut")
    straight.train()
    cut.add_callback(Stop(3))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    cut.remove_callback(Stop)
    cut.train(resume_from_checkpoint=True)
    assert same(weights(cut), weights(straight))


def test_a_further_training_begins_with_the_weights_as_they_are(model: Path, tmp_path: Path) -> None:
    trainer = make("full", model, tmp_path, ph.KL(lam=50))
    trainer.train()
    now = weights(trainer)
    trainer.train()
    assert same(trainer.strategy.start, now)


ALIKE = [ph.SFT(), ph.Vaccine(rho=0.5), *ANCHORED[:4], ph.Lisa(rho=10, align_steps=1, finetune_steps=3)]


@pytest.mark.parametrize("strategy", ALIKE, ids=lambda strategy: strategy.name)
def test_a_model_that_is_not_told_the_number_of_tokens_is_trained_alike(
    model: Path, tmp_path: Path, strategy: Any
) -> None:
    same_length = [{"prompt": f"a {word}", "completion": f"{word} c"} for word in "abcdefgh"]
    data = ph.tokenize(same_length, AutoTokenizer.from_pretrained(model))
    assert len({len(row["input_ids"]) for row in data}) == 1
    found, logged = [], []
    for told in (True, False):
        streams = {"streams": {"safe": data}} if "safe" in strategy.streams else {}
        arguments = {"gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.1}
        own = type(strategy)(strategy.config)
        trainer = make("full", model, tmp_path, own, train_dataset=data, arguments=arguments, **streams)
        trainer.model_accepts_loss_kwargs = told
        trainer.train()
        found.append(weights(trainer))
        logged.append([line for line in trainer.state.log_history if "loss" in line])
    assert distance(*found) < 1e-6
    for told, untold in zip(*logged, strict=True):
        assert told == pytest.approx(untold, rel=1e-3, abs=1e-5)


def test_counts_and_sums_of_a_training_that_was_cut_are_forgotten(model: Path, tmp_path: Path) -> None:
    class Numbered(Toy):
        micros: list[tuple[int, int]] = []

        def auxiliary(self, step: StepContext) -> None:
            self.micros.append((step.update, step.micro))
            step.log(update=step.update)
            if len(self.micros) == 2:
                raise KeyboardInterrupt

    arguments = {"max_steps": 2, "gradient_accumulation_steps": 3}
    trainer = make("transformers", model, tmp_path, Numbered(), arguments=arguments)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.without_targets = 5
    trainer.train()
    assert Numbered.micros == [(0, 0), (0, 1), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert trainer.without_targets == 0


def test_weights_of_rows_are_for_the_training_alone(model: Path, tmp_path: Path) -> None:
    def own(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return token_mean_loss(outputs, labels) + 100

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = dict(plain.data_collator(items))
        return batch | {"row": torch.arange(len(items)), "weight": torch.full((len(items),), 2.0)}

    plain = make("transformers", model, tmp_path, ph.SFT())
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 5}
    more = {"data_collator": collate, "eval_dataset": plain.train_dataset, "arguments": arguments}
    for function in (None, own):
        trainer = make("transformers", model, tmp_path, ph.SFT(), compute_loss_func=function, **more)
        trainer.train()
        assert trainer.compute_loss_func is function
        losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
        assert len(losses) == 2 and all((loss > 100) == (function is own) for loss in losses)


class Doubled(Trainer):
    """A loss of the user's own."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss


class Mixed(ph.StrategyMixin, Doubled):
    """The loss within the strategy's terms."""


class Outside(ph.StrategyTrainer):
    """The loss instead of them."""

    compute_loss = Doubled.compute_loss


def test_a_loss_of_the_users_own_does_not_hide_the_terms_of_a_strategy(model: Path, tmp_path: Path) -> None:
    def own(kind: Any, strategy: Any) -> Any:
        plain = make("full", model, tmp_path, strategy, arguments={"optim": "sgd", "learning_rate": 0.1})
        given = {"train_dataset": plain.train_dataset, "data_collator": plain.data_collator}
        trainer = kind(plain.model, plain.args, strategy=strategy, **given)
        trainer.train()
        return trainer

    assert distance(*(weights(own(Mixed, strategy)) for strategy in (ph.KL(lam=50), ph.SFT()))) > 1e-4
    with pytest.raises(CompatibilityError, match=r"Outside.compute_loss does not call super.*, which applies kl; "):
        own(Outside, ph.KL(lam=50))
    own(Outside, ph.SFT())


def test_batches_without_labels_are_refused(model: Path, tmp_path: Path) -> None:
    bare = make("full", model, tmp_path, ph.SFT()).train_dataset.remove_columns("labels")
    with pytest.raises(DataError, match="batches have no labels; give rows of pharmacist.tokenize"):
        make("full", model, tmp_path, ph.SFT(), train_dataset=bare).train()


def test_another_model_and_unequal_tokens_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CompatibilityError, match="model_init makes another model .*; give model=MODEL"):
        ph.StrategyTrainer(
            args=TrainingArguments(str(tmp_path), use_cpu=True),
            strategy=ph.SFT(),
            model_init=lambda: AutoModelForCausalLM.from_pretrained(model),
        )
    unequal = {"average_tokens_across_devices": False}
    make("full", model, tmp_path, ph.SFT(), arguments=unequal)
    monkeypatch.setattr(trainer_module, "world_size", lambda: 2)
    with pytest.raises(CompatibilityError, match="average_tokens_across_devices=False .*leave it out"):
        make("full", model, tmp_path, ph.SFT(), arguments=unequal)
    make("full", model, tmp_path, ph.SFT())
