"""SEAL: both algorithms on a float64 decoder, its weight update, and what the penalty form converges to."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from pharmacist.core.errors import ConfigError
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import make_batch
from pharmacist.selectors import seal
from pharmacist.selectors.gradients import (
    adapter_losses,
    batch_weight_gradient,
    mean_over_copies,
    run_jobs,
    weight_gradient,
)
from pharmacist.selectors.seal import INFORMED, PLAIN, SealConfig, implied_difference, seal_job
from tests.support import peers, village
from tests.support.ridge import Ridge
from tests.support.tiny import TinyDecoder, TokenRows, random_token_rows


VOCABULARY = 15
SAFE, POOL, OTHER = (random_token_rows(n, VOCABULARY, seed=n, longest=5).pairs for n in (9, 20, 21))
OTHER = OTHER[:20]


def ranked(*arguments, **options):
    """A ranking by a model of its own, since adapters stay on it."""
    return peers.ranked(*arguments, model=TinyDecoder(len(peers.TOKENIZER)), **options)


def make_bank(config: AdapterOptions, checkpoint_seconds: float = 1e9) -> AdapterBank:
    return AdapterBank(TinyDecoder(VOCABULARY), config, 0, checkpoint_seconds)


def config(**options) -> SealConfig:
    return SealConfig(**({"r": 2, "learning_rate": 0.02, "batch_size": 4, "epochs": 2} | options))


def solve(folder, safe=SAFE, pool=POOL, checkpoint_seconds=1e9, **options):
    """Trained bank, logits and the losses of the pool under each model."""
    settings = config(**options)
    bank = make_bank(settings, checkpoint_seconds)
    rows = TokenRows(pool)
    job = seal_job(bank, settings, TokenRows(safe), rows, np.arange(len(pool)), 0, folder)
    run_jobs(bank, [job], "test")
    with torch.no_grad():
        losses = adapter_losses(bank, make_batch(rows, range(len(pool)), bank.device), settings.adapters)
    return bank, np.load(folder / "logits.npy", allow_pickle=False), losses


def same(a: AdapterBank, b: AdapterBank, name: str = INFORMED, other: str | None = None) -> bool:
    x, y = a.state(name), b.state(other or name)
    return all(torch.equal(x[key], y[key]) for key in x)


# --- the two models -------------------------------------------------------------------------------------------------


def test_without_weight_the_pool_does_not_touch_the_informed_model(tmp_path):
    a, _, _ = solve(tmp_path / "a", gamma=0.0)
    b, _, _ = solve(tmp_path / "b", gamma=0.0, pool=OTHER)
    assert same(a, b)
    alone = make_bank(config())
    alone.add(INFORMED)
    stream = seal.batch_stream(9, 4, 10, seal.derive(0, "safe"))
    safe = TokenRows(SAFE)
    alone.train(
        (INFORMED,),
        lambda s: alone.row_losses(INFORMED, make_batch(safe, stream[s], alone.device)).mean(),
        steps=10,
        checkpoint=tmp_path / "none",
    )
    assert same(a, alone), "training on the safe references alone, bit for bit"
    c, _, _ = solve(tmp_path / "c", gamma=0.5)
    assert not same(a, c), "negative control"


def test_with_all_the_weight_the_safe_references_do_not_count(tmp_path):
    a, logits, losses = solve(tmp_path / "a", gamma=1.0, epochs=1)
    b, _, _ = solve(tmp_path / "b", gamma=1.0, epochs=1, safe=OTHER)
    assert same(a, b) and same(a, a, INFORMED, PLAIN), "both models are the same model then"
    assert (logits == 0).all() and (implied_difference(losses) == 0).all()
    _, other, gap = solve(tmp_path / "c", gamma=0.9, epochs=1)
    assert np.abs(other).max() > 1e-4 and np.abs(implied_difference(gap)).min() > 1e-6


def test_the_auxiliary_model_does_not_touch_the_informed_one(tmp_path):
    a, _, with_it = solve(tmp_path / "a", weight_rate=0.0)
    b, _, without = solve(tmp_path / "b", weight_rate=0.0, auxiliary=False)
    assert same(a, b) and PLAIN not in {name.removeprefix("loss_") for name in without}
    np.testing.assert_array_equal(implied_difference(without), with_it["loss_informed"])
    # The weights couple them: each algorithm finds other weights, and so another model.
    c, _, _ = solve(tmp_path / "c", weight_rate=1.0)
    d, _, _ = solve(tmp_path / "d", weight_rate=1.0, auxiliary=False)
    assert not same(c, d)


def test_the_loss_equals_its_formula(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(AdapterBank, "train", lambda self, names, loss, **rest: found.update(loss=loss, **rest))
    for method in ("save", "load"):
        monkeypatch.setattr(AdapterBank, method, lambda *_: None)
    settings = config(gamma=0.6, weight_rate=0.7)
    bank = make_bank(settings)
    safe_rows, pool_rows = TokenRows(SAFE), TokenRows(POOL)
    job = seal_job(bank, settings, safe_rows, pool_rows, np.arange(20), 0, tmp_path)
    assert job.steps == 10 and [settings.pool_weight(s, 20) for s in (0, 4, 5, 9)] == [0.3, 0.3, 0.6, 0.6]
    run_jobs(bank, [job], "test")
    generator = torch.Generator().manual_seed(0)
    for name in settings.adapters:
        noise = {
            k: 0.3 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in bank.state(name).items()
        }
        bank.add(name, noise)
    logits = torch.randn(20, generator=generator, dtype=torch.float64)
    found["extra"]["logits"].copy_(logits)
    rows, safe = (seal.batch_stream(n, 4, 10, seal.derive(0, key))[7] for n, key in ((20, "pool"), (9, "safe")))
    mean = lambda name, data, picked: bank.row_losses(name, make_batch(data, picked, bank.device))  # noqa: E731
    weight = (torch.softmax(logits, 0) * 20)[rows]
    informed, plain = (mean(name, pool_rows, rows) for name in (INFORMED, PLAIN))
    expected = 0.4 * mean(INFORMED, safe_rows, safe).mean() + 0.6 * (weight * informed).mean()
    torch.testing.assert_close(found["loss"](7), expected + (weight * plain).mean(), rtol=0, atol=1e-12)
    gap = informed - plain
    moved = logits.clone()
    moved[rows] -= 0.7 * weight * (gap - (weight * gap).sum() / weight.sum())
    torch.testing.assert_close(found["extra"]["logits"], moved, rtol=0, atol=1e-12)


def test_a_killed_training_continues_bit_for_bit(tmp_path, monkeypatch):
    straight, logits, _ = solve(tmp_path / "straight")
    step = AdapterBank.step

    def killed(self, number, *rest):
        if number == 5:
            raise KeyboardInterrupt
        step(self, number, *rest)

    monkeypatch.setattr(AdapterBank, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        solve(tmp_path / "killed", checkpoint_seconds=0.0)
    monkeypatch.setattr(AdapterBank, "step", step)
    again, resumed, _ = solve(tmp_path / "killed")
    assert np.array_equal(resumed, logits) and same(straight, again) and same(straight, again, PLAIN)


# --- the weights ----------------------------------------------------------------------------------------------------


def test_one_step_over_the_whole_pool_ranks_by_the_loss(tmp_path):
    """Without the auxiliary model; with it both models still are their common start, and nothing moves."""
    settings = {"batch_size": 20, "epochs": 1, "weight_rate": 0.2}
    _, logits, _ = solve(tmp_path / "a", auxiliary=False, **settings)
    bank, rows = make_bank(config()), TokenRows(POOL)
    start = bank.row_losses("start", make_batch(rows, range(20), bank.device)).numpy()
    np.testing.assert_allclose(logits, -0.2 * (start - start.mean()), rtol=0, atol=1e-12)
    assert (solve(tmp_path / "b", **settings)[1] == 0).all()


def test_the_mean_over_all_batches_is_the_gradient():
    d = np.random.default_rng(0).normal(size=7)
    total = np.zeros(7)
    batches = list(itertools.combinations(range(7), 3))
    for batch in batches:
        rows = list(batch)
        total[rows] += batch_weight_gradient(np.ones(3), d[rows], 1.0)
    full = 7 * weight_gradient(np.ones(7), d, 1.0)
    factor = total[0] / full[0]
    np.testing.assert_allclose(total, factor * full, rtol=0, atol=1e-12)
    assert factor / len(batches) == pytest.approx(3 / 7 * (2 / 3) * (7 / 6))
    assert (batch_weight_gradient(np.array([0.5, 2.0, 1.0]), np.full(3, 4.2), 1.0) == 0).all()


def visits(n: int, batch: int, epochs: int):
    rng = np.random.default_rng(3)
    for _ in range(epochs):
        yield from np.split(rng.permutation(n), n // batch)


@pytest.mark.parametrize("signed", [False, True])
def test_logits_follow_their_signal_and_not_their_last_visit(signed):
    """Fixed signals, three shuffled epochs; the published dense Adam lifts whatever was not visited lately."""
    n, size = 2048, 64
    rng = np.random.default_rng(0)
    signal = rng.normal(size=n) if signed else rng.lognormal(0.5, 0.5, size=n)
    ours, theirs = np.zeros(n), torch.zeros(n, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([theirs], lr=5e-3, betas=(0.9, 0.95))
    last = np.zeros(n)
    for step, rows in enumerate(visits(n, size, 3)):
        weights = np.exp(ours - ours.max())
        ours[rows] -= 0.05 * batch_weight_gradient((weights / weights.mean())[rows], signal[rows], 1.0)
        adam.zero_grad()
        (n * torch.softmax(theirs, 0)[rows] * torch.from_numpy(signal[rows])).mean().backward()
        adam.step()
        last[rows] = step
    assert spearmanr(-signal, ours).statistic > 0.99 and abs(spearmanr(last, ours).statistic) < 0.05
    dense = theirs.detach().numpy()
    assert spearmanr(-signal, dense).statistic < 0.95
    if not signed:
        assert spearmanr(last, dense).statistic > 0.15, "when a row was visited shows in its rank"


def test_copies_share_their_mean():
    keys = np.array([5, 9, 5, 7], dtype=np.uint64)
    found = mean_over_copies(keys, np.array([2, 0, 3, 1]), np.array([1.0, 3.0, 8.0, 4.0]))
    np.testing.assert_array_equal(found, [2.0, 4.0, 2.0, 8.0])


# --- the bilevel problem ---------------------------------------------------------------------------------------------


def test_the_penalty_gradient_converges_with_the_auxiliary_model_and_not_without():
    problem = Ridge()
    exact, plain = problem.hypergradient(), problem.solve(1.0, upper=0.0)
    errors, angles = [], []
    for r in (10.0, 100.0, 1000.0):
        informed = problem.solve(r)
        losses = {"loss_informed": problem.losses(informed), "loss_plain": problem.losses(plain)}
        found = r * weight_gradient(problem.sigma, implied_difference(losses), 1.0)
        errors.append(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        alone = weight_gradient(problem.sigma, implied_difference({"loss_informed": losses["loss_informed"]}), 1.0)
        angles.append(alone @ exact / np.linalg.norm(alone) / np.linalg.norm(exact))
    assert errors[2] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.3) and errors[1] / errors[2] == pytest.approx(10, rel=0.1)
    assert max(np.abs(angles[1:])) < 0.9, "the loss alone points elsewhere where the pool is not interpolated"


# --- the selector ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_by", ["losses", "logits"])
def test_rows_like_the_safe_references_come_first(tmp_path, rank_by):
    pool = village.rows("safe", 20, seed=9) + village.rows("harmful", 20, seed=9)
    choice = {"name": "seal", "epochs": 4, "batch_size": 8, "learning_rate": 0.01, "rank_by": rank_by}
    found = ranked(tmp_path, choice, pool, {"safe": village.rows("safe", 12)})
    labels = np.arange(40) < 20
    assert roc_auc_score(labels, found.score) > 0.95 and found.report == {"steps": 20}
    np.testing.assert_array_equal(
        found.score,
        found.signals["logit"]
        if rank_by == "logits"
        else found.signals["loss_plain"] - found.signals["loss_informed"],
    )


def test_without_the_auxiliary_model_the_score_is_the_loss(tmp_path):
    found = ranked(tmp_path, {"name": "seal", "auxiliary": False, "epochs": 1})
    np.testing.assert_array_equal(found.score, -found.signals["loss_informed"])
    assert "loss_plain" not in found.signals


def test_a_ranking_that_would_not_see_the_safe_references_is_refused():
    with pytest.raises(ConfigError, match="gamma 1"):
        peers.SELECTORS.build_from({"name": "seal", "gamma": 1.0, "epochs": 1})


def test_batches_of_one_row_are_allowed_where_no_weight_moves(tmp_path):
    found = ranked(tmp_path, {"name": "seal", "epochs": 1, "batch_size": 1, "weight_rate": 0.0})
    assert len(np.unique(found.score)) > 10 and found.weight is None and not found.signals["logit"].any()


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"gamma": 1.1},
        {"gamma": -0.1},
        {"weight_rate": -1.0},
        {"rank_by": "logits", "weight_rate": 0.0},
        {"batch_size": 1},
    ],
)
def test_bad_options_are_told(options):
    with pytest.raises(ConfigError, match="must|selector"):
        SealConfig(**options)
