"""Products with row gradients must equal those with gradients from a loop of backward passes, one row at a time."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

from pharmacist.core.errors import CompatibilityError
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import make_batch
from pharmacist.nn.row_gradients import Tape, tape_rows
from tests.support.tiny import TinyDecoder, random_token_rows, row_losses


VOCABULARY = 15
ROWS = random_token_rows(6, VOCABULARY, seed=4, longest=7)


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    """Adapters `fresh` (B = 0) and `used`."""
    bank = AdapterBank(TinyDecoder(VOCABULARY), AdapterOptions(r=3), 0)
    generator = torch.Generator().manual_seed(1)
    noise = lambda value: torch.randn(value.shape, generator=generator, dtype=value.dtype)  # noqa: E731
    bank.add("fresh")
    bank.add("used", {key: value + 0.2 * noise(value) for key, value in bank.state("start").items()})
    return bank


def losses(bank, name, rows):
    return bank.row_losses(name, make_batch(ROWS, rows, bank.device))


def tape(bank, name="used", rows=range(6)) -> Tape:
    with bank.differentiable(name):
        return tape_rows(bank.linears(name), lambda: losses(bank, name, list(rows)))


def one_by_one(bank, name="used") -> dict[str, torch.Tensor]:
    """Row gradients by a loop of backward passes."""
    parameters, found = bank.parameters(name), []
    with bank.differentiable(name):
        for row in range(6):
            found.append(torch.autograd.grad(losses(bank, name, [row])[0], list(parameters.values())))
    return {key: torch.stack([row[k] for row in found]) for k, key in enumerate(parameters)}


def direction(bank) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        key: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for key, value in bank.parameters("used").items()
    }


def product(gradients, direction) -> np.ndarray:
    return sum((value * direction[key]).flatten(1).sum(1) for key, value in gradients.items()).numpy()


def test_row_gradients_equal_a_loop_of_backward_passes(bank):
    expected = one_by_one(bank)
    found = dict(tape(bank).gradients())
    assert found.keys() == expected.keys() and len(found) > 10
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-12)


def test_inner_products_and_norms_need_no_row_gradient(bank):
    expected, d = one_by_one(bank), direction(bank)
    np.testing.assert_allclose(tape(bank).inner(d).numpy(), product(expected, d), rtol=0, atol=1e-11)
    squares = sum(value.square().flatten(1).sum(1) for value in expected.values())
    np.testing.assert_allclose(tape(bank).square_norms().numpy(), squares.numpy(), rtol=1e-11)
    twice = {key: 2 * value for key, value in d.items()}
    np.testing.assert_allclose(tape(bank).inner(twice), 2 * tape(bank).inner(d), rtol=1e-12)


def test_forward_mode_agrees(bank):
    """An independent way: one Jacobian-vector product gives every row's derivative at once."""
    d, batch = direction(bank), make_batch(ROWS, range(6), bank.device)
    with bank.using("used") as model:
        full = {
            key: name for name, p in model.named_parameters() for key, q in bank.parameters("used").items() if p is q
        }

        def of(weights):
            out = functional_call(
                model,
                {full[key]: value for key, value in weights.items()},
                kwargs={"input_ids": batch.input_ids, "attention_mask": batch.attention_mask},
            )
            return row_losses(out.logits, batch.input_ids, batch.lengths, batch.prompt_lengths)

        _, slope = jvp(of, (bank.state("used"),), (d,))
    np.testing.assert_allclose(tape(bank).inner(d).numpy(), slope.numpy(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(3, 2, 40, 50), (3, 30, 4, 5)])
def test_both_ways_to_a_norm_agree(shape):
    rows, length, width, out = shape
    generator = torch.Generator().manual_seed(0)
    x, d = (torch.randn(rows, length, w, generator=generator, dtype=torch.float64) for w in (width, out))
    found = Tape({"w": x}, {"w": d})
    ((_, gradients),) = found.gradients()
    torch.testing.assert_close(found.square_norms(), gradients.square().sum((1, 2)))
    # The matrix of inner products between rows is symmetric and positive semi-definite.
    flat = gradients.flatten(1)
    assert torch.linalg.eigvalsh(flat @ flat.T).min() > -1e-9


def test_rows_do_not_depend_on_their_batch(bank):
    d = direction(bank)
    together = tape(bank).inner(d)
    alone = torch.cat([tape(bank, rows=[row]).inner(d) for row in range(6)])
    turned = tape(bank, rows=range(5, -1, -1)).inner(d)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned.flip(0), together, rtol=0, atol=1e-12)


def test_the_mean_over_a_batchs_tokens_would_weigh_rows_by_length(bank):
    """Negative control: backward of what Hugging Face calls the loss."""
    d, batch = direction(bank), make_batch(ROWS, range(6), bank.device)

    def over_tokens():
        tokens = batch.lengths - batch.prompt_lengths
        return bank.row_losses("used", batch) * tokens / tokens.sum()

    with bank.differentiable("used"):
        wrong = tape_rows(bank.linears("used"), over_tokens).inner(d) * 6
    assert (wrong - tape(bank).inner(d)).abs().max() > 1e-3


def test_a_fresh_adapter_has_no_gradient_at_its_first_factor(bank):
    found = dict(tape(bank, "fresh").gradients())
    assert all((value == 0).all() for key, value in found.items() if "lora_A" in key)
    assert all((value != 0).any() for key, value in found.items() if "lora_B" in key)


def test_layers_that_mix_rows_or_run_twice_are_refused():
    layer, x = nn.Linear(4, 3), torch.randn(2, 5, 4)
    with pytest.raises(CompatibilityError, match="rows cannot be separated"):
        tape_rows({"w": layer}, lambda: layer(x.flatten(0, 1)).sum(1))
    with pytest.raises(CompatibilityError, match="rows cannot be separated"):
        tape_rows({"w": layer}, lambda: (layer(x) + layer(x)).sum((1, 2)))
