import json
from functools import partial

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.nn.adapters import AdapterBank, AdapterOptions, TrainingState
from pharmacist.nn.batching import make_batch
from tests.support.tiny import TinyDecoder, random_token_rows, row_losses, save_tiny_model


CPU = torch.device("cpu")
VOCABULARY, STEPS = 13, 7
ROWS = random_token_rows(24, VOCABULARY)


def make_bank(seed: int = 0, model: torch.nn.Module | None = None, **options) -> AdapterBank:
    return AdapterBank(model or TinyDecoder(VOCABULARY), AdapterOptions(**({"r": 2} | options)), seed, 0.0)


def step_loss(bank: AdapterBank, name: str, step: int, shift: int = 0) -> torch.Tensor:
    """A loss whose batch is a function of the step alone."""
    rows = [(4 * step + k + shift) % len(ROWS) for k in range(4)]
    return bank.row_losses(name, make_batch(ROWS, rows, bank.device)).mean()


def trained(
    bank: AdapterBank, folder, *names: str, steps: int = STEPS, loss=None
) -> dict[str, dict[str, torch.Tensor]]:
    for name in names:
        bank.add(name)
    default = lambda step: sum(step_loss(bank, name, step, 5 * k) for k, name in enumerate(names))  # noqa: E731
    bank.train(names, loss or default, steps=steps, checkpoint=folder / "partial.safetensors")
    return {name: bank.state(name) for name in names}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def logits(bank: AdapterBank, name: str | None) -> torch.Tensor:
    with bank.using(name) as model, torch.no_grad():
        return model(input_ids=torch.arange(1, 12)[None]).logits


def test_all_adapters_start_from_the_same_weights_which_change_nothing():
    bank = make_bank()
    bank.add("safe")
    bank.add("harmful")
    assert same(bank.state("safe"), bank.state("harmful"))
    assert any(value.abs().max() > 0 for value in bank.state("safe").values())
    assert torch.equal(logits(bank, "safe"), logits(bank, None))
    assert torch.equal(logits(bank, None), TinyDecoder(VOCABULARY)(input_ids=torch.arange(1, 12)[None]).logits)
    again, other = make_bank(), make_bank(seed=1)
    again.add("safe")
    other.add("safe")
    assert same(bank.state("safe"), again.state("safe")) and not same(bank.state("safe"), other.state("safe"))


def test_float64_stays_float64():
    bank = make_bank()
    assert {value.dtype for value in bank.state("start").values()} == {torch.float64}


def test_training_moves_one_adapter_and_nothing_else(tmp_path):
    bank = make_bank()
    base = {name: p.clone() for name, p in bank.model.named_parameters() if "lora_" not in name}
    bank.add("other")
    start = bank.state("other")
    states = trained(bank, tmp_path, "safe")
    assert not same(states["safe"], start)
    assert same(bank.state("other"), start) and same(bank.state("start"), start)
    assert same(base, {name: p for name, p in bank.model.named_parameters() if "lora_" not in name})
    assert not torch.equal(logits(bank, "safe"), logits(bank, None)) and torch.equal(
        logits(bank, "other"), logits(bank, None)
    )
    bank.add("safe")
    assert same(bank.state("safe"), start), "adding again resets"


def test_nothing_is_trainable_outside_training(tmp_path):
    bank = make_bank()
    frozen = lambda: not any(p.requires_grad or p.grad is not None for p in bank.model.parameters())  # noqa: E731
    assert frozen()
    seen = []

    def loss(step):
        with bank.using(None):
            pass  # the base in between must not disturb who is trained
        value = step_loss(bank, "safe", step)
        seen.append({name for name, p in bank.model.named_parameters() if p.requires_grad})
        return value

    trained(bank, tmp_path, "safe", loss=loss)
    assert all(names and all(".safe." in name for name in names) for names in seen)
    assert frozen()
    with bank.using(None):
        assert frozen()
    assert frozen()
    with bank.using("safe"):
        assert frozen()

    def failing(step):
        step_loss(bank, "safe", step)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trained(bank, tmp_path / "failing", "safe", loss=failing)
    assert frozen()


def test_adapters_trained_together_are_those_trained_apart(tmp_path):
    bank = make_bank(learning_rate=0.05)
    together = trained(bank, tmp_path / "both", "safe", "harmful")
    for shift, name in ((0, "safe"), (5, "harmful")):
        apart = make_bank(learning_rate=0.05)
        alone = trained(apart, tmp_path / name, name, loss=partial(step_loss, apart, name, shift=shift))
        assert same(alone[name], together[name])
    assert not same(together["safe"], together["harmful"])


