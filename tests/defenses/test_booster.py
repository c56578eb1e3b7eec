import math

import pytest
import torch

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.defenses.alignment.booster import Booster, BoosterConfig
from pharmacist.defenses.alignment.sft import SFT
from pharmacist.defenses.alignment.vaccine import Vaccine, VaccineConfig
from pharmacist.nn.grads import norm
from tests.support import toy


DATA, HARMFUL = toy.batch(toy.rows(4, seed=1)), toy.batch(toy.rows(3, seed=2))
LAM, ALPHA = 5.0, 0.1


def booster(net, lam=LAM, alpha=ALPHA, rho=0.0):
    strategy = Booster(BoosterConfig(lam=lam, alpha=alpha, rho=rho))
    strategy.setup(net, 0)
    return strategy


def found(net, data=DATA, harmful=(HARMFUL,), **options):
    return toy.method_gradient(booster(net, **options), net, data, streams={"harmful": toy.endless(*harmful)})


def sft(net, data=DATA):
    return toy.method_gradient(SFT(), net, data)


def harmful_gradient(net):
    return toy.gradient_of(net, toy.loss_of(net, HARMFUL))


def moved(net, direction, by):
    """A copy of the model at w + by * direction."""
    other = toy.model()
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        for name, p in toy.trainable(other).items():
            p.add_(direction[name], alpha=by)
    return other


def penalty_gradient(net, alpha):
    """Gradient of h(w) - h(w - alpha * g / |g|) with nothing held constant, by double backpropagation."""
    parameters = toy.trainable(net)
    h = toy.loss_of(net, HARMFUL)
    g = torch.autograd.grad(h, list(parameters.values()), create_graph=True)
    length = torch.sqrt(sum(value.square().sum() for value in g)) + 1e-7
    there = {name: p - alpha * value / length for (name, p), value in zip(parameters.items(), g, strict=True)}
    out = torch.func.functional_call(net, there, (HARMFUL["input_ids"], HARMFUL["attention_mask"]))
    penalty = h - toy.batch_loss(out.logits, HARMFUL["labels"])
    return penalty, dict(zip(parameters, torch.autograd.grad(penalty, list(parameters.values())), strict=True))


def test_lam_0_and_alpha_0_are_sft_bit_for_bit_and_more_is_not():
    net = toy.model()
    plain = sft(net)
    assert toy.same(found(net, lam=0.0), plain)
    assert toy.same(found(net, alpha=0.0), plain)
    assert toy.difference(found(net), plain) > 1e-3


def test_the_added_gradient_is_that_of_the_two_passes():
    net = toy.model()
    g = harmful_gradient(net)
    length = float(norm(g))
    assert length == pytest.approx(math.sqrt(sum(float(value.square().sum()) for value in g.values())))
    there = moved(net, g, -ALPHA / (length + 1e-7))
    step = toy.combined((1.0, toy.trainable(there)), (-1.0, toy.trainable(net)))
    assert float(norm(step)) == pytest.approx(ALPHA * length / (length + 1e-7), rel=1e-12)
    expected = toy.combined((1.0, sft(net)), (LAM, g), (-LAM, harmful_gradient(there)))
    assert toy.difference(found(net), expected) < 1e-12


def relative_error(net, alpha, reference):
    extra = toy.combined((1 / alpha / LAM, found(net, alpha=alpha)), (-1 / alpha / LAM, sft(net)))
    return float(norm(toy.combined((1.0, extra), (-1.0, reference))) / norm(reference))


def test_to_first_order_it_penalises_the_norm_of_the_harmful_gradient():
    net = toy.model()
    parameters = list(toy.trainable(net).values())
    g = torch.autograd.grad(toy.loss_of(net, HARMFUL), parameters, create_graph=True)
    length = torch.sqrt(sum(value.square().sum() for value in g))
    curvature = dict(zip(toy.trainable(net), torch.autograd.grad(length, parameters), strict=True))
    errors = [relative_error(net, alpha, curvature) for alpha in (1e-2, 1e-3, 1e-4)]
    assert errors[-1] < 1e-2 and all(5 < a / b < 20 for a, b in zip(errors, errors[1:], strict=False)), errors


def test_the_neglected_term_vanishes_with_alpha():
    net, direction = toy.model(), toy.random_direction(toy.model())
    _, exact = penalty_gradient(net, 0.1)
    finite = toy.directional(net, lambda: penalty_gradient(net, 0.1)[0], direction)
    assert toy.along(exact, direction) == pytest.approx(finite, rel=1e-6), "the reference itself is right"
    errors = []
    for alpha in (1e-2, 1e-3, 1e-4):
        errors.append(relative_error(net, alpha, toy.combined((1 / alpha, penalty_gradient(net, alpha)[1]))))
    assert errors[-1] < 1e-2 and all(5 < a / b < 20 for a, b in zip(errors, errors[1:], strict=False)), errors


def test_for_a_quadratic_harmful_loss_it_is_the_curvature_times_the_step():
    from pharmacist.defenses.alignment.booster import attenuation

    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    curvature, w = root @ root.T, torch.randn(6, generator=generator, dtype=torch.float64)
    here = curvature @ w
    step = ALPHA * here / (here.norm() + 1e-7)
    extra = attenuation({"w": here}, {"w": curvature @ (w - step)}, LAM)["w"]
    assert torch.allclose(extra, LAM * ALPHA * curvature @ here / here.norm(), rtol=1e-6)


