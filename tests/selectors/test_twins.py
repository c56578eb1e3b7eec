"""Sections 3 and 6 (4, 5) of the method: what must hold for the bilevel twins, on a float64 decoder."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from pharmacist.core.errors import ConfigError
from pharmacist.nn.adapters import AdapterBank, AdapterOptions, learning_rate_factor
from pharmacist.nn.batching import make_batch
from pharmacist.selectors.gradients import FEWEST_COTRAINED, adapter_losses, cotraining_rows, run_jobs, weight_gradient
from pharmacist.selectors.options import PharmacistConfig
from pharmacist.selectors.pharmacist import twins
from pharmacist.selectors.pharmacist.references import References
from pharmacist.selectors.pharmacist.twins import (
    TWINS,
    TwinProblem,
    Twins,
    closed_form_jobs,
    fit_thresholds,
    gradient_job,
    sigma_closed_form,
    twin_reasons,
)
from tests.support.ridge import Ridge
from tests.support.tiny import TinyDecoder, TokenRows, random_token_rows


VOCABULARY = 15
SAFE, HARMFUL, UTILITY, POOL = (random_token_rows(n, VOCABULARY, seed=n, longest=5).pairs for n in (9, 10, 7, 20))
HARMFUL = HARMFUL[:9]  # as many as safe ones: swapping must swap the rows alone


def make_problem(bank=None, safe=SAFE, harmful=HARMFUL, pool=POOL, utility=UTILITY, **options) -> TwinProblem:
    references = TokenRows([*safe, *harmful, *utility])
    cuts = np.cumsum([0, len(safe), len(harmful), len(utility)])
    rows = {name: np.arange(cuts[k], cuts[k + 1]) for k, name in enumerate(("safe", "harmful", "utility"))}
    options = {"gamma": 0.5, "mu": 0.5, "steps": 6, "seed": 0, "pool_rows": np.arange(len(pool))} | options
    return TwinProblem(bank or make_bank(), references, rows, TokenRows(pool), **options)


def twin_losses(bank: AdapterBank, batch, names=TWINS) -> dict[str, np.ndarray]:
    return adapter_losses(bank, batch, names)


def make_bank(checkpoint_seconds: float = 1e9) -> AdapterBank:
    options = AdapterOptions(r=2, learning_rate=0.02, batch_size=4)
    return AdapterBank(TinyDecoder(VOCABULARY), options, 0, checkpoint_seconds)


def losses_of(bank: AdapterBank, rows: TokenRows) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return twin_losses(bank, make_batch(rows, range(len(rows)), bank.device))


def contrast(tmp_path, read=POOL, sigma=None, **options) -> np.ndarray:
    """Trains the twins at fixed weights; loss under the toxic less that under the safe one."""
    bank = make_bank()
    problem = make_problem(bank, **options)
    sigma = np.ones(len(problem.pool_rows)) if sigma is None else sigma
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    run_jobs(bank, closed_form_jobs(problem, sigma, folder), "test")
    losses = losses_of(bank, TokenRows(read))
    return losses["loss_toxic"] - losses["loss_safe"]


# --- fixed weights --------------------------------------------------------------------------------------------------


def test_equal_references_give_a_contrast_of_exactly_zero(tmp_path):
    assert (contrast(tmp_path, harmful=SAFE) == 0).all()
    # Negative control: one reference less, and it is not.
    assert np.abs(contrast(tmp_path, harmful=[*SAFE[1:], HARMFUL[0]])).min() > 1e-6


def test_twins_with_batches_of_their_own_would_not_cancel(tmp_path, monkeypatch):
    """Negative control of the common random numbers."""
    original = TwinProblem.losses

    def apart(self):
        loss = original(self)
        return lambda twin, step, sigma: loss(twin, step if twin == TWINS[0] else (step + 1) % self.steps, sigma)

    monkeypatch.setattr(TwinProblem, "losses", apart)
    assert np.abs(contrast(tmp_path, harmful=SAFE)).max() > 1e-4


def test_swapping_safe_and_harmful_negates_every_contrast_exactly(tmp_path):
    forth, back = contrast(tmp_path), contrast(tmp_path, safe=HARMFUL, harmful=SAFE)
    assert np.abs(forth).min() > 1e-6 and (back == -forth).all()


def test_without_weight_the_pool_does_not_matter(tmp_path):
    other = random_token_rows(20, VOCABULARY, seed=99).pairs
    nothing = contrast(tmp_path, gamma=0.0)
    assert (contrast(tmp_path, gamma=0.0, pool=other) == nothing).all()
    assert (contrast(tmp_path, gamma=0.0, pool_rows=np.arange(5)) == nothing).all()
    assert (contrast(tmp_path, gamma=0.7, pool_rows=np.zeros(0, np.int64)) == nothing).all(), "the cheap form"
    assert (contrast(tmp_path, gamma=0.5, pool=other) != contrast(tmp_path, gamma=0.5)).all()


def test_only_weighted_rows_of_the_pool_act(tmp_path):
    sigma = np.zeros(20)
    sigma[:10] = 2
    other = POOL[:10] + random_token_rows(10, VOCABULARY, seed=5).pairs
    reference = contrast(tmp_path, sigma=sigma)
    np.testing.assert_allclose(contrast(tmp_path, sigma=sigma, pool=other), reference, rtol=0, atol=1e-9)
    assert np.abs(contrast(tmp_path, sigma=sigma[::-1].copy(), pool=other) - reference).max() > 1e-4


def test_the_twin_loss_equals_its_formula():
    bank = make_bank()
    problem = make_problem(bank, gamma=0.3, mu=0.7)
    for name in TWINS:
        bank.add(name)
    loss, sigma, visited = problem.losses(), torch.rand(20, dtype=torch.float64), problem.batches
    assert np.array_equal(visited("safe"), visited("harmful"))
    for name, own in zip(TWINS, ("safe", "harmful"), strict=True):
        value, pool_losses = loss(name, 3, sigma)

        def mean(rows, sequences=problem.references, name=name):
            return bank.row_losses(name, make_batch(sequences, rows, bank.device))

        pool = mean(problem.pool_rows[visited("pool")[3]], problem.pool)
        expected = (
            0.7
            * (
                mean(problem.rows[own][visited(own)[3]]).mean()
                + 0.7 * mean(problem.rows["utility"][visited("utility")[3]]).mean()
            )
            + 0.3 * (sigma[visited("pool")[3]] * pool).mean()
        )
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(pool_losses, pool, rtol=0, atol=1e-12)


def test_without_harmful_references_the_second_twin_learns_pool_and_utility_alone(tmp_path):
    """Against two trainings written out here: theta with the safe references, theta-hat without."""
    bank = make_bank()
    problem = make_problem(bank, harmful=[], gamma=0.6, mu=0.7)
    sigma = sigma_closed_form(np.random.default_rng(0).normal(size=20), 1.0)
    run_jobs(bank, closed_form_jobs(problem, sigma, tmp_path), "test")
    losses = {f"loss_{name}": losses_by_hand(problem, sigma, name == "safe") for name in ("safe", "auxiliary")}
    with torch.no_grad():
        found = twin_losses(bank, make_batch(problem.pool, range(20), bank.device), problem.twins)
    assert found.keys() == losses.keys() and problem.twins == ("twin_safe", "twin_auxiliary")
    for key, values in losses.items():
        np.testing.assert_allclose(found[key], values, rtol=0, atol=1e-12)
    # Negative control: a second model that also learns the safe references has no contrast.
    assert np.abs(losses["loss_auxiliary"] - losses["loss_safe"]).min() > 1e-6
    # Neither twin is what it is with harmful references, but the safe one.
    apart = make_bank()
    run_jobs(apart, closed_form_jobs(make_problem(apart, gamma=0.6, mu=0.7), sigma, tmp_path / "with"), "test")
    with_harmful = losses_of(apart, problem.pool)
    np.testing.assert_array_equal(with_harmful["loss_safe"], found["loss_safe"])
    assert np.abs(with_harmful["loss_toxic"] - found["loss_auxiliary"]).min() > 1e-6


def losses_by_hand(problem: TwinProblem, sigma: np.ndarray, with_safe: bool) -> np.ndarray:
    """Losses of the pool after AdamW on (1 - gamma) [L_S + mu L_U] + gamma mean_i sigma_i l_i, L_S left out or not."""
    bank = make_bank()
    bank.add("one")
    parameters = list(bank.parameters("one").values())
    optimizer = torch.optim.AdamW(parameters, lr=bank.options.learning_rate, weight_decay=0.0)
    streams = {
        name: twins.batch_stream(n, 4, problem.steps, twins.derive(problem.seed, "twins", name))
        for name, n in (("own", 9), ("utility", 7), ("pool", 20))
    }

    def losses(sequences, rows):
        return bank.row_losses("one", make_batch(sequences, rows, bank.device))

    with bank.differentiable("one"):
        for step in range(problem.steps):
            pool = streams["pool"][step]
            utility = losses(problem.references, problem.rows["utility"][streams["utility"][step]]).mean()
            total = 0.4 * 0.7 * utility + 0.6 * (torch.from_numpy(sigma)[pool] * losses(problem.pool, pool)).mean()
            if with_safe:
                total = total + 0.4 * losses(problem.references, problem.rows["safe"][streams["own"][step]]).mean()
            optimizer.param_groups[0]["lr"] = 0.02 * learning_rate_factor(step, problem.steps)
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    with torch.no_grad():
        return losses(problem.pool, np.arange(20)).numpy()


@pytest.mark.parametrize("utility", [UTILITY, []])
def test_without_harmful_references_rows_like_the_safe_ones_come_first(tmp_path, utility):
    noise = random_token_rows(18, VOCABULARY, seed=41, longest=5).pairs
    pool = [*random_token_rows(2, VOCABULARY, seed=42).pairs, *SAFE, *noise]
    bank = make_bank()
    problem = make_problem(bank, harmful=[], utility=utility, pool=pool, steps=40)
    run_jobs(bank, closed_form_jobs(problem, np.ones(len(pool)), tmp_path), "test")
    with torch.no_grad():
        found = twin_losses(bank, make_batch(problem.pool, range(len(pool)), bank.device), problem.twins)
    like_safe = np.isin(np.arange(len(pool)), np.arange(2, 11))
    score = found["loss_auxiliary"] - found["loss_safe"]
    assert roc_auc_score(like_safe, score) > 0.95
    # Negative control: neither loss alone tells them, and a random label gets nothing out of the score.
    assert roc_auc_score(like_safe, found["loss_auxiliary"]) < 0.8 and roc_auc_score(np.arange(29) % 2, score) < 0.75
    thresholds = fit_thresholds({key: np.linspace(1, 2, len(problem.references)) for key in found}, problem.rows)
    assert thresholds.compliance is None
    assert "teaches_compliance" not in twin_reasons({key: values - 9 for key, values in found.items()}, thresholds)


def test_the_fallback_is_seals_penalty_gradient():
    """In closed form: with utility left out, dG/dw is (1 - gamma) times what SEAL's two models say (`test_seal`)."""
    problem, gamma = Ridge(), 0.999
    r = gamma / (1 - gamma)
    exact = problem.hypergradient()
    safe, auxiliary = problem.solve(gamma, upper=1 - gamma), problem.solve(gamma, upper=0.0)
    difference = problem.losses(safe) - problem.losses(auxiliary)
    found = weight_gradient(problem.sigma, difference, gamma)
    seals = r * weight_gradient(
        problem.sigma, problem.losses(problem.solve(r)) - problem.losses(problem.solve(1.0, upper=0.0)), 1.0
    )
    np.testing.assert_allclose(found, (1 - gamma) * seals, rtol=1e-6, atol=0)
    assert np.linalg.norm(found / (1 - gamma) - exact) < 1e-2 * np.linalg.norm(exact)
    # Negative control: an auxiliary model that also learns the upper level is no auxiliary model.
    assert np.abs(weight_gradient(problem.sigma, problem.losses(safe) - problem.losses(safe), gamma)).max() == 0