def test_the_first_step_is_adamw_on_the_clipped_gradient(tmp_path):
    bank = make_bank(learning_rate=0.01)
    bank.add("safe")
    start, batch = bank.state("safe"), make_batch(ROWS, range(4), CPU)
    with bank.using("safe") as model:
        for parameter in bank.parameters("safe").values():
            parameter.requires_grad_(True)
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        loss = row_losses(output.logits, batch.input_ids, batch.lengths, batch.prompt_lengths).mean()
        gradient = torch.autograd.grad(loss, list(bank.parameters("safe").values()))
    norm = torch.sqrt(sum((g**2).sum() for g in gradient))
    state = trained(bank, tmp_path, "safe", steps=1)["safe"]
    for (key, before), g in zip(start.items(), gradient, strict=True):
        g = g * min(1.0, float(1 / (norm + 1e-6)))
        # AdamW's first step with bias correction: m = g, v = g * g.
        expected = before - 0.01 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(state[key], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("killed_at", [1, 3, STEPS - 1])
def test_a_killed_training_continues_bit_for_bit(tmp_path, killed_at, monkeypatch):
    straight = trained(make_bank(), tmp_path / "straight", "safe")["safe"]

    def killed(bank, step):
        if step == killed_at:
            raise KeyboardInterrupt
        return step_loss(bank, "safe", step)

    bank = make_bank()
    with pytest.raises(KeyboardInterrupt):
        trained(bank, tmp_path, "safe", loss=partial(killed, bank))
    steps = []

    def counted(bank, step):
        steps.append(step)
        return step_loss(bank, "safe", step)

    fresh = make_bank()
    assert same(trained(fresh, tmp_path, "safe", loss=partial(counted, fresh))["safe"], straight)
    assert steps == list(range(killed_at, STEPS)), "no step is done twice"
    # Negative control: without the optimiser's moments the continuation is another one.
    restore = TrainingState.restore

    def forgetful(self, optimizer, *tensors):
        restore(self, optimizer, *tensors)
        optimizer.state.clear()

    monkeypatch.setattr(TrainingState, "restore", forgetful)
    bank = make_bank()
    with pytest.raises(KeyboardInterrupt):
        trained(bank, tmp_path / "third", "safe", loss=partial(killed, bank))
    assert not same(trained(bank, tmp_path / "third", "safe")["safe"], straight)


def test_further_tensors_travel_with_the_checkpoint(tmp_path):
    bank, counter, kills = make_bank(), torch.zeros(1), [True]

    def loss(step):
        if step == 4 and kills:
            kills.pop()
            raise KeyboardInterrupt
        counter.add_(1)
        return step_loss(bank, "safe", step)

    bank.add("safe")
    run = partial(
        bank.train,
        ("safe",),
        loss,
        steps=6,
        checkpoint=tmp_path / "c",
        extra={"counter": counter},
        keep={3: tmp_path / "third"},
    )
    with pytest.raises(KeyboardInterrupt):
        run()
    counter.zero_()
    run()
    assert counter.item() == 6
    kept = TrainingState.load(tmp_path / "third")
    assert (kept.step, kept.extra["counter"].item()) == (3, 3) and kept.of("safe").m.keys() == bank.state(
        "safe"
    ).keys()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nothing_moves_when_loss_or_gradient_is_not_finite(tmp_path, what):
    bank = make_bank()
    bank.add("safe")
    weight = next(p for key, p in bank.parameters("safe").items() if "lora_B" in key)

    def loss(step):
        value = step_loss(bank, "safe", step)
        if step == 2:
            return value * torch.inf if what == "loss" else value + weight.abs().sum().sub(weight.abs().sum()).sqrt()
        return value

    seen = []
    with pytest.raises(DataError, match=f"{what} is (not finite|inf) at step 2"):
        bank.train(
            ("safe",), loss, steps=5, checkpoint=tmp_path / "c", advance=lambda: seen.append(bank.state("safe"))
        )
    assert len(seen) == 2 and same(seen[-1], bank.state("safe"))


def test_no_global_randomness_is_used(tmp_path):
    model = TinyDecoder(VOCABULARY)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trained(make_bank(model=model), tmp_path, "safe", "harmful", steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_saved_adapter_is_a_peft_folder(tmp_path):
    folder = save_tiny_model(tmp_path / "model", num_hidden_layers=4)
    load = partial(AutoModelForCausalLM.from_pretrained, folder)
    bank = make_bank(model=load(), r=3, alpha=5)
    trained(bank, tmp_path, "safe")
    bank.save("safe", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    model = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    with torch.no_grad():
        found = model(input_ids=torch.arange(1, 12)[None]).logits
    assert torch.equal(found, logits(bank, "safe"))
    assert not torch.equal(found, logits(bank, None))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 5)
    other = make_bank(model=load(), r=3, alpha=5, seed=9)
    other.load("read", tmp_path / "adapter")
    assert same(other.state("read"), bank.state("safe"))
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.bin"))


def test_an_adapter_of_another_base_is_refused(tmp_path):
    bank = make_bank()
    bank.add("safe")
    bank.save("safe", tmp_path / "safe")
    with pytest.raises(DataError, match="another shape"):
        make_bank(model=TinyDecoder(VOCABULARY, width=8)).load("safe", tmp_path / "safe")
    with pytest.raises(DataError, match="do not fit this model"):
        make_bank(model=TinyDecoder(VOCABULARY, layers=1)).load("safe", tmp_path / "safe")
    with pytest.raises(DataError, match="incomplete"):
        bank.load("safe", tmp_path / "nowhere")


@pytest.mark.parametrize("option", ["r", "alpha", "learning_rate", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_options_must_be_positive(option, value):
    with pytest.raises(ConfigError, match=f"{option} must be (positive|at least 1|a whole number), not {value}"):
        AdapterOptions(**{option: value})


def test_a_layer_that_no_loss_reads_is_saved_and_resumed_too(tmp_path):
    def bank():
        model = TinyDecoder(VOCABULARY)
        model.unused = torch.nn.Linear(3, 3).double()
        return make_bank(model=model)

    straight = trained(bank(), tmp_path / "straight", "safe")
    cut = bank()
    cut.add("safe")
    left = iter(range(4))
    with pytest.raises(StopIteration):
        trained(cut, tmp_path / "cut", "safe", loss=lambda step: (next(left), step_loss(cut, "safe", step))[1])
    moments = TrainingState.load(tmp_path / "cut" / "partial.safetensors").m
    assert [key for key, value in moments.items() if "unused" in key and value.any()] == []
    assert same(trained(bank(), tmp_path / "cut", "safe")["safe"], straight["safe"])
