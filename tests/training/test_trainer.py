"""The Trainer side of strategies: what is added where, and that nothing else changes."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from pharmacist.core.errors import CompatibilityError, ConfigError, DataError, PharmacistError
from pharmacist.nn import reading
from pharmacist.nn.grads import Gradient
from pharmacist.nn.losses import batch_loss
from pharmacist.training.loop import _collate
from pharmacist.training.strategy import StepContext
from pharmacist.training.trainer import StrategyMixin, StrategyTrainer
from tests.support.training_toy import (
    Alone,
    Constant,
    Numbers,
    Toy,
    Twice,
    Watch,
    distance,
    options,
    rows,
    same,
    setting,
    sft,
    trained,
    trainer,
)


def logged(own: Trainer, key: str) -> list[float]:
    return [line[key] for line in own.state.log_history if key in line]


class Broken(Toy):
    """Has an error of ours in it."""

    def auxiliary(self, step: StepContext) -> Gradient:
        raise ValueError("too many values to unpack")


def test_an_error_of_ours_is_not_taken_for_bad_options(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too many values") as caught:
        trained(setting(options(model, tmp_path)), Broken())
    assert not isinstance(caught.value, PharmacistError)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_is_the_stock_trainer(model: Path, tmp_path: Path, accumulation: int) -> None:
    given = {"dropout": 0.2, "max_steps": 7, "gradient_accumulation_steps": accumulation, "max_grad_norm": 1.0}
    ours, stock, other = (setting(options(model, tmp_path, **given)) for _ in range(3))
    before = ours.weights()
    runs = []
    for own, strategy in ((ours, sft()), (stock, None), (other, Constant(1e-3))):
        runs.append(trainer(own, strategy, cls=Trainer if strategy is None else StrategyTrainer))  # seeds the dropout
        runs[-1].train()
    assert same(ours.weights(), stock.weights())
    assert logged(runs[0], "loss") == logged(runs[1], "loss") and len(logged(runs[0], "loss")) == 7
    assert logged(runs[0], "grad_norm") == logged(runs[1], "grad_norm")
    assert all(not torch.equal(value, before[name]) for name, value in ours.weights().items())
    assert not same(ours.weights(), other.weights())  # the comparison can tell


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_auxiliary_gradient_ends_in_grad_exactly(model: Path, tmp_path: Path, accumulation: int) -> None:
    grads = {}
    for name, strategy in {"alone": Alone(), "added": Constant(), "plain": sft()}.items():
        own, watch = setting(options(model, tmp_path, gradient_accumulation_steps=accumulation)), Watch()
        trainer(own, strategy, watch).train()
        assert watch.grads[0].keys() == own.weights().keys()
        grads[name] = watch.grads[0]
    assert all(bool((grad == 0.5).all()) for grad in grads["alone"].values())
    if accumulation == 1:
        assert same(grads["added"], {name: grad + 0.5 for name, grad in grads["plain"].items()})
    else:
        assert distance(grads["added"], {name: grad + 0.5 for name, grad in grads["plain"].items()}) < 1e-6


def test_a_strategy_of_no_strength_is_sft(model: Path, tmp_path: Path) -> None:
    class Idle(Toy):
        def auxiliary(self, step: StepContext) -> None:
            return None

        def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
            return loss

    given = options(model, tmp_path, dropout=0.2, max_steps=5)
    plain, idle = setting(given), setting(given)
    trainer(plain, sft()).train()
    trainer(idle, Idle()).train()
    assert same(plain.weights(), idle.weights())


class Diary(Toy):
    """Writes down what happens in which order."""

    def __init__(self, broken: str = "") -> None:
        super().__init__()
        self.broken, self.events = broken, []
        self.closed = 0

    def setup(self, model: Any, seed: int) -> dict[str, Any]:
        parameter = next(p for p in model.parameters() if p.requires_grad)
        model.register_forward_hook(lambda *_: self.events.append("forward"))
        parameter.register_post_accumulate_grad_hook(lambda _: self.note("backward"))
        return {"found": 1}

    def note(self, event: str) -> None:
        self.events.append(event)
        if event == self.broken:
            raise RuntimeError(event)

    def begin_update(self, update: int) -> None:
        self.note(f"update {update}")

    def auxiliary(self, step: StepContext) -> None:
        self.note(f"auxiliary {step.micro}")

    @contextmanager
    def around(self, step: StepContext) -> Iterator[None]:
        self.note("open")
        try:
            yield
        finally:
            self.note("shut")

    def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        self.note("objective")
        return loss

    def after_backward(self, step: StepContext) -> None:
        self.note("after")

    def close(self) -> None:
        self.closed += 1


MICRO = ["open", "forward", "objective", "backward", "shut", "after"]


def test_hooks_come_in_order_and_around_covers_both_passes(model: Path, tmp_path: Path) -> None:
    diary = Diary()
    result = trained(setting(options(model, tmp_path, max_steps=2, gradient_accumulation_steps=2)), diary)
    assert diary.events == [
        "update 0",
        "auxiliary 0",
        *MICRO,
        "auxiliary 1",
        *MICRO,
        "update 1",
        "auxiliary 0",
        *MICRO,
        "auxiliary 1",
        *MICRO,
    ]
    assert diary.closed == 1
    assert result.found == {"found": 1}


@pytest.mark.parametrize("broken", ["objective", "backward"])
def test_around_is_shut_after_an_exception(model: Path, tmp_path: Path, broken: str) -> None:
    diary = Diary(broken)
    with pytest.raises(RuntimeError, match=broken):
        trained(setting(options(model, tmp_path)), diary)
    assert diary.events[-2:] == [broken, "shut"]
    assert diary.closed == 1


def test_accumulated_batches_are_one_batch(model: Path, tmp_path: Path) -> None:
    def first_gradient(size: int, accumulation: int, **more: Any) -> dict[str, torch.Tensor]:
        given = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        own, watch = setting(options(model, tmp_path, **given)), Watch()
        numbers = Numbers(0)
        trainer(own, sft(), watch, collator=numbers, **more).train()
        drawn.append(sum(numbers.batches[:accumulation], []))
        return watch.grads[0]

    def mean_of_means(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return batch_loss(outputs.logits, labels) / 2

    drawn: list[list[int]] = []
    large, small = first_gradient(6, 1), first_gradient(3, 2)
    naive = first_gradient(3, 2, compute_loss_func=mean_of_means)
    assert drawn[0] == drawn[1] == drawn[2]
    assert distance(large, small) < 1e-6
    assert distance(large, naive) > 1e-3  # the rows' lengths do tell the two apart


WEIGHTS = {100 + i: weight for i, weight in enumerate([0.0, 3.0, 0.5, 1.0, 2.0, 0.25, 1.5, 1.0, 0.0, 0.75, 1.0, 1.0])}
assert sum(WEIGHTS.values()) == len(WEIGHTS)


def first_gradient(
    model: Path, output: Path, size: int, accumulation: int, weights: Any = None, strategy: Any = None
) -> tuple[dict[str, torch.Tensor], list[int]]:
    given = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    own, watch, numbers = setting(options(model, output, **given)), Watch(), Numbers(0)
    drawn_from = own.encoded.dataset
    if weights is not None:
        drawn_from = drawn_from.add_column("weight", [weights[number] for number in drawn_from["row"]])
    strategy = sft() if strategy is None else strategy
    trainer(own, strategy, watch, collator=numbers, train_dataset=drawn_from).train()
    return watch.grads[0], sum(numbers.batches[:accumulation], [])


@pytest.mark.parametrize(("size", "accumulation"), [(6, 1), (2, 3), (1, 6)])
def test_weighted_rows_give_the_weighted_sum_of_their_gradients(
    model: Path, tmp_path: Path, size: int, accumulation: int
) -> None:
    found, drawn = first_gradient(model, tmp_path, size, accumulation, WEIGHTS)
    own = setting(options(model, tmp_path))
    at = {number: position for position, number in enumerate(own.encoded.dataset["row"])}
    total, tokens = torch.zeros(()), 0
    for number in drawn:
        batch = _collate([own.encoded.dataset[at[number]]], 0)
        logits = own.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        count = int((batch["labels"] != -100).sum())
        total, tokens = total + WEIGHTS[number] * batch_loss(logits, batch["labels"]) * count, tokens + count
    (total / tokens).backward()
    expected = {name: p.grad for name, p in own.model.named_parameters() if p.grad is not None}
    assert distance(found, expected) < 1e-6
    plain, again = first_gradient(model, tmp_path, size, accumulation)
    assert drawn == again and distance(found, plain) > 1e-3
    ones, _ = first_gradient(model, tmp_path, size, accumulation, dict.fromkeys(WEIGHTS, 1.0))
    assert distance(ones, plain) < 1e-6


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_large_vocabulary_gives_logits_where_there_are_targets(
    model: Path, tmp_path: Path, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reads(Toy):
        def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
            assert outputs.logits.shape[:2] == step.batch["labels"].shape
            return loss

    expected, _ = first_gradient(model, tmp_path, 3, 2, weights)
    seen: list[int] = []
    monkeypatch.setattr(reading, "_LARGE", 1)

    def watched(logits: torch.Tensor, *given: Any) -> torch.Tensor:
        seen.append(logits.dim())
        return batch_loss(logits, *given)

    monkeypatch.setattr("pharmacist.training.trainer.batch_loss", watched)
    found, _ = first_gradient(model, tmp_path, 3, 2, weights)
    assert distance(found, expected) < 1e-6
    found, _ = first_gradient(model, tmp_path, 3, 2, weights, strategy=Reads())
    assert distance(found, expected) < 1e-6
    assert seen == [2, 2, 3, 3]


def test_a_strategys_own_pass_over_the_main_batch_is_weighted_likewise(model: Path, tmp_path: Path) -> None:
    class Again(Alone):
        def auxiliary(self, step: StepContext) -> Any:
            return step.grads(step.main_ce())

    main, drawn = first_gradient(model, tmp_path, 2, 3, WEIGHTS)
    own, again = first_gradient(model, tmp_path, 2, 3, WEIGHTS, Again())
    assert drawn == again and distance(main, own) < 1e-6


def test_a_step_knows_the_tokens_of_its_whole_update(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int, int]] = []

    class Count(Toy):
        def auxiliary(self, step: StepContext) -> None:
            targets = int((step.batch["labels"] != -100).sum())
            seen.append((int(step.tokens), int(step.batch["attention_mask"].sum()), int(step.targets), targets))

    first_gradient(model, tmp_path, 2, 3, strategy=Count())
    assert len(seen) == 3 and len({row[0] for row in seen}) == len({row[2] for row in seen}) == 1
    assert seen[0][0] == sum(row[1] for row in seen) and seen[0][2] == sum(row[3] for row in seen)
    assert len({row[1] for row in seen}) > 1


def test_the_last_and_smaller_accumulation_of_an_epoch_counts_its_own_micro_batches(
    model: Path, tmp_path: Path
) -> None:
    # 12 rows in batches of 2 are 6 micro-batches: 4 and then 2.
    own, watch = setting(options(model, tmp_path, gradient_accumulation_steps=4, max_steps=2)), Watch()
    trainer(own, Alone(), watch).train()
    assert [bool((grad == 0.5).all()) for grads in watch.grads for grad in grads.values()] == [True] * 2 * len(
        own.weights()
    )


class Poison(Toy):
    """Spoils the third update in one way."""

    def __init__(self, how: str, value: float, own: Any) -> None:
        super().__init__()
        self.how, self.value, self.own = how, value, own

    def begin_update(self, update: int) -> None:
        if update == 2:
            self.before = self.own.weights()

    def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        return loss * self.value if self.how == "loss" and step.update == 2 else loss

    def after_backward(self, step: StepContext) -> None:
        if self.how == "gradient" and step.update == 2:
            next(iter(step.parameters.values())).grad[0, 0] = self.value


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_stops_before_the_weights_move(model: Path, tmp_path: Path, how: str, value: float) -> None:
    own, numbers = setting(options(model, tmp_path, gradient_accumulation_steps=2, max_grad_norm=1.0)), Numbers(0)
    poison = Poison(how, value, own)
    what = "loss" if how == "loss" and value != 1e30 else "gradient"  # 1e30 is finite, and its norm is not
    with pytest.raises(DataError, match=f"the {what} is (nan|inf) at step 3 .*the weights were not touched") as caught:
        trainer(own, poison, collator=numbers).train()
    assert same(poison.before, own.weights())
    # It names the rows that were read for this update, and no others.
    third = numbers.batches[4:5] if what == "loss" else numbers.batches[4:6]
    named = re.search(r"\(rows? ([\d, ]+)\)", str(caught.value))
    assert named and [int(row) for row in named[1].split(", ")] == sum(third, [])


def test_a_broken_model_is_noticed_at_its_first_step(model: Path, tmp_path: Path) -> None:
    own = setting(options(model, tmp_path))
    with torch.no_grad():
        own.loaded.model.get_input_embeddings().weight[:] = float("nan")
    before = own.weights()
    with pytest.raises(DataError, match="the loss is nan at step 1"):
        trainer(own, sft()).train()
    assert same(before, own.weights())


class Silent(Numbers):
    """Takes all targets from some batches."""

    def __init__(self, *silent: int) -> None:
        super().__init__(0)
        self.silent = silent

    def __call__(self, items: Any) -> dict[str, torch.Tensor]:
        batch = super().__call__(items)
        if len(self.batches) - 1 in self.silent:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch


def test_a_batch_without_target_is_skipped_and_counted(model: Path, tmp_path: Path) -> None:
    diary, weights = Diary(), []

    class Weights(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            weights.append(own.weights())

    own = setting(options(model, tmp_path, logging_steps=1, weight_decay=0.1))
    run = trainer(own, diary, Weights(), collator=Silent(1))
    run.train()
    assert diary.events.count("open") == 3
    # Neither decay nor momentum moves the weights in the second step; the third goes on.
    assert same(weights[0], weights[1]) and not same(weights[1], weights[2])
    assert logged(run, "batches_without_targets") == [1, 1, 1]


def test_an_update_without_target_begins_too(model: Path, tmp_path: Path) -> None:
    """A change of phase falls into it, as Lisa's may."""

    class Begins(Toy):
        updates: list[int] = []

        def begin_update(self, update: int) -> None:
            self.updates.append(update)

    strategy = Begins()
    trainer(setting(options(model, tmp_path)), strategy, collator=Silent(0, 2)).train()
    assert strategy.updates == [0, 1, 2, 3]