@pytest.mark.parametrize("broken", [0, 1, 2, 3])
def test_weights_are_bitwise_unchanged_also_when_a_pass_fails(broken):
    net, calls = toy.model(), []

    def fail(module, args):
        calls.append(None)
        if len(calls) == broken:
            raise RuntimeError("out of memory")

    handle = net.lm_head.register_forward_pre_hook(fail)
    before, random = toy.fingerprint(net), torch.get_rng_state()
    strategy = booster(net)
    if broken:
        with pytest.raises(RuntimeError, match="out of memory"):
            toy.micro_step(strategy, net, DATA, streams={"harmful": toy.endless(HARMFUL)})
    else:
        toy.micro_step(strategy, net, DATA, streams={"harmful": toy.endless(HARMFUL)})
        assert len(calls) == 3
    handle.remove()
    assert toy.same(before, toy.fingerprint(net)) and toy.hooks(net) == 0
    assert torch.equal(random, torch.get_rng_state())


def test_bfloat16_weights_come_back_bit_for_bit():
    net = toy.model().bfloat16()
    before = toy.fingerprint(net)
    toy.micro_step(booster(net), net, DATA, streams={"harmful": toy.endless(HARMFUL)})
    assert toy.same(before, toy.fingerprint(net))


def test_the_aware_variant_is_booster_and_vaccine_together():
    net = toy.model()
    assert toy.same(found(net, rho=0.0), found(net))
    plain, vaccine = sft(net), Vaccine(VaccineConfig(rho=0.7))
    vaccine.setup(net, 0)
    expected = toy.combined((1.0, found(net)), (-1.0, plain), (1.0, toy.method_gradient(vaccine, net, DATA)))
    assert toy.difference(found(net, rho=0.7), expected) < 1e-12


def test_two_micro_batches_are_the_mean_of_two_steps():
    net = toy.model()
    halves = [toy.batch(toy.rows(4, seed=1), which) for which in ((0, 1), (2, 3))]
    others = [HARMFUL, toy.batch(toy.rows(3, seed=5))]
    apart = [found(net, half, (other,)) for half, other in zip(halves, others, strict=True)]
    net.zero_grad()
    strategy, stream = booster(net), toy.endless(*others)
    for number, half in enumerate(halves):
        toy.micro_step(strategy, net, half, streams={"harmful": stream}, micro=number, scale=0.5)
    together = {name: p.grad for name, p in toy.trainable(net).items()}
    assert toy.difference(together, toy.combined((0.5, apart[0]), (0.5, apart[1]))) < 1e-13
    assert toy.difference(together, apart[1]) > 1e-3


def test_compared_passes_draw_the_same_dropout_masks():
    net, seen = toy.model(dropout=0.4), []
    net.layers[0].dropout.register_forward_hook(lambda module, args, out: seen.append((out == 0) & (args[0] != 0)))
    toy.micro_step(booster(net), net, DATA, streams={"harmful": toy.endless(HARMFUL)})
    assert len(seen) == 6 and all(torch.equal(seen[i], seen[i + 2]) for i in (0, 1))


def test_with_dropout_a_step_of_length_0_still_adds_nothing():
    net = toy.model(dropout=0.4)
    results = []
    for strategy in (booster(net, alpha=0.0), SFT()):
        torch.manual_seed(1)
        results.append(toy.method_gradient(strategy, net, DATA, streams={"harmful": toy.endless(HARMFUL)}))
    assert toy.same(*results)


def test_parameters_that_no_loss_reaches_do_not_matter():
    net = toy.model()
    net.idle = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    grads = found(net)
    assert not grads.pop("idle").any()
    del net.idle
    assert toy.same(grads, found(net))


def test_numbers_that_are_not_finite_stop_it_before_anything_moves():
    net = toy.model()
    with torch.no_grad():
        net.lm_head.weight[0, 0] = torch.nan
    before = toy.fingerprint(net)
    with pytest.raises(DataError, match="auxiliary pass is nan"):
        toy.micro_step(booster(net), net, DATA, streams={"harmful": toy.endless(HARMFUL)})
    after = toy.fingerprint(net)
    assert all(torch.equal(before[n], after[n]) or n == "lm_head.weight" for n in before)


def test_what_is_logged():
    net = toy.model()
    step = toy.micro_step(booster(net), net, DATA, streams={"harmful": toy.endless(HARMFUL)})
    g, f = harmful_gradient(net), sft(net)
    cosine = toy.along(g, f) / float(norm(g) * norm(f))
    there = moved(net, g, -ALPHA / float(norm(g)))
    assert step.metrics == pytest.approx(
        {
            "harmful_loss": float(toy.loss_of(net, HARMFUL)),
            "harmful_gradient_norm": float(norm(g)),
            "harmful_loss_after_step": float(toy.loss_of(there, HARMFUL)),
            "safe_harmful_cosine": cosine,
            "attenuation_norm": float(norm(toy.combined((LAM, g), (-LAM, harmful_gradient(there))))),
        },
        rel=1e-5,
    )
    assert step.metrics["harmful_loss_after_step"] < step.metrics["harmful_loss"]


@pytest.mark.parametrize("name", ["lam", "alpha", "rho"])
def test_impossible_options_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must not be negative"):
        BoosterConfig(**{name: -1.0})
