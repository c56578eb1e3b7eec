import math

import pytest
import torch

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.defenses.alignment.sft import SFT
from pharmacist.defenses.alignment.vaccine import Vaccine, VaccineConfig, joint_norm, perturbation
from pharmacist.nn.hooks import activation_gradients, add_offsets
from pharmacist.nn.locate import attention_modules
from tests.support import toy


RHO = 0.7
DATA = toy.batch(toy.rows(4, seed=1))


def vaccine(net, rho=RHO):
    strategy = Vaccine(VaccineConfig(rho=rho))
    strategy.setup(net, 0)
    return strategy


def gradients(net, data=DATA, factor=1.0):
    return activation_gradients(attention_modules(net), lambda: factor * toy.loss_of(net, data))[1]


def plain_gradients(net, data=DATA):
    """The same, the textbook way: offsets of zero as leaves."""
    modules = attention_modules(net)
    shape = (*data["input_ids"].shape, 8)
    zeros = {name: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for name in modules}
    with add_offsets(modules, zeros):
        loss = toy.loss_of(net, data)
    return dict(zip(zeros, torch.autograd.grad(loss, list(zeros.values())), strict=True))


def offsets(net, data=DATA, rho=RHO, factor=1.0):
    g = gradients(net, data, factor)
    return perturbation(g, rho, joint_norm(g))


def perturbed_loss(net, eps, data=DATA):
    with add_offsets(attention_modules(net), eps):
        return toy.loss_of(net, data)


def test_rho_0_is_sft_bit_for_bit_and_more_is_not():
    net = toy.model()
    plain = toy.method_gradient(SFT(), net, DATA)
    assert toy.same(toy.method_gradient(vaccine(net, 0.0), net, DATA), plain)
    assert toy.difference(toy.method_gradient(vaccine(net), net, DATA), plain) > 1e-3


def test_activation_gradients_are_total_derivatives_by_an_offset():
    net = toy.model()
    found, plain = gradients(net), plain_gradients(net)
    assert list(found) == list(attention_modules(net)) and len(found) == 3
    assert toy.difference(found, plain) < 1e-14
    assert all(p.grad is None for p in net.parameters())
    assert torch.is_grad_enabled()


def test_the_perturbation_has_the_joint_norm_rho_and_one_ratio_for_all_layers():
    net = toy.model()
    g = gradients(net)
    eps = perturbation(g, RHO, joint_norm(g))
    n = math.sqrt(sum(float(value.square().sum()) for value in g.values()))
    assert float(joint_norm(g)) == pytest.approx(n, rel=1e-12)
    assert float(joint_norm(eps)) == pytest.approx(RHO * n / (n + 1e-7), rel=1e-12)
    for name in g:
        assert torch.allclose(eps[name], g[name] * RHO / (n + 1e-7), rtol=1e-12, atol=0)
    per_layer = {float(value.norm()) for value in eps.values()}
    assert max(per_layer) - min(per_layer) > 1e-2, "a norm per layer would make these equal"


def test_the_loss_rises_with_rho_at_the_rate_of_the_gradient_norm():
    net, h = toy.model(), 1e-4
    losses = [float(perturbed_loss(net, offsets(net, rho=rho)).detach()) for rho in (h, -h)]
    rise = (losses[0] - losses[1]) / (2 * h)
    assert rise == pytest.approx(float(joint_norm(gradients(net))), rel=1e-6)


def test_the_gradient_is_that_of_the_loss_with_the_perturbation_held_fixed():
    net = toy.model()
    found, direction = toy.method_gradient(vaccine(net), net, DATA), toy.random_direction(net)
    eps = offsets(net)
    fixed = toy.directional(net, lambda: perturbed_loss(net, eps), direction)
    moving = toy.directional(net, lambda: perturbed_loss(net, offsets(net)), direction)
    assert toy.along(found, direction) == pytest.approx(fixed, rel=1e-6)
    assert abs(toy.along(found, direction) - moving) > 1e-3 * abs(fixed), "no derivative of the perturbation"