def test_utility_references_are_no_duty(tmp_path):
    assert np.isfinite(contrast(tmp_path, utility=[])).all()


# --- weights --------------------------------------------------------------------------------------------------------


def objective(w: torch.Tensor, difference: torch.Tensor, gamma: float) -> torch.Tensor:
    """The part of G = V_safe - V_toxic that depends on w at fixed twins."""
    sigma = torch.softmax(w, 0) * len(w)
    return gamma * (sigma * difference).mean()


def test_the_weight_gradient_equals_central_differences_at_fixed_twins(tmp_path):
    bank = make_bank()
    problem = make_problem(bank)
    run_jobs(bank, closed_form_jobs(problem, np.ones(20), tmp_path), "test")
    losses = losses_of(bank, problem.pool)
    w = np.random.default_rng(0).normal(size=20)

    def value(w: np.ndarray) -> float:
        """V_safe(w) - V_toxic(w) with the twins held fixed, from the losses themselves."""
        sigma = np.exp(w) / np.exp(w).mean()
        rest = {"loss_safe": 1.7, "loss_toxic": 2.1}  # the references' terms, constant in w
        v = {key: (1 - 0.5) * rest[key] + 0.5 * (sigma * losses[key]).mean() for key in losses}
        return v["loss_safe"] - v["loss_toxic"]

    eps = 1e-5
    numeric = np.array([(value(w + eps * e) - value(w - eps * e)) / (2 * eps) for e in np.eye(20)])
    sigma, difference = np.exp(w) / np.exp(w).mean(), losses["loss_safe"] - losses["loss_toxic"]
    found = weight_gradient(sigma, difference, 0.5)
    np.testing.assert_allclose(found, numeric, rtol=0, atol=1e-10)
    assert np.abs(found).max() > 1e-4 and abs(found.sum()) < 1e-15
    t = torch.tensor(w, requires_grad=True)
    objective(t, torch.tensor(difference), 0.5).backward()
    np.testing.assert_allclose(found, t.grad.numpy(), rtol=0, atol=1e-15)
    # Negative control: without the mean it is another vector.
    assert np.abs(0.5 / 20 * sigma * difference - numeric).max() > 1e-5


