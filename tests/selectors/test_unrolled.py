"""The one-step hypergradient against differences of the safety loss itself, on a float64 decoder."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from pharmacist.core.errors import ConfigError
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import make_batch
from pharmacist.nn.grads import Gradient, norm
from pharmacist.selectors import unrolled
from pharmacist.selectors.gradients import loss_and_gradient, mean_loss, moved, row_tape
from pharmacist.selectors.unrolled import LEARNER, Hypergradient, UnrolledConfig, one_step_weights
from tests.support import peers, village
from tests.support.tiny import TinyDecoder, TokenRows, random_token_rows


VOCABULARY, N = 15, 8
POOL, SAFE = (TokenRows(random_token_rows(n, VOCABULARY, seed=n, longest=5).pairs) for n in (N, 9))


def ranked(*arguments, **options):
    """A ranking by a model of its own, since adapters stay on it."""
    return peers.ranked(*arguments, model=TinyDecoder(len(peers.TOKENIZER)), **options)


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    bank = AdapterBank(TinyDecoder(VOCABULARY), AdapterOptions(r=2, batch_size=4), 0)
    generator = torch.Generator().manual_seed(1)
    noise = lambda value: 0.2 * torch.randn(value.shape, generator=generator, dtype=value.dtype)  # noqa: E731
    bank.add(LEARNER, {key: value + noise(value) for key, value in bank.state("start").items()})
    return bank


def everything(bank):
    return make_batch(POOL, range(N), bank.device)


def row_gradients(bank) -> list[Gradient]:
    parts = dict(row_tape(bank, LEARNER, everything(bank)).gradients())
    return [{key: value[row] for key, value in parts.items()} for row in range(N)]


def safety_loss(bank, state: Gradient) -> float:
    bank.add("probe", state)
    with torch.no_grad():
        batch = make_batch(SAFE, range(len(SAFE)), bank.device)
        return float(bank.row_losses("probe", batch).mean())


def test_the_mean_gradient_is_the_mean_of_the_rows(bank):
    loss, found = loss_and_gradient(bank, LEARNER, POOL, np.arange(N))
    assert loss == pytest.approx(mean_loss(bank, LEARNER, POOL))
    for key, value in found.items():
        expected = torch.stack([row[key] for row in row_gradients(bank)]).mean(0)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-13)


def problem(bank, lookahead: float) -> Hypergradient:
    return Hypergradient(bank, POOL, np.arange(N), SAFE, lookahead)


def scores(bank, own: Hypergradient, direction: Gradient) -> np.ndarray:
    with torch.no_grad():
        return own.slopes(own.move_apart(direction), everything(bank))["slope"] * float(norm(direction))


def test_scores_are_the_derivative_of_the_safety_loss_after_the_step(bank):
    eta, eps = 0.3, 1e-5
    rows, state = row_gradients(bank), bank.state(LEARNER)

    def after(w: np.ndarray) -> float:
        sigma = np.exp(w) / np.exp(w).sum()
        step = {key: sum(s * row[key] for s, row in zip(sigma, rows, strict=True)) for key in state}
        return safety_loss(bank, moved(state, step, -eta))

    numeric = np.array([(after(eps * e) - after(-eps * e)) / (2 * eps) for e in np.eye(N)])
    direction = problem(bank, eta).safety()[1]
    exact = row_tape(bank, LEARNER, everything(bank)).inner(direction).numpy()
    np.testing.assert_allclose(-eta / N * (exact - exact.mean()), numeric, rtol=0, atol=1e-6)
    score = scores(bank, problem(bank, eta), direction)
    np.testing.assert_allclose(-eta / N * (score - score.mean()), numeric, rtol=0, atol=3e-5)
    assert np.abs(numeric).max() > 1e-4
    # Negative control: the safety gradient before the step is another one.
    other = scores(bank, problem(bank, 0.0), problem(bank, 0.0).safety()[1])
    assert np.abs(-eta / N * (other - other.mean()) - numeric).max() > 1e-3


def test_differences_converge_on_the_inner_product_with_slope_two(bank, monkeypatch):
    direction = problem(bank, 0.1).safety()[1]
    exact = row_tape(bank, LEARNER, everything(bank)).inner(direction).numpy()
    errors = []
    for length in (1e-2, 1e-3, 1e-4):
        monkeypatch.setattr(unrolled, "_LENGTHS", {torch.float64: length})
        errors.append(np.linalg.norm(scores(bank, problem(bank, 0.1), direction) - exact))
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.2) and errors[1] / errors[2] == pytest.approx(
        100, rel=0.2
    )


def test_rows_like_the_safe_references_come_first(tmp_path):
    pool = village.rows("safe", 20, seed=9) + village.rows("harmful", 20, seed=9)
    choice = {"name": "unrolled", "steps": 20, "batch_size": 8, "learning_rate": 0.01}
    found = ranked(tmp_path, choice, pool)
    assert roc_auc_score(np.arange(40) < 20, found.score) > 0.95 and found.report["safety_gradient"] > 0
    # Swapped references turn the ranking round.
    refs = village.references()
    other = ranked(tmp_path / "other", choice, pool, {"safe": refs["harmful"]})
    assert roc_auc_score(np.arange(40) < 20, other.score) < 0.05


def test_weights_are_the_positive_part_with_mean_1():
    weight = one_step_weights(np.array([3.0, -2.0, 1.0, 0.0]))
    assert weight.tolist() == [3.0, 0.0, 1.0, 0.0]
    assert one_step_weights(np.array([-1.0, -2.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("options", [{"steps": 0}, {"share": 0.0}, {"lookahead": -0.1}])
def test_bad_options_are_told(options):
    with pytest.raises(ConfigError, match="must|selector"):
        UnrolledConfig(**options)