def test_a_micro_batch_without_target_leaves_the_update_to_the_others(model: Path, tmp_path: Path) -> None:
    grads = []
    for accumulation, silent in ((2, (1,)), (1, ())):
        own, watch = setting(options(model, tmp_path, gradient_accumulation_steps=accumulation)), Watch()
        run = trainer(own, sft(), watch, collator=Silent(*silent))
        run.train()
        grads.append(watch.grads[0])
        assert run.without_targets == len(silent)
    assert distance(*grads) < 1e-6


def test_metrics_of_a_strategy_are_averaged_into_the_log(model: Path, tmp_path: Path) -> None:
    class Logs(Toy):
        def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
            step.log(own=step.update, twice=2 * loss.detach())
            return loss

    run = trainer(setting(options(model, tmp_path, logging_steps=2)), Logs())
    run.train()
    assert logged(run, "own") == [0.5, 2.5]
    assert logged(run, "twice") == pytest.approx([2 * value for value in logged(run, "loss")])


def test_a_logged_loss_may_have_a_gradient() -> None:
    step = StepContext(torch.nn.Linear(1, 1), {})
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(action="error"):
            step.log(loss=2 * torch.ones((), requires_grad=True))
    finally:
        torch.set_warn_always(False)
    assert step.metrics == {"loss": 2}


