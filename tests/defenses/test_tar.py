import math

import pytest
import torch
from torch import nn

from pharmacist.core.errors import CompatibilityError, ConfigError, DataError
from pharmacist.defenses.alignment.sft import SFT
from pharmacist.defenses.alignment.tar import TAR, TARConfig, evaluation_weights
from pharmacist.nn.grads import replaced
from pharmacist.nn.losses import negative_entropy, targets
from pharmacist.training.strategy import StepContext
from tests.support import toy


DATA, HARMFUL = toy.batch(toy.rows(4, seed=1)), toy.batch(toy.rows(3, seed=2))
RETAIN, HELD_OUT = toy.batch(toy.rows(3, seed=3)), toy.batch(toy.rows(2, seed=4))
SMALL = {"inner_steps": 8, "inner_learning_rates": [1e-2], "adversaries": ["harmful"], "representation": 0.0}


def tar(net, **options):
    strategy = TAR(TARConfig(**options))
    strategy.setup(net, 0)
    return strategy


class Stream:
    """Notes the order in which streams are drawn from."""

    def __init__(self, name, batch, log):
        self.name, self.batch, self.log = name, batch, log

    def __next__(self):
        self.log.append(self.name)
        return self.batch


def streams(log=None, **other):
    log = [] if log is None else log
    batches = {"harmful": HARMFUL, "retain": RETAIN, "held_out": HELD_OUT, **other}
    return {name: Stream(name, batch, log) for name, batch in batches.items()}


def gradient(net, **options):
    return toy.method_gradient(tar(net, **options), net, DATA, streams=streams())


def sft(net):
    return toy.method_gradient(SFT(), net, DATA)


def one_step(net, **options):
    return gradient(net, form="one-step", **options)


def entropy(net, everywhere=False):
    out = net(HELD_OUT["input_ids"], HELD_OUT["attention_mask"]).logits
    p = out.softmax(-1)
    values = -(p * p.log()).sum(-1)
    keep = torch.ones_like(values, dtype=torch.bool) if everywhere else targets(HELD_OUT["labels"])[0]
    return -values[keep].mean()


def attacked(net, optimizer, lr, steps, batches=None):
    """A copy of the model after an attack, the plain way; and its weights after every step."""
    other = toy.model()
    other.load_state_dict(net.state_dict())
    opt = optimizer(toy.trainable(other).values(), lr=lr)
    for number in range(steps):
        opt.zero_grad()
        toy.loss_of(other, HARMFUL if batches is None else batches[number]).backward()
        opt.step()
        other.zero_grad()
        yield other


@pytest.mark.parametrize("options", [{**SMALL, "lam": 0.0}, {"form": "one-step", "lam": 0.0}])
def test_lam_0_is_sft_bit_for_bit_and_more_is_not(options):
    net = toy.model()
    assert toy.same(gradient(net, **options), sft(net))
    assert toy.difference(gradient(net, **options | {"lam": 1.0}), sft(net)) > 1e-3, "the term reaches .grad"


@pytest.mark.parametrize("options", [{"inner_steps": 0}, {"inner_learning_rates": [0.0]}])
def test_without_an_attack_the_one_step_form_is_sft_with_more_weight(options):
    net = toy.model()
    assert toy.difference(one_step(net, lam=2.0, **options), toy.combined((3.0, sft(net)))) < 1e-14


def test_the_one_step_form():
    net = toy.model()
    (other,) = attacked(net, torch.optim.SGD, 0.01, 1)
    expected = toy.combined((1.0, sft(net)), (2.0, sft(other)))
    assert toy.difference(one_step(net), expected) < 1e-13
    assert toy.difference(one_step(net), toy.combined((3.0, sft(net)))) > 1e-6


@pytest.mark.parametrize("everywhere", [False, True])
def test_the_tamper_resistance_gradient_is_taken_along_the_attack_and_applied_here(everywhere):
    net = toy.model()
    options = SMALL | {"lam": 4.0, "entropy_positions": "all" if everywhere else "response"}
    weights, expected = {3: 4 * math.exp(-0.0625 * 4), 7: 4.0}, [(1.0, sft(net))]
    for i, other in enumerate(attacked(net, torch.optim.AdamW, 1e-2, 8)):
        if i in weights:
            expected.append((weights[i], toy.gradient_of(other, entropy(other, everywhere))))
    assert toy.difference(gradient(net, **options), toy.combined(*expected)) < 1e-12


