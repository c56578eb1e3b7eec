"""What every alignment-stage defense owes, whatever it does: parametrised over the registry, on the real Trainer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainerCallback

from pharmacist.core.config import parse
from pharmacist.core.errors import CompatibilityError, ConfigError, DataError
from pharmacist.defenses import DEFENSES
from pharmacist.pipeline.align import AlignOptions
from pharmacist.training.loop import Training, TrainResult
from pharmacist.training.strategy import GradientStrategy
from tests.support import toy
from tests.support.defense_cases import NAMES, OFF, ON, build, streams
from tests.support.pairs import ROWS, Pairs
from tests.support.tiny import save_tiny_model
from tests.support.training_toy import Setting, Stop, opened, options, same, setting, sft, trainer


EVERY = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


def run(
    own: Setting, strategy: GradientStrategy, *callbacks: TrainerCallback, side: dict[str, Any] | None = None
) -> TrainResult:
    with opened(own.options) as folder:
        drawn = streams(own) if side is None else side
        return Training(own.loaded, own.encoded, strategy, own.options, folder, drawn).fit(callbacks)


class State(TrainerCallback):
    """Everything that a strategy must leave as it was, at the start of a step and before the optimizer's."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.random: list[torch.Tensor] = []

    def look(self, model: torch.nn.Module) -> tuple[Any, ...]:
        modes = [module.training for module in model.modules()]
        wanted = [p.requires_grad for p in model.parameters()]
        return toy.fingerprint(model), toy.hooks(model), modes, wanted, torch.is_grad_enabled()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.train()
        self.seen.append(self.look(model))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.seen.append(self.look(model))
        self.random.append(torch.get_rng_state())