def test_streams_that_are_missing_and_settings_that_hide_gradients_are_refused(model: Path, tmp_path: Path) -> None:
    class Thirsty(Toy):
        streams = ("harmful",)

    own = setting(options(model, tmp_path))
    for wrong in ([1, 2], "harmful", 3):
        with pytest.raises(ConfigError, match="^streams: must be a mapping such as .*, not (list|str|int)$"):
            trainer(own, Thirsty(), streams=wrong)
    with pytest.raises(CompatibilityError, match="thirsty draws from 'harmful' rows; give streams={'harmful': ROWS}"):
        trainer(own, Thirsty())
    seen = []

    class Drinks(Thirsty):
        def auxiliary(self, step: StepContext) -> None:
            seen.append(step.next("harmful"))

    trainer(own, Drinks(), streams={"harmful": iter(range(10))}).train()
    assert seen == [0, 1, 2, 3]
    usual = {"fp16": False, "n_gpu": 1, "seed": 0, "auto_find_batch_size": False}
    for name, value, message in (
        ("fp16", True, "fp16"),
        ("n_gpu", 2, "without a launcher"),
        ("auto_find_batch_size", True, "give a smaller per_device_train_batch_size"),
    ):
        with pytest.raises(CompatibilityError, match=message):
            StrategyMixinOnStub(SimpleNamespace(**(usual | {name: value})), strategy=sft())
    with pytest.raises(CompatibilityError, match="weights lie on several devices, .*; load it without device_map"):
        parts = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, device="meta"))
        StrategyMixinOnStub(SimpleNamespace(**usual), model=parts, strategy=sft())