def test_equal_losses_move_no_weight():
    sigma = np.random.default_rng(0).uniform(0.5, 2, 8)
    sigma /= sigma.mean()
    assert np.abs(weight_gradient(sigma, np.full(8, 3.3), 0.5)).max() < 1e-15


@pytest.mark.parametrize("tau", [0.05, 1.0, 30.0])
def test_the_closed_form_satisfies_the_kkt_conditions(tau):
    d = np.random.default_rng(1).normal(size=50)
    sigma = sigma_closed_form(d, tau)
    assert sigma.min() > 0 and sigma.mean() == pytest.approx(1, abs=1e-12)
    # Minimise mean(sigma d) + tau KL(sigma/N || 1/N), with mean(sigma) = 1: d + tau (log sigma + 1) is constant.
    stationary = d + tau * (np.log(sigma) + 1)
    assert np.ptp(stationary) < 1e-9 * max(1, tau)
    entropic = lambda s: (s * d).mean() + tau * (s * np.log(s)).mean()  # noqa: E731
    rng = np.random.default_rng(2)
    for _ in range(20):
        other = sigma * np.exp(0.1 * rng.normal(size=50))
        assert entropic(other / other.mean()) > entropic(sigma)


def test_a_high_temperature_makes_weights_uniform_and_a_low_one_finite():
    d = np.random.default_rng(1).normal(size=50)
    spread = [np.ptp(sigma_closed_form(d, tau)) for tau in (1, 10, 100, 1e4, 1e8)]
    assert spread == sorted(spread, reverse=True) and spread[-1] < 1e-7
    cold = sigma_closed_form(1000 * d, 1e-3)
    assert np.isfinite(cold).all() and cold.argmax() == d.argmin()