def test_the_perturbation_ignores_the_scale_of_the_loss_and_the_padding():
    net, padded = toy.model(), toy.batch(toy.rows(4, seed=1), pad=3)
    length = DATA["input_ids"].shape[1]
    eps, scaled, wide = offsets(net), offsets(net, factor=7.0), offsets(net, padded)
    assert toy.difference(eps, scaled) < 1e-6
    for name in eps:
        assert torch.allclose(wide[name][:, :length], eps[name], atol=1e-12)
        assert not wide[name][:, length:].any()
        assert not eps[name][DATA["attention_mask"] == 0].any()
    assert (
        toy.difference(toy.method_gradient(vaccine(net), net, DATA), toy.method_gradient(vaccine(net), net, padded))
        < 1e-12
    )


def test_the_last_layer_is_perturbed_only_where_a_target_follows():
    net = toy.model()
    *lower, last = offsets(net).values()
    follows = torch.nn.functional.pad(DATA["labels"][:, 1:], (0, 1), value=-100) != -100
    assert not last[~follows].any() and last[follows].any(-1).all()
    prompt = (DATA["labels"] == -100) & (DATA["attention_mask"] == 1) & ~follows
    assert all(layer[prompt].any() for layer in lower)


def test_two_micro_batches_add_up():
    net = toy.model()
    halves = [toy.batch(toy.rows(4, seed=1), which) for which in ((0, 1), (2, 3))]
    apart = [toy.method_gradient(vaccine(net), net, half) for half in halves]
    net.zero_grad()
    for number, half in enumerate(halves):
        toy.micro_step(vaccine(net), net, half, micro=number, scale=0.5)
    together = {name: p.grad for name, p in toy.trainable(net).items()}
    assert toy.difference(together, toy.combined((0.5, apart[0]), (0.5, apart[1]))) < 1e-14
    assert toy.difference(together, apart[1]) > 1e-3, "not the last micro-batch alone"


@pytest.mark.parametrize("broken", [1, 2])
def test_a_failing_pass_leaves_nothing_behind(broken):
    net, calls = toy.model(), []

    def fail(module, args):
        calls.append(None)
        if len(calls) == broken:
            raise RuntimeError("out of memory")

    handle = net.lm_head.register_forward_pre_hook(fail)
    before, random = toy.fingerprint(net), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        toy.micro_step(vaccine(net), net, DATA)
    handle.remove()
    assert toy.hooks(net) == 0 and toy.same(before, toy.fingerprint(net))
    assert torch.is_grad_enabled() and torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())
    fresh = toy.model()
    assert toy.same(toy.method_gradient(vaccine(net), net, DATA), toy.method_gradient(vaccine(fresh), fresh, DATA))


def test_both_passes_draw_the_same_dropout_masks():
    net = toy.model(dropout=0.4)
    seen = []
    net.layers[0].dropout.register_forward_hook(lambda module, args, out: seen.append((out == 0) & (args[0] != 0)))
    torch.manual_seed(3)
    toy.micro_step(vaccine(net), net, DATA)
    first, again = seen[:2], seen[2:]
    assert len(first) == len(again) == 2 and all(mask.any() for mask in seen)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


def test_gradient_checkpointing_changes_nothing():
    plain, saving = toy.model(dropout=0.2), toy.model(dropout=0.2, checkpointing=True)
    found = []
    for net in (plain, saving):
        torch.manual_seed(0)
        found.append(toy.method_gradient(vaccine(net), net, DATA))
    assert toy.difference(*found) < 1e-14


def test_what_is_logged():
    net = toy.model()
    step = toy.micro_step(vaccine(net), net, DATA)
    eps = offsets(net)
    assert step.metrics == pytest.approx(
        {
            "clean_loss": float(toy.loss_of(net, DATA)),
            "perturbed_loss": float(perturbed_loss(net, eps)),
            "activation_gradient_norm": float(joint_norm(gradients(net))),
            "perturbation_norm": RHO,
        },
        rel=1e-6,
    )
    assert step.metrics["perturbed_loss"] > step.metrics["clean_loss"]


def test_numbers_that_are_not_finite_stop_it_before_anything_moves():
    net = toy.model()
    with torch.no_grad():
        net.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        toy.micro_step(vaccine(net), net, DATA)
    assert all(p.grad is None for p in net.parameters()) and toy.hooks(net) == 0


@pytest.mark.parametrize("rho", [-1.0, math.nan])
def test_an_impossible_rho_is_refused(rho):
    with pytest.raises(ConfigError, match="rho must not be negative"):
        VaccineConfig(rho=rho)