def unchanged(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    return same(before[0], after[0]) and before[1:] == after[1:]


def test_every_alignment_defense_is_tested() -> None:
    known = {name for name in DEFENSES.names() if "align" in DEFENSES.get(name).stages}
    assert known - {"sft"} == set(NAMES) == set(OFF)
    for name in known:
        assert DEFENSES.get(name).paper and DEFENSES.get(name).__doc__


@EVERY
@pytest.mark.parametrize("accumulation", [1, 2])
def test_strength_0_is_sft_bit_for_bit(name: str, accumulation: int, model: Path, tmp_path: Path) -> None:
    given = {"dropout": 0.3, "max_steps": 3, "gradient_accumulation_steps": accumulation, "max_grad_norm": 1.0}
    found = {}
    for kind, strategy in (("sft", sft()), ("off", build(name, OFF[name])), ("on", build(name))):
        own = setting(options(model, tmp_path / kind, **given))
        run(own, strategy)
        found[kind] = own.weights()
    assert same(found["off"], found["sft"])
    assert not same(found["on"], found["sft"])


@EVERY
def test_a_step_leaves_weights_hooks_modes_and_random_state_alone(name: str, model: Path, tmp_path: Path) -> None:
    given = {"dropout": 0.3, "max_steps": 2, "gradient_accumulation_steps": 2}
    watch, plain = State(), State()
    run(setting(options(model, tmp_path / "on", **given)), build(name), watch)
    run(setting(options(model, tmp_path / "sft", **given)), sft(), plain)
    assert len(watch.seen) == 4
    assert unchanged(watch.seen[0], watch.seen[1]) and unchanged(watch.seen[2], watch.seen[3])
    assert not unchanged(watch.seen[0], watch.seen[2]), "the optimizer's step is noticed"
    for own, other in zip(watch.random, plain.random, strict=True):
        assert torch.equal(own, other), "no pass but the main one draws"


@EVERY
def test_no_pass_that_fails_leaves_anything_behind(name: str, model: Path, tmp_path: Path) -> None:
    passes = 0
    for broken in range(1, 20):
        own, calls, watch = setting(options(model, tmp_path / f"{broken}", max_steps=1)), [0], State()

        def fail(module: Any, args: Any, calls: Any = calls, broken: int = broken) -> None:
            calls[0] += 1
            if calls[0] == broken:
                raise RuntimeError("out of memory")

        inner: Any = own.model
        inner.base_model.model.model.norm.register_forward_pre_hook(fail)
        try:
            run(own, build(name), watch)
            break
        except RuntimeError as error:
            assert "out of memory" in str(error)
        passes += 1
        after = watch.look(own.model)
        assert unchanged(watch.seen[0], after), f"pass {broken}"
    # Of RepNoise's one reads a single token, to see whether the head is last.
    assert passes == {"vaccine": 2, "t-vaccine": 4, "repnoise": 6, "booster": 4, "tar": 6}[name]


@EVERY
@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_at_any_step_it_ends_with_the_same_weights(name: str, stop: int, model: Path, tmp_path: Path) -> None:
    given = {"dropout": 0.3, "max_steps": 5}
    whole, cut = (setting(options(model, tmp_path / kind, **given)) for kind in ("whole", "cut"))
    expected = run(whole, build(name))
    with pytest.raises(KeyboardInterrupt):
        run(setting(options(model, tmp_path / "cut", **given)), build(name), Stop(stop))
    found = run(cut, build(name))
    assert same(whole.weights(), cut.weights())
    timeless = [[{k: v for k, v in line.items() if "runtime" not in k} for line in r.log] for r in (found, expected)]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 5


def test_the_comparison_notices_streams_that_start_again(model: Path, tmp_path: Path) -> None:
    given = {"max_steps": 5}
    whole, cut = (setting(options(model, tmp_path / kind, **given)) for kind in ("whole", "cut"))
    run(whole, build("booster"))
    first = setting(options(model, tmp_path / "cut", **given))
    without_position = {"harmful": (batch for batch in streams(first)["harmful"])}
    with pytest.raises(KeyboardInterrupt):
        run(first, build("booster"), Stop(3), side=without_position)
    run(cut, build("booster"))
    assert not same(whole.weights(), cut.weights())


@EVERY
def test_a_loss_that_is_not_finite_stops_it_before_the_weights_move(name: str, model: Path, tmp_path: Path) -> None:
    own = setting(options(model, tmp_path))
    own.loaded.model.lm_head.weight.data[0] = torch.nan
    before = own.weights()
    with pytest.raises(DataError, match="nan|finite"):
        run(own, build(name))
    assert same(before, own.weights()) and toy.hooks(own.model) == 0


class Spoiled:
    """A stream whose prompts hold a token that no alignment row has."""

    position, token = 0, 3

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def spoil(self, batch: Any) -> Any:
        batch["input_ids"][:, 0] = self.token
        return batch

    def __next__(self) -> Any:
        return self.spoil(next(self.stream))

    def batch(self, rows: Any) -> Any:
        having, batch = self.stream.batch(rows)
        return having, self.spoil(batch)


@pytest.mark.parametrize("name", [name for name in NAMES if DEFENSES.get(name).streams])
@pytest.mark.parametrize("value", [torch.nan, 1.0])
def test_harmful_rows_without_a_finite_loss_stop_it_too(name: str, value: float, model: Path, tmp_path: Path) -> None:
    # A switching attacker might see alignment rows only.
    chosen = ON[name] | ({"adversaries": ["harmful"]} if name == "tar" else {})
    own = setting(options(model, tmp_path, max_steps=1))
    side = {key: Spoiled(stream) if key in ("harmful", "paired") else stream for key, stream in streams(own).items()}
    own.loaded.model.get_input_embeddings().weight.data[Spoiled.token] = value
    before = own.weights()
    if value == 1.0:  # the token alone does no harm
        run(own, build(name, chosen), side=side)
        assert not same(before, own.weights())
        return
    with pytest.raises(DataError, match="auxiliary pass"):
        run(own, build(name, chosen), side=side)
    assert same(before, own.weights())


@EVERY
def test_what_is_logged_is_finite_and_named(name: str, model: Path, tmp_path: Path) -> None:
    own = setting(options(model, tmp_path, max_steps=2))
    lines = run(own, build(name)).log
    expected = {
        "vaccine": {"clean_loss", "perturbed_loss", "activation_gradient_norm", "perturbation_norm"},
        "t-vaccine": {"clean_loss", "perturbed_loss", "perturbation_norm", "lowest_sampled_layer"},
        "repnoise": {"pairs", "harmful_loss", "harmful_loss_of_all_depths", "ascent", "noise_distance"},
        "booster": {"harmful_loss", "harmful_loss_after_step", "harmful_gradient_norm", "safe_harmful_cosine"},
        "tar": {"attack_loss_first", "attack_loss_last", "tamper_loss", "representation_distance"},
    }[name]
    assert len(lines) == 2
    for line in lines:
        assert expected <= line.keys()
        assert all(torch.isfinite(torch.tensor(float(value))) for value in line.values())


# --- without a Trainer, in float64 ----------------------------------------------------------------------------------


def sides(pad: int = 0) -> dict[str, Any]:
    def stream(seed: int) -> Iterator[Any]:
        return toy.endless(*(toy.batch(toy.rows(3, seed=seed + n), pad=pad) for n in range(3)))

    return {"harmful": stream(20), "held_out": stream(30), "retain": stream(40), "paired": Pairs(pad=pad)}


def ready(name: str, net: Any, side: dict[str, Any]) -> GradientStrategy:
    """A strategy after its first step, in which T-Vaccine draws its layers."""
    strategy = build(name)
    strategy.setup(net, 0)
    toy.method_gradient(strategy, net, toy.batch(toy.rows(2, seed=9)), streams=side, rows=[1, 2])
    return strategy


@EVERY
def test_padding_changes_nothing(name: str) -> None:
    from tests.support.pairs import SAFE

    found = []
    for pad in (0, 3):
        net, side = toy.model(), sides(pad)
        strategy = ready(name, net, side)
        data = toy.batch(SAFE, pad=2 * pad)
        found.append(toy.method_gradient(strategy, net, data, streams=side, rows=ROWS, update=1))
    assert toy.difference(*found) < 1e-11
    assert toy.difference(found[0], toy.method_gradient(sft(), toy.model(), data)) > 1e-4


@EVERY
def test_two_micro_batches_give_the_mean_of_their_gradients(name: str) -> None:
    from tests.support.pairs import SAFE

    parts = [([0], ROWS[:1]), ([1, 2], ROWS[1:])]

    def prepared() -> tuple[Any, dict[str, Any], GradientStrategy]:
        net, side = toy.model(), sides()
        return net, side, ready(name, net, side)

    net, side, strategy = prepared()
    for micro, (which, own) in enumerate(parts):
        batch = toy.batch(SAFE, which)
        toy.micro_step(strategy, net, batch, streams=side, rows=own, update=1, micro=micro, scale=0.5)
    together = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in toy.trainable(net).items()}
    net, side, strategy = prepared()
    apart = [
        toy.method_gradient(strategy, net, toy.batch(SAFE, which), streams=side, rows=own, update=1, micro=micro)
        for micro, (which, own) in enumerate(parts)
    ]
    assert toy.difference(together, toy.combined((0.5, apart[0]), (0.5, apart[1]))) < 1e-12
    assert toy.difference(together, apart[1]) > 1e-4