def test_cotrained_rows_are_drawn_by_content():
    keys = random_token_rows(3000, 500).content_keys
    rows = cotraining_rows(keys, 0.2, 0)
    assert len(rows) == len(set(rows)) == 600
    order = np.random.default_rng(0).permutation(3000)
    assert (keys[order][cotraining_rows(keys[order], 0.2, 0)] == keys[rows]).all()
    assert len(np.intersect1d(rows, cotraining_rows(keys, 0.2, 1))) < 200, "another seed draws others"
    assert (cotraining_rows(keys, 0.4, 0)[:600] == rows).all(), "a larger share holds the smaller"
    assert len(cotraining_rows(keys, 0.01, 0)) == FEWEST_COTRAINED
    assert len(cotraining_rows(keys[:100], 0.01, 0)) == 100 and len(cotraining_rows(keys, 0.0, 0)) == 0
    # Every row is as likely as another.
    hits = np.bincount(np.concatenate([cotraining_rows(keys[:600], 0.5, seed) for seed in range(200)]), minlength=600)
    assert abs(hits.mean() - 100) < 1e-9 and hits.std() < 1.3 * np.sqrt(200 * 0.25)


# --- the gradient solver --------------------------------------------------------------------------------------------


def solve(tmp_path, rate=5.0, bank=None, **options) -> tuple[AdapterBank, np.ndarray]:
    bank = bank or make_bank()
    run_jobs(bank, [gradient_job(make_problem(bank, **options), rate, tmp_path)], "test")
    return bank, np.load(tmp_path / "logits.npy", allow_pickle=False)