def test_it_is_the_derivative_of_the_loss_at_a_constant_displacement():
    net = toy.model()
    *_, other = attacked(net, torch.optim.AdamW, 1e-2, 4)
    delta = toy.combined((1.0, toy.trainable(other)), (-1.0, toy.trainable(net)))
    extra = toy.combined((1.0, gradient(net, **SMALL | {"inner_steps": 4, "lam": 1.0})), (-1.0, sft(net)))
    direction = toy.random_direction(net)

    def displaced():
        moved = {name: p + delta[name] for name, p in toy.trainable(net).items()}
        with torch.no_grad():
            out = torch.func.functional_call(net, moved, (HELD_OUT["input_ids"], HELD_OUT["attention_mask"])).logits
            keep, _ = targets(HELD_OUT["labels"])
            return negative_entropy(out[keep]) / keep.sum()

    assert toy.along(extra, direction) == pytest.approx(toy.directional(net, displaced, direction), rel=1e-6)


class Quadratic(nn.Module):
    """Harmful loss 0.5 (w - w*)' A (w - w*)."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        self.curvature, self.optimum = root @ root.T / 4, torch.randn(4, generator=generator, dtype=torch.float64)
        self.w = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))


class QuadraticStep(StepContext):
    def ce(self, batch):
        away = self.model.w - self.model.optimum
        return 0.5 * away @ self.model.curvature @ away

    def main_ce(self):
        return self.model.w.sin().sum()  # the alignment loss


@pytest.mark.parametrize("k", [1, 5])
def test_on_a_quadratic_the_attack_ends_where_the_closed_form_says(k):
    net, lr = Quadratic(), 0.1
    strategy = TAR(TARConfig(form="one-step", inner_steps=k, every=k, lam=3.0, inner_learning_rates=[lr]))
    strategy.seed = 0
    batch = {"input_ids": torch.zeros(1, 1)}
    step = QuadraticStep(model=net, batch=batch, streams={"harmful": toy.endless({"harmful": batch["input_ids"]})})
    found = strategy.auxiliary(step)["w"]
    shrink = torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - lr * net.curvature, k)
    end = shrink @ (net.w.detach() - net.optimum) + net.optimum
    assert torch.allclose(found, 3.0 * end.cos(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_of_the_attack_is_lost_by_rounding(dtype, monkeypatch):
    net, moved = toy.model().to(dtype), []
    strategy = tar(net, **SMALL | {"inner_steps": 32, "every": 32, "inner_learning_rates": [1e-4]})
    before = {name: p.detach().clone() for name, p in toy.trainable(net).items()}

    tamper_loss = strategy.tamper_loss

    def look(*given):
        moved.extend((p != before[name]).float().mean() for name, p in toy.trainable(net).items())
        return tamper_loss(*given)

    monkeypatch.setattr(strategy, "tamper_loss", look)
    toy.micro_step(strategy, net, DATA, streams=streams())
    assert float(torch.stack(moved).mean()) > (0.7 if dtype == torch.bfloat16 else 0.98)
    assert all(torch.equal(p, before[name]) for name, p in toy.trainable(net).items())


def test_the_weights_of_the_evaluations():
    weights = evaluation_weights(64, 4, 4.0)
    assert list(weights) == list(range(3, 64, 4)) and len(weights) == 64 // 4
    assert weights[63] == 4.0
    for i in range(3, 63, 4):
        assert weights[i] / weights[i + 4] == pytest.approx(math.exp(-0.0625 * 4))
    every = evaluation_weights(8, 1, 2.0)
    assert every[7] == 2.0 and every[3] / every[4] == pytest.approx(math.exp(-0.0625))
    assert evaluation_weights(10, 4, 4.0).keys() == {3, 7}, "floor(10 / 4)"
    assert set(evaluation_weights(64, 4, 4.0, "uniform").values()) == {4.0 / 64}


@pytest.mark.parametrize("broken", [0, 1, 4, 6, 9])
def test_weights_gradients_and_outer_optimizer_are_bitwise_untouched(broken):
    net, calls = toy.model(), []
    outer = torch.optim.AdamW(toy.trainable(net).values(), lr=1e-3)
    toy.loss_of(net, DATA).backward()
    outer.step()
    grads = {name: p.grad for name, p in toy.trainable(net).items()}

    def moments():
        return {f"{n}.{key}": value.clone() for n, p in enumerate(outer.state.values()) for key, value in p.items()}

    state = moments()

    def fail(module, args):
        calls.append(None)
        if len(calls) == broken:
            raise RuntimeError("out of memory")

    handle = net.lm_head.register_forward_pre_hook(fail)
    before, random = toy.fingerprint(net), torch.get_rng_state()
    values = {name: grad.clone() for name, grad in grads.items()}
    step = StepContext(model=net, batch=DATA, streams=streams())
    if broken:
        with pytest.raises(RuntimeError, match="out of memory"):
            tar(net, **SMALL).auxiliary(step)
    else:
        tar(net, **SMALL).auxiliary(step)
        assert len(calls) == 8 + 2
    handle.remove()
    assert toy.same(before, toy.fingerprint(net)) and toy.hooks(net) == 0
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is grads[name] for name, p in toy.trainable(net).items()) and toy.same(grads, values)
    assert len(state) > 60 and toy.same(state, moments())


def test_every_attack_starts_afresh_from_the_weights():
    net = toy.model()
    one, three = (gradient(net, **SMALL, tasks=tasks) for tasks in (1, 3))
    assert toy.difference(one, three) < 1e-13, "the mean of three equal attacks"


def test_a_switching_adversary_begins_with_alignment_rows():
    net, starts = toy.model(), set()
    for update in range(6):
        log = []
        strategy = tar(net, **SMALL | {"adversaries": ["switch"], "inner_steps": 12})
        toy.micro_step(strategy, net, DATA, streams=streams(log), update=update)
        assert log[0] == "held_out" and log.count("held_out") == 1, "one batch for the whole attack"
        attack = log[1:]
        assert len(attack) == 12 and attack == sorted(attack, reverse=True)
        starts.add(attack.count("retain"))
    assert len(starts) > 1 and 4 < sum(starts) / len(starts) < 12, "Beta(6, 3) of the steps: two thirds on average"


def test_streams_are_those_that_are_used():
    assert TAR(TARConfig()).streams == ("harmful", "held_out", "retain")
    assert TAR(TARConfig(adversaries=["harmful"])).streams == ("harmful", "held_out")
    assert TAR(TARConfig(form="one-step")).streams == ("harmful",)


def test_forms_fill_in_what_is_not_given():
    config = TARConfig()
    assert (config.lam, config.inner_steps, config.every, config.inner_optimizer) == (4.0, 64, 4, "adamw")
    config = TARConfig(form="one-step", lam=7.0)
    assert (config.lam, config.inner_steps, config.inner_learning_rates) == (7.0, 1, [0.01])
    assert TARConfig(**vars(config)) == config


@pytest.mark.parametrize(
    "given",
    [{"objective": "alignment", "held_out": 0.5}, {"form": "one-step", "entropy_positions": "all"}]
    + [{"schedule": "uniform", "schedule_rate": 0.1}],
)
def test_options_without_effect_are_refused(given):
    with pytest.raises(ConfigError, match="has no effect with (objective alignment|schedule uniform); change that"):
        TARConfig(**given)


def test_the_entropy_loss():
    uniform, certain = torch.zeros(2, 12, dtype=torch.float64), torch.zeros(2, 12, dtype=torch.float64)
    certain[:, 3] = 1e3
    assert float(negative_entropy(uniform)) == pytest.approx(-2 * math.log(12))
    assert float(negative_entropy(certain)) == 0
    logits = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(negative_entropy, logits)


def hidden_states(model):
    found = []
    handles = [model.layers[0].register_forward_pre_hook(lambda module, args: found.append(args[0]))]
    handles += [m.register_forward_hook(lambda module, args, out: found.append(out)) for m in model.layers[:-1]]
    handles.append(model.norm.register_forward_hook(lambda module, args, out: found.append(out)))
    model(DATA["input_ids"], DATA["attention_mask"])
    for handle in handles:
        handle.remove()
    return found


def test_hidden_states_of_several_streams_per_token_are_refused():
    net = toy.model()
    net.layers[0].register_forward_hook(lambda module, args, out: out.expand(2, *out.shape))
    net.layers[1].register_forward_pre_hook(lambda module, args: (args[0][0], *args[1:]))
    strategy = tar(net, **SMALL | {"representation": 1.0, "lam": 0.0, "inner_steps": 0})
    with pytest.raises(CompatibilityError, match=r"hidden states of shape \(2, 4, .*this method cannot act on them"):
        toy.micro_step(strategy, net, DATA, streams=streams())


def distance(net, reference):
    mask = DATA["attention_mask"].bool()
    pairs = zip(hidden_states(net), hidden_states(reference), strict=True)
    return torch.stack([(a - b).norm(dim=-1)[mask].mean() for a, b in pairs]).mean()


def test_the_representation_term_keeps_hidden_states_near_the_initial_ones():
    net, initial = toy.model(dropout=0.3), toy.model(dropout=0.3).eval()
    strategy = tar(net, **SMALL | {"representation": 2.0, "lam": 0.0})
    for found in (toy.method_gradient(strategy, net.eval(), DATA, streams=streams()), sft(net)):
        assert all(value.isfinite().all() for value in found.values()), "also where nothing has moved yet"
    with torch.no_grad():
        for p in toy.trainable(net).values():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1)))
    found = toy.method_gradient(strategy, net, DATA, streams=streams())
    expected = toy.combined((1.0, sft(net)), (2.0, toy.gradient_of(net, distance(net, initial))))
    assert toy.difference(found, expected) < 1e-12
    step = toy.micro_step(strategy, net, DATA, streams=streams())
    assert step.metrics["representation_distance"] == pytest.approx(float(distance(net, initial).detach()))
    assert toy.hooks(net) == 0


def test_the_initial_states_of_an_adapter_are_those_of_its_base_without_dropout():
    net, initial = toy.model(dropout=0.3), toy.model()
    start = {name: p.detach().clone() for name, p in toy.trainable(net).items()}
    net.disable_adapter = lambda: replaced(toy.trainable(net), start)
    with torch.no_grad():
        for p in toy.trainable(net).values():
            p.add_(0.1)
    strategy = tar(net, **SMALL | {"representation": 2.0, "lam": 0.0})
    with strategy.around(StepContext(model=net, batch=DATA)):
        found = [value for part in strategy._reference for value in part.values()]
    assert strategy.start is None and all(module.training for module in net.modules())
    expected = hidden_states(initial)
    assert len(found) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_two_micro_batches_are_the_mean_of_two_steps():
    net = toy.model()
    halves = [toy.batch(toy.rows(4, seed=1), which) for which in ((0, 1), (2, 3))]
    strategy = tar(net, form="one-step")
    apart = [toy.method_gradient(strategy, net, half, streams=streams()) for half in halves]
    for micro, half in enumerate(halves):
        toy.micro_step(strategy, net, half, streams=streams(), micro=micro, scale=0.5)
    together = {name: p.grad for name, p in toy.trainable(net).items()}
    assert toy.difference(together, toy.combined((0.5, apart[0]), (0.5, apart[1]))) < 1e-13


def test_an_attack_that_explodes_stops_before_anything_moves():
    net = toy.model()
    before = toy.fingerprint(net)
    with pytest.raises(DataError, match="auxiliary pass"):
        gradient(net, **SMALL | {"inner_optimizer": "sgd", "inner_learning_rates": [1e300]})
    assert toy.same(before, toy.fingerprint(net))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "lam must not be negative"),
        ({"inner_steps": -1}, "inner_steps must not"),
        ({"every": 65}, "every 65: the attack has only 64 steps"),
        ({"tasks": 0}, "tasks must be at least 1"),
        ({"adversaries": ["thief"]}, "adversaries must be some of harmful, switch"),
        ({"adversaries": []}, "adver"),
        ({"inner_learning_rates": []}, "inner_learning_rates"),
        ({"objective": "dpo"}, "objective must be one of"),
        ({"held_out": 1.0}, "held_out"),
        ({"form": "two-step"}, "form must be one of original, one-step"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TARConfig(**options)