@pytest.mark.parametrize(
    ("name", "options", "means"),
    [
        ("tar", {"lam": 0.0, "inner_steps": 0, "representation": 2.0}, ["representation_distance"]),
        ("tar", {"form": "one-step", "inner_steps": 0, "lam": 2.0}, ["tamper_loss"]),
        ("vaccine", {"rho": 0.0}, ["clean_loss", "perturbed_loss"]),
        ("t-vaccine", ON["t-vaccine"] | {"rho": 0.0, "layers": 3}, ["clean_loss", "perturbed_loss"]),
    ],
)
def test_eight_micro_batches_of_unequal_size_give_what_one_batch_gives(
    name: str, options: dict[str, Any], means: list[str]
) -> None:
    """Where nothing is spent per micro-batch; what is logged likewise."""
    rows, parts = toy.rows(23, seed=8, longest=12), toy.unequal_parts()

    def update(groups: list[list[int]]) -> tuple[Any, dict[str, float]]:
        net = toy.model()
        strategy = DEFENSES.build(name, options)
        strategy.setup(net, 0)
        with torch.no_grad():
            for parameter in toy.trainable(net).values():
                parameter += 0.1
        return toy.accumulated(strategy, net, [toy.batch(rows, which) for which in groups], streams=sides())

    (many, logged), (one, expected) = update(parts), update([sum(parts, [])])
    assert toy.difference(many, one) < 1e-12
    assert [logged[key] for key in means] == pytest.approx([expected[key] for key in means], abs=1e-12)


@pytest.mark.parametrize("name", ["vaccine", "t-vaccine"])
def test_the_perturbed_loss_is_never_below_the_clean_one(name: str) -> None:
    """Both are means over the same tokens: with micro-batches of very different size too."""
    rows, parts = toy.rows(23, seed=8, longest=12), toy.unequal_parts()
    net = toy.model()
    strategy = DEFENSES.build(name, ON[name] | {"rho": 1e-3})
    strategy.setup(net, 0)
    _, logged = toy.accumulated(strategy, net, [toy.batch(rows, which) for which in parts], streams=sides())
    assert 0 < logged["perturbed_loss"] - logged["clean_loss"] < 0.01


# --- options --------------------------------------------------------------------------------------------------------


@EVERY
def test_options_survive_a_yaml_file(name: str, tmp_path: Path) -> None:
    config = build(name).config
    assert DEFENSES.build(name, yaml.safe_load(yaml.safe_dump(vars(config)))).config == config
    text = {"data": "d", "model": "m", "output_dir": "o", "defense": {"name": name, **vars(config)}}
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(text))
    chosen = parse(AlignOptions, ["--config", str(tmp_path / "align.yaml")]).defense
    assert DEFENSES.build_from(chosen).config == config
    default = parse(AlignOptions, ["--data=d", "--model=m", "--output-dir=o", f"--defense={name}"]).defense
    assert DEFENSES.build_from(default).config == DEFENSES.config_type(name)()


@EVERY
def test_an_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="has no option 'strength'"):
        DEFENSES.build(name, {"strength": 1})


@pytest.mark.parametrize("name", [name for name in NAMES if DEFENSES.get(name).streams])
def test_a_missing_stream_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match="draws from .* rows; give streams="):
        trainer(setting(options(model, tmp_path)), build(name))


def test_settings_that_act_differ_from_those_that_do_not() -> None:
    assert all(ON[name] != OFF[name] for name in NAMES)