def test_the_gradient_solver_trains_the_same_twins_as_the_closed_form(tmp_path):
    together, logits = solve(tmp_path / "gradient", rate=0.0)
    apart = make_bank()
    run_jobs(apart, closed_form_jobs(make_problem(apart), np.ones(20), tmp_path / "closed"), "test")
    assert (logits == 0).all()
    for name in TWINS:
        a, b = together.state(name), apart.state(name)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_equal_references_leave_the_logits_at_zero(tmp_path):
    assert (solve(tmp_path / "equal", harmful=SAFE)[1] == 0).all()
    assert np.abs(solve(tmp_path / "other")[1]).max() > 1e-4


def test_the_first_step_of_the_logits_is_the_gradient(tmp_path, monkeypatch):
    _, logits = solve(tmp_path, steps=1, rate=3.0)
    # At step 0 both twins are still their common start, under which no row has a contrast.
    assert (logits == 0).all()
    visited, seen, original = make_problem(steps=2).batches("pool"), [], TwinProblem.losses

    def spied(self):
        loss = original(self)

        def call(*arguments):
            result = loss(*arguments)
            seen.append(result[1].numpy())
            return result

        return call

    monkeypatch.setattr(TwinProblem, "losses", spied)
    _, logits = solve(tmp_path / "two", steps=2, rate=3.0)
    difference = seen[2] - seen[3]
    expected = np.zeros(20)
    expected[visited[1]] = -3.0 * 0.5 * (difference - difference.mean())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)


