"""Gradients as values, and weights that come back."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from pharmacist.core.errors import CompatibilityError, DataError
from pharmacist.nn.grads import add_to_grad, cosine, gradient, norm, shifted, trainable


@pytest.fixture
def layer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    layer[0].bias.requires_grad_(False)
    return layer


def loss_of(layer: nn.Module) -> torch.Tensor:
    return layer(torch.arange(6.0).view(2, 3)).square().sum()


def test_a_gradient_is_that_of_backward_and_leaves_grad_alone(layer: nn.Module) -> None:
    found = gradient(loss_of(layer), trainable(layer))
    assert list(found) == ["0.weight", "2.weight", "2.bias"]
    assert all(parameter.grad is None for parameter in layer.parameters())
    loss_of(layer).backward()
    assert all(torch.equal(layer.get_parameter(name).grad, value) for name, value in found.items())


def test_what_the_loss_does_not_reach_has_gradient_zero(layer: nn.Module) -> None:
    found = gradient(layer[2].weight.sum(), trainable(layer))
    assert bool((found["0.weight"] == 0).all()) and bool((found["2.weight"] == 1).all())


def test_half_precision_becomes_single_and_double_stays(layer: nn.Module) -> None:
    assert {v.dtype for v in gradient(loss_of(layer), trainable(layer)).values()} == {torch.float32}
    half = nn.Linear(2, 2).bfloat16()
    found = gradient(half.weight.sum(), trainable(half))
    assert {v.dtype for v in found.values()} == {torch.float32}
    double = nn.Linear(2, 2).double()
    assert {v.dtype for v in gradient(double.weight.sum(), trainable(double)).values()} == {torch.float64}


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e38])
def test_what_is_not_finite_is_refused(layer: nn.Module, factor: float) -> None:
    with pytest.raises(DataError, match="auxiliary pass"):
        gradient(loss_of(layer) * factor, trainable(layer))


def test_norm_and_cosine_are_those_of_one_long_vector() -> None:
    a, b = ({"x": torch.randn(3, 2), "y": torch.randn(4)} for _ in range(2))
    flat = [torch.cat([value.flatten() for value in own.values()]) for own in (a, b)]
    assert norm(a) == pytest.approx(float(flat[0].norm()))
    assert cosine(a, b) == pytest.approx(float(torch.cosine_similarity(flat[0], flat[1], 0)), abs=1e-6)
    assert cosine(a, {name: torch.zeros_like(value) for name, value in a.items()}) == 0


def test_gradients_are_added_to_what_is_there(layer: nn.Module) -> None:
    own = trainable(layer)
    ones = {name: torch.ones_like(value) for name, value in own.items()}
    add_to_grad(own, ones, 0.5)
    add_to_grad(own, ones, 0.25)
    assert all(bool((value.grad == 0.75).all()) for value in own.values())


class Broken(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifted_weights_come_back_bit_for_bit(layer: nn.Module, dtype: torch.dtype, fails: bool) -> None:
    own = trainable(layer.to(dtype))
    # By subtraction they would not: 0.1 and the odd step are no binary fractions.
    direction = {name: torch.randn(value.shape) * 7.3 for name, value in own.items()}
    before = {name: value.detach().clone() for name, value in own.items()}
    try:
        with shifted(own, direction, 0.1):
            for name, value in own.items():
                assert torch.equal(value, (before[name].float() + 0.1 * direction[name]).to(dtype))
                assert not torch.equal(value, before[name])
            if fails:
                raise Broken
    except Broken:
        assert fails
    assert all(torch.equal(value, before[name]) for name, value in own.items())
    assert not all(
        torch.equal(((b.float() + 0.1 * direction[n]).to(dtype) - 0.1 * direction[n]).to(dtype), b)
        for n, b in before.items()
    )


def test_only_what_is_named_is_shifted(layer: nn.Module) -> None:
    own = trainable(layer)
    before = {name: value.detach().clone() for name, value in own.items()}
    with shifted(own, {"2.bias": torch.ones(2)}, 1.0):
        assert not torch.equal(own["2.bias"], before["2.bias"])
        assert torch.equal(own["0.weight"], before["0.weight"])


@pytest.mark.parametrize(("dtype", "lost"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_step_that_rounding_would_swallow_is_refused(dtype: torch.dtype, lost: bool) -> None:
    own = {"weight": nn.Parameter(torch.linspace(1, 2, 64).to(dtype))}
    before, direction = own["weight"].detach().clone(), {"weight": torch.linspace(-1, 1, 64)}
    with pytest.raises(CompatibilityError, match="load the model with dtype=torch.float32") if lost else nullcontext():
        with shifted(own, direction, 1e-3):
            assert not torch.equal(own["weight"], before)
    assert torch.equal(own["weight"], before)
    with shifted(own, direction, 0.1):
        assert not torch.equal(own["weight"], before)