class Stub:
    """A Trainer as far as the mixin's constructor looks at it."""

    is_deepspeed_enabled = is_fsdp_enabled = False
    model_init = None
    callback_handler = SimpleNamespace(callbacks=[])

    def __init__(self, args: Any, model: torch.nn.Module | None = None) -> None:
        self.args, self.model = args, model or torch.nn.Linear(1, 1)


class StrategyMixinOnStub(StrategyMixin, Stub):
    pass


def test_a_pass_of_ones_own_gives_the_main_gradient(model: Path, tmp_path: Path) -> None:
    plain, twice = Watch(), Watch()
    trainer(setting(options(model, tmp_path)), sft(), plain).train()
    trainer(setting(options(model, tmp_path)), Twice(), twice).train()
    assert distance(twice.grads[0], {name: 2 * grad for name, grad in plain.grads[0].items()}) < 1e-6


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trls_trainer_takes_the_mixin(model: Path, tmp_path: Path) -> None:
    import datasets
    from trl import SFTConfig, SFTTrainer

    class Ours(StrategyMixin, SFTTrainer):
        pass

    pairs = [{"prompt": row["prompt"], "completion": " " + row["completion"]} for row in rows()]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        max_length=64,
        max_grad_norm=0.0,
        gradient_checkpointing=False,
    )
    grads = {}
    for name, strategy in {"sft": sft(), "constant": Constant(), "alone": Alone(), "twice": Twice()}.items():
        own, watch = setting(options(model, tmp_path)), Watch()
        before = own.weights()
        run = Ours(
            model=own.model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(pairs),
            callbacks=[watch],
            processing_class=own.loaded.tokenizer,
            strategy=strategy,
        )
        run.train()
        assert not same(before, own.weights())
        assert len(watch.grads) == 2
        grads[name] = watch.grads[0]
    plain = grads.pop("sft")
    assert distance(grads["constant"], {name: grad + 0.5 for name, grad in plain.items()}) < 1e-6
    assert distance(grads["alone"], {name: torch.full_like(grad, 0.5) for name, grad in plain.items()}) < 1e-6
    assert distance(grads["twice"], {name: 2 * grad for name, grad in plain.items()}) < 1e-6