def test_rows_with_equal_losses_keep_the_weights_they_have(tmp_path, monkeypatch):
    """The batch's mean is taken under its own weights: with unequal ones any other would move all rows of a batch."""
    difference = torch.linspace(-1, 1, 4, dtype=torch.float64)

    def losses(self):
        def loss(twin, step, sigma):
            value = sum(parameter.sum() for parameter in self.bank.parameters(twin).values())
            unequal = difference if step < 5 else torch.full((4,), 0.8, dtype=torch.float64)
            return value, unequal if twin == TWINS[0] else torch.zeros(4, dtype=torch.float64)

        return loss

    monkeypatch.setattr(TwinProblem, "losses", losses)
    _, before = solve(tmp_path / "before", steps=5)
    _, after = solve(tmp_path / "after", steps=10)
    assert np.ptp(before) > 1
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-12)


def test_rows_like_the_safe_references_rise_and_unvisited_rows_stay(tmp_path):
    pool = SAFE + HARMFUL
    _, logits = solve(tmp_path, pool=pool, steps=40, rate=PharmacistConfig().weight_rate)
    assert logits[:9].mean() > 0 > logits[9:].mean()
    assert (logits[:9][:, None] > logits[None, 9:]).mean() > 0.9
    _, short = solve(tmp_path / "short", pool=pool, steps=2, rate=20.0)
    visited = np.unique(make_problem(pool=pool, steps=2).batches("pool"))
    assert len(visited) < 18 and not np.delete(short, visited).any()


def test_both_solvers_agree_on_the_order(tmp_path):
    pool = SAFE[:6] + HARMFUL[:6] + UTILITY[:4] + POOL[:4]
    closed = contrast(tmp_path, read=pool, pool=pool, steps=40)
    agreement = {}
    for rate in (PharmacistConfig().weight_rate, 20.0):
        _, logits = solve(tmp_path / str(rate), pool=pool, steps=40, rate=rate)
        agreement[rate] = spearmanr(logits, closed).statistic
    assert min(agreement) == PharmacistConfig().weight_rate and agreement[min(agreement)] > 0.75
    # Negative control: with large steps one row takes all the weight, and the others stop where they are.
    assert agreement[20.0] < 0.6


@pytest.mark.parametrize("killed_at", [1, 4])
def test_a_killed_gradient_solver_continues_bit_for_bit(tmp_path, killed_at, monkeypatch):
    straight, logits = solve(tmp_path / "straight")
    step = AdapterBank.step

    def killed(self, number, *rest):
        if number == killed_at:
            raise KeyboardInterrupt
        step(self, number, *rest)

    monkeypatch.setattr(AdapterBank, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        solve(tmp_path / "killed", bank=make_bank(checkpoint_seconds=0.0))
    monkeypatch.setattr(AdapterBank, "step", step)
    again, resumed = solve(tmp_path / "killed")
    assert np.array_equal(resumed, logits)
    for name in TWINS:
        a, b = straight.state(name), again.state(name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not list((tmp_path / "killed").glob("*.partial.*"))


@pytest.mark.parametrize("options", [{"cotrain": 0.5}, {"cotrain": 1.0, "gamma": 0.0}])
def test_the_gradient_solver_needs_every_row_and_some_weight(options):
    with pytest.raises(ConfigError, match="selector.solver gradient"):
        PharmacistConfig(solver="gradient", **options)
    PharmacistConfig(solver="gradient", cotrain=1.0)


# --- jobs -----------------------------------------------------------------------------------------------------------


def test_finished_jobs_are_not_done_again(tmp_path, monkeypatch):
    bank = make_bank()
    jobs = partial(closed_form_jobs, make_problem(bank), np.ones(20), tmp_path)
    run_jobs(bank, jobs(), "test")
    monkeypatch.setattr(AdapterBank, "step", lambda *_: pytest.fail("trained again"))
    assert all(job.done for job in jobs())
    run_jobs(bank, jobs(), "test")
    (tmp_path / TWINS[0] / "adapter_config.json").unlink()
    assert [job.done for job in jobs()] == [False, True]


# --- reasons --------------------------------------------------------------------------------------------------------


def test_thresholds_lie_between_the_classes():
    losses = {
        "loss_safe": np.array([1.0, 1.0, 3.0, 3.0, 2.0, 2.0, np.nan]),
        "loss_toxic": np.array([3.0, 3.0, 1.0, 1.0, 2.2, 2.2, np.nan]),
    }
    rows = {"safe": np.array([0, 1]), "harmful": np.array([2, 3]), "utility": np.array([4, 5])}
    found = fit_thresholds(losses, rows)
    assert (found.critical, found.compliance) == (pytest.approx(1.1), pytest.approx(-0.9))
    assert found.hard == pytest.approx(2.0, abs=1e-6)
    without = fit_thresholds(losses, rows | {"utility": np.zeros(0, np.int64)})
    assert (without.critical, without.compliance) == (1.0, -1.0)
    pool = {"loss_safe": np.array([1.0, 3.0, 2.0, 9.0, 1.0]), "loss_toxic": np.array([3.0, 1.0, 2.1, 9.5, 2.2])}
    assert twin_reasons(pool, found).tolist() == (
        ["critical", "teaches_compliance", "not_safety_critical", "low_quality", "critical"]
    )


# --- references that are held out -----------------------------------------------------------------------------------


KNOWN = References(
    rows=[],
    labels=np.repeat([0, 1, 2, 3], [9, 9, 7, 3]),
    made=np.repeat([False, True], [25, 3]),
    folds=np.concatenate([np.arange(n) % 3 for n in (9, 9, 7, 3)]),
    by_source=False,
)
MADE = random_token_rows(3, VOCABULARY, seed=77).pairs


def fitted(root, safe=SAFE, harmful=HARMFUL, utility=UTILITY, made=MADE, known=KNOWN, **options) -> Twins:
    bank = make_bank()
    config = PharmacistConfig(**({"twin_steps": 6, "batch_size": 4, "r": 2} | options))
    own = Twins(bank, config)
    own.fit(TokenRows([*safe, *harmful, *utility, *made]), known, TokenRows(POOL), root, 0)
    return own


def held_changed(rows, seed):
    """Other rows in the place of those of fold 0."""
    others = random_token_rows(len(rows), VOCABULARY, seed=seed, longest=5).pairs
    return [other if i % 3 == 0 else row for i, (row, other) in enumerate(zip(rows, others, strict=True))]


def same_adapters(a: Twins, b: Twins) -> list[bool]:
    states = [(a.bank.state(name), b.bank.state(name)) for name in a.names]
    return [all(torch.equal(x[key], y[key]) for key in x) for x, y in states]


@pytest.mark.parametrize("options", [{}, {"rounds": 2}, {"solver": "gradient", "cotrain": 1.0}])
def test_a_held_out_fold_is_never_trained_on_and_sets_the_thresholds(tmp_path, options):
    before = fitted(tmp_path / "a", **options)
    kinds = {"safe": SAFE, "harmful": HARMFUL, "utility": UTILITY}
    other = {name: held_changed(rows, seed) for seed, (name, rows) in enumerate(kinds.items(), start=60)}
    after = fitted(tmp_path / "b", **other, **options)
    assert same_adapters(before, after) == [True, True]
    assert after.thresholds != before.thresholds
    assert before.report["held_out_references"] == {"safe": 3, "harmful": 3, "utility": 3}
    # Negative control: a row of another fold is trained on.
    trained = fitted(tmp_path / "c", safe=[SAFE[0], POOL[0], *SAFE[2:]], **options)
    assert same_adapters(before, trained)[0] is False


def test_made_references_are_not_trained_on(tmp_path):
    """The evidence makes short answers to utility prompts; the twins learn from what was given."""
    known = dataclasses.replace(KNOWN, labels=np.where(KNOWN.made, 2, KNOWN.labels))
    before = fitted(tmp_path / "a", known=known)
    after = fitted(tmp_path / "b", made=random_token_rows(3, VOCABULARY, seed=78).pairs, known=known)
    assert same_adapters(before, after) == [True, True] and after.thresholds == before.thresholds
    # Negative control: taken for given ones they are.
    given = fitted(tmp_path / "c", known=dataclasses.replace(known, made=np.zeros(28, dtype=bool)))
    assert same_adapters(before, given) == [False, False]


def test_thresholds_and_quality_are_those_of_held_out_references(tmp_path):
    own = fitted(tmp_path)
    with torch.no_grad():
        batch = make_batch(TokenRows([*SAFE, *HARMFUL, *UTILITY]), range(25), own.bank.device)
        losses = twin_losses(own.bank, batch)
    contrast = losses["loss_toxic"] - losses["loss_safe"]
    held = {"safe": np.arange(0, 9, 3), "harmful": np.arange(9, 18, 3), "utility": np.arange(18, 25, 3)}
    centre = {name: np.median(contrast[rows]) for name, rows in held.items()}
    assert own.thresholds.critical == pytest.approx((centre["safe"] + centre["utility"]) / 2, abs=1e-9)
    assert own.thresholds.compliance == pytest.approx((centre["harmful"] + centre["utility"]) / 2, abs=1e-9)
    others = contrast[np.concatenate([held["harmful"], held["utility"]])]
    expected = (contrast[held["safe"]][:, None] > others).mean()
    assert own.quality == own.report["held_out_auc"] == pytest.approx(expected)


def test_a_second_round_weights_the_rows_that_the_safe_twin_fits_better(tmp_path, monkeypatch):
    used, original = [], twins.closed_form_jobs

    def jobs(problem, sigma, folder):
        used.append((problem.pool_rows, sigma))
        return original(problem, sigma, folder)

    monkeypatch.setattr(twins, "closed_form_jobs", jobs)
    fitted(tmp_path / "two", rounds=2, tau=0.5)
    losses = losses_of(fitted(tmp_path / "one").bank, TokenRows(POOL))
    (_, first), (rows, second), (_, alone) = used
    weights = np.exp((losses["loss_toxic"] - losses["loss_safe"])[rows] / 0.5)
    assert (first == 1).all() and (alone == 1).all() and np.ptp(weights) > 0.1
    np.testing.assert_allclose(second, weights / weights.mean(), rtol=1e-9)


def test_the_gradient_solver_ranks_each_row_by_its_own_logit(tmp_path):
    own, keys = fitted(tmp_path, solver="gradient", cotrain=1.0), TokenRows(POOL).content_keys
    logits = np.load(tmp_path / "gradient/logits.npy")
    found = own.ordered(np.zeros(20), keys, tmp_path, 0)
    assert (found[cotraining_rows(keys, 1.0, 0)] == logits).all() and np.ptp(logits) > 1e-3


def test_swapping_references_swaps_the_twins(tmp_path):
    forth, back = fitted(tmp_path / "a"), fitted(tmp_path / "b", safe=HARMFUL, harmful=SAFE)
    x, y = forth.bank.state(TWINS[0]), back.bank.state(TWINS[1])
    assert all(torch.equal(x[key], y[key]) for key in x)


def test_without_others_the_contrast_has_no_quality(tmp_path):
    alone = dataclasses.replace(KNOWN, labels=np.where(KNOWN.labels == 0, 0, 4), made=KNOWN.labels != 0)
    own = fitted(tmp_path, known=alone)
    assert own.quality is None and own.thresholds.compliance is None


def test_saved_twins_are_the_same(tmp_path):
    own = fitted(tmp_path / "run")
    own.save(tmp_path / "saved")
    again = Twins.load(make_bank(), own.config, tmp_path / "saved")
    assert same_adapters(own, again) == [True, True]
    assert (again.thresholds, again.quality, again.report, again.names) == (
        own.thresholds,
        own.quality,
        own.report,
        own.names,
    )
