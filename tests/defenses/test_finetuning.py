"""The mathematics of the fine-tuning-stage defenses, in float64 and without a Trainer."""

import itertools

import pytest
import torch
from torch import nn

from pharmacist.core.errors import ConfigError, DataError, NoMatchError
from pharmacist.defenses import DEFENSES
from pharmacist.defenses.alignment.sft import SFT
from pharmacist.defenses.finetuning import ewc as ewc_module
from pharmacist.defenses.finetuning.constrained_sft import ConstrainedSFTConfig, answer_positions, betas, token_weights
from pharmacist.defenses.finetuning.kl import kl_divergence, reference_divergence
from pharmacist.defenses.finetuning.ldifs import feature_distance, gated_distance
from pharmacist.defenses.finetuning.lisa import in_alignment, is_switch
from pharmacist.defenses.finetuning.start import at_start, squared_distance, weights_now
from pharmacist.nn.grads import trainable
from pharmacist.nn.hooks import capture
from pharmacist.nn.locate import mlp_modules
from pharmacist.training.strategy import StepContext
from tests.support import toy


ROWS = toy.rows(6, seed=1)
DATA = toy.batch(ROWS)
SAFE = [toy.batch(toy.rows(3, seed=seed)) for seed in (5, 6)]

ON = {
    "ldifs": {"lam": 2.0},
    "ewc": {"lam": 3.0, "rows": 6},
    "kl": {"lam": 0.7},
    "constrained-sft": {"beta": 0.3},
    "lisa": {"rho": 0.5, "align_steps": 0},
    "vlguard": {"mode": "joint", "lam": 0.4},
}
"""A setting of each in which it acts on a single step."""
OFF = {
    "ldifs": {"lam": 0.0},
    "ewc": {"lam": 0.0},
    "kl": {"lam": 0.0},
    "constrained-sft": {"beta": 0.0},
    "lisa": {"rho": 0.0, "align_steps": 0},
    "vlguard": {"mode": "joint", "lam": 0.0},
}
"""The same with strength 0."""
PENALTIES = ["ldifs", "ewc", "kl", "lisa"]


def streams():
    return {"safe": toy.endless(*SAFE)}


def build(name, net, more=None, **options):
    strategy = DEFENSES.build(name, (ON[name] if more is None else more) | options)
    strategy.setup(net, 0)
    return strategy


def moved(net, size=0.1, seed=3):
    """The same model a little way off."""
    direction = toy.random_direction(net, seed)
    with torch.no_grad():
        for name, parameter in trainable(net).items():
            parameter += size * direction[name]
    return direction


def off_start(name, net, data=DATA, more=None, size=0.1, **options):
    """Gradient of a step of a model that has moved since the defense was set up."""
    strategy = build(name, net, more, **options)
    if name == "ewc":
        strategy.auxiliary(StepContext(model=net, batch=data, streams=streams()))
    moved(net, size)
    # Not the first step: Lisa's anchor stays where it was.
    return toy.method_gradient(strategy, net, data, streams=streams(), update=1), strategy


def sft_gradient(net, data=DATA):
    return toy.method_gradient(SFT(), net, data)


# --- what all of them share ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFF)
def test_strength_0_is_sft_bit_for_bit_and_more_is_not(name):
    net = toy.model()
    state = torch.get_rng_state()
    found, _ = off_start(name, net, more=OFF[name])
    plain = sft_gradient(net)
    assert toy.same(found, plain)
    assert torch.equal(torch.get_rng_state(), state)
    acting, _ = off_start(name, toy.model())
    assert toy.difference(acting, plain) > 1e-4


@pytest.mark.parametrize("name", [*PENALTIES, "constrained-sft"])
def test_at_the_start_the_gradient_is_that_of_sft(name):
    net = toy.model()
    strategy = build(name, net)
    found = toy.method_gradient(strategy, net, DATA, streams=streams())
    assert toy.difference(found, sft_gradient(net)) < 1e-12


@pytest.mark.parametrize("name", ON)
def test_padding_changes_nothing(name):
    found, _ = off_start(name, toy.model())
    padded, _ = off_start(name, toy.model(), data=toy.batch(ROWS, pad=3))
    assert toy.difference(found, padded) < 1e-12


@pytest.mark.parametrize(("name", "compat"), [("kl", "reference"), ("ldifs", "reference")])
def test_padding_changes_what_is_published(name, compat):
    more = {"lam": 1e-3 if name == "ldifs" else 0.7, "compat": compat}
    found, _ = off_start(name, toy.model(), more=more, size=0.01)
    padded, _ = off_start(name, toy.model(), data=toy.batch(ROWS, pad=3), more=more, size=0.01)
    assert toy.difference(found, padded) > 1e-9


@pytest.mark.parametrize("name", ON)
def test_weights_mode_hooks_and_random_state_come_back(name):
    net = toy.model()
    strategy = build(name, net)
    before, state = toy.fingerprint(net), torch.get_rng_state()
    net.layers[0].eval()
    toy.micro_step(strategy, net, DATA, streams=streams())
    assert toy.same(toy.fingerprint(net), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training and not net.layers[0].training and net.layers[1].training
    assert toy.hooks(net) == 0


@pytest.mark.parametrize("name", ON)
def test_nothing_stays_behind_where_the_main_pass_fails(name):
    net = toy.model()
    strategy = build(name, net)
    before = toy.fingerprint(net)
    step = StepContext(model=net, batch=DATA, streams=streams())
    with pytest.raises(RuntimeError), strategy.around(step):
        raise RuntimeError
    assert toy.same(toy.fingerprint(net), before) and toy.hooks(net) == 0 and net.training


@pytest.mark.parametrize("name", [*PENALTIES, "constrained-sft"])
def test_micro_batches_add_up(name):
    """Two micro-batches of equally long rows give the gradient of one batch of both."""
    ids = torch.randint(1, toy.VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = -100
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    halves = [{key: value[i : i + 2] for key, value in whole.items()} for i in (0, 2)]
    expected, strategy = off_start(name, net := toy.model(), data=whole)
    net.zero_grad()
    for micro, half in enumerate(halves):
        toy.micro_step(strategy, net, half, streams=streams(), update=1, micro=micro, scale=0.5)
    assert toy.difference({n: p.grad for n, p in trainable(net).items()}, expected) < 1e-12


@pytest.mark.parametrize("name", ON)
def test_eight_micro_batches_of_unequal_size_give_what_one_batch_gives(name):
    rows, safe = toy.rows(23, seed=8, longest=12), toy.rows(23, seed=9, longest=12)
    parts = toy.unequal_parts()

    def update(groups, known=True):
        net = toy.model()
        strategy = build(name, net)
        if name == "ewc":
            strategy.auxiliary(StepContext(model=net, batch=DATA, streams=streams()))
        moved(net)
        side = {"safe": toy.endless(*(toy.batch(safe, which) for which in groups))}
        batches = [toy.batch(rows, which) for which in groups]
        return toy.accumulated(strategy, net, batches, known=known, streams=side, update=1)

    (many, logged), (one, expected) = update(parts), update([sum(parts, [])])
    assert toy.difference(many, one) < 1e-12
    assert logged == pytest.approx(expected, abs=1e-12)
    # The rows tell the two apart: the mean of the micro-batches' own means is another gradient.
    naive, _ = update(parts, known=False)
    assert toy.difference(naive, one) > 1e-4


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("ldifs", "lam"),
        ("ewc", "lam"),
        ("kl", "lam"),
        ("constrained-sft", "beta"),
        ("lisa", "rho"),
        ("vlguard", "lam"),
    ],
)
def test_negative_strength_is_refused(name, option):
    with pytest.raises(ConfigError, match=f"{option} must not be negative"):
        DEFENSES.build(name, {option: -1.0})


@pytest.mark.parametrize("name", ON)
def test_they_are_for_fine_tuning(name):
    assert DEFENSES.get(name).stages == {"finetune"}
    assert ("safe" in DEFENSES.get(name).streams) == (name in ("ewc", "lisa", "vlguard"))


def test_a_pass_at_the_start_is_without_dropout_and_leaves_no_graph():
    net = toy.model()
    drop = lambda module, args, out: nn.functional.dropout(out, 0.5, module.training)  # noqa: E731
    next(iter(mlp_modules(net).values())).register_forward_hook(drop)
    start = weights_now(net)
    step = StepContext(model=net, batch=DATA)
    expected = net.eval()(DATA["input_ids"], DATA["attention_mask"]).logits
    net.train()
    moved(net)
    with at_start(step, start):
        found = step.output(DATA).logits
    assert torch.equal(found, expected.detach()) and not found.requires_grad
    assert all(p.grad is None for p in net.parameters())


# --- LDIFS ---------------------------------------------------------------------------------------------------------


def features(net, data=DATA):
    with capture(mlp_modules(net)) as found:
        net(data["input_ids"], data["attention_mask"])
    return dict(found)


def test_feature_distance_is_the_masked_mean_of_squares():
    net = toy.model(layers=2)
    start = features(net)
    moved(net)
    now, expected = features(net), 0.0
    for name in start:
        squares = [
            float(((now[name][i, t] - start[name][i, t]) ** 2).mean().detach())
            for i, t in itertools.product(*map(range, DATA["input_ids"].shape))
            if DATA["attention_mask"][i, t]
        ]
        expected += sum(squares) / len(squares)
    found = feature_distance(now, start, DATA["attention_mask"]).detach()
    assert len(start) == 2 and float(found) == pytest.approx(expected)


def test_feature_distance_is_quadratic_in_the_drift_and_linear_in_lam():
    start = features(toy.model())
    mask = DATA["attention_mask"]
    drift = {name: torch.randn_like(value) for name, value in start.items()}
    near, far = (
        float(feature_distance({n: start[n] + h * drift[n] for n in start}, start, mask).detach()) for h in (0.1, 0.2)
    )
    assert far == pytest.approx(4 * near) and near > 0
    plain = sft_gradient(net := toy.model())
    moved(net)
    plain = sft_gradient(net)
    once, twice = (toy.combined((1, off_start("ldifs", toy.model(), lam=lam)[0]), (-1, plain)) for lam in (1.0, 2.0))
    assert toy.difference(toy.combined((2, once)), twice) < 1e-12


def test_the_published_gate_drops_what_drifts_far():
    start = {"a": torch.zeros(1, 2, 5), "b": torch.zeros(1, 2, 5)}
    now = {"a": torch.full((1, 2, 5), 0.1), "b": torch.full((1, 2, 5), 1.0)}
    # Sums of squares of 0.1 and of 10; rho / 2 times these.
    assert float(gated_distance(now, start, rho=0.01)) == pytest.approx(0.0005 + 0.05)
    assert float(gated_distance(now, start, rho=0.1)) == pytest.approx(0.005)
    ours = [float(feature_distance({"a": h * now["b"]}, {"a": start["a"]}, torch.ones(1, 2))) for h in (1, 2, 4)]
    assert ours == sorted(ours) and ours[0] == pytest.approx(1.0)


def test_ldifs_needs_a_model_with_layers():
    with pytest.raises(NoMatchError):
        build("ldifs", nn.Linear(2, 2))


# --- EWC -----------------------------------------------------------------------------------------------------------


def estimate(net, **options):
    strategy = build("ewc", net, **options)
    strategy.auxiliary(StepContext(model=net, batch=DATA, streams=streams()))
    return strategy.fisher


def test_fisher_is_the_mean_of_squared_gradients_of_rows():
    net = toy.model()
    rows = [{name: tensor[[row]] for name, tensor in data.items()} for data in SAFE for row in range(3)]
    singles = [toy.gradient_of(net, toy.loss_of(net, row)) for row in rows]
    found = estimate(net)
    for name, value in found.items():
        assert torch.allclose(value, sum(g[name] ** 2 for g in singles) / 6, rtol=1e-10, atol=1e-30)
        assert (value >= 0).all()


def test_fisher_of_batches_is_another_and_sums_are_not_means():
    net = toy.model()
    batches = [toy.gradient_of(net, toy.loss_of(net, data)) for data in SAFE]
    per_batch = estimate(net, per="batch", normalize="sum")
    for name, value in per_batch.items():
        assert torch.allclose(value, sum(g[name] ** 2 for g in batches), rtol=1e-10, atol=1e-30)
    per_row = estimate(net, normalize="sum")
    assert toy.difference(toy.combined((6, estimate(net))), per_row) < 1e-12
    assert toy.difference(per_batch, per_row) > 1e-4


def test_fisher_does_not_depend_on_how_rows_are_batched():
    net, rows = toy.model(), toy.rows(6, seed=9)
    found = []
    for size in (2, 3):
        strategy = build("ewc", net)
        source = toy.endless(*(toy.batch(rows, range(i, i + size)) for i in range(0, 6, size)))
        strategy.auxiliary(StepContext(model=net, batch=DATA, streams={"safe": source}))
        found.append(strategy.fisher)
    assert toy.difference(*found) < 1e-14


def test_fisher_is_estimated_without_dropout():
    net, still = toy.model(dropout=0.3), toy.model()
    state = torch.get_rng_state()
    found = estimate(net)
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in net.modules())
    assert toy.difference(found, estimate(still)) < 1e-14
    # Dropout would have changed it.
    torch.manual_seed(0)
    row = {name: tensor[[0]] for name, tensor in SAFE[0].items()}
    assert toy.difference(*(toy.gradient_of(one, toy.loss_of(one, row)) for one in (net, still))) > 1e-4


def test_fisher_of_a_softmax_regression_in_closed_form():
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 3, 2, 1])
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    losses = nn.functional.cross_entropy(x @ weight.T, y, reduction="none")
    grads = [{"w": torch.autograd.grad(loss, weight, retain_graph=True)[0]} for loss in losses]
    residual = (x @ weight.detach().T).softmax(-1) - nn.functional.one_hot(y, 4)
    expected = torch.einsum("no,ni->oi", residual**2, x**2)
    assert torch.allclose(ewc_module.fisher(grads, "sum")["w"], expected, rtol=1e-12)


def test_the_penalty_has_the_gradient_of_a_weighted_parabola():
    net = toy.model()
    found, strategy = off_start("ewc", net)
    plain = sft_gradient(net)
    for name, parameter in trainable(net).items():
        expected = plain[name] + 2 * 3.0 * strategy.fisher[name] * (parameter.detach() - strategy.start[name])
        assert torch.allclose(found[name], expected, rtol=1e-9, atol=1e-13)


def test_the_estimate_leaves_no_gradient_and_is_made_once():
    net = toy.model()
    strategy = build("ewc", net)
    step = StepContext(model=net, batch=DATA, streams=streams())
    strategy.auxiliary(step)
    first = strategy.fisher
    assert all(p.grad is None for p in net.parameters()) and net.training
    strategy.auxiliary(step)
    assert strategy.fisher is first
    again = build("ewc", net)
    again.load_state(strategy.state())
    assert toy.same(again.fisher, first)


class _Factors(nn.Module):
    """A linear map with a fresh LoRA update: B is zero."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.A, self.B = nn.Parameter(torch.randn(2, 4).double()), nn.Parameter(torch.zeros(3, 2).double())
        self.W = torch.randn(3, 4).double()

    def forward(self, x):
        return x @ (self.W + self.B @ self.A).T


def test_of_a_fresh_adapter_only_the_second_factor_has_fisher_information():
    net = _Factors()
    loss = nn.functional.cross_entropy(net(torch.randn(5, 4).double()), torch.tensor([0, 1, 2, 1, 0]))
    found = ewc_module.fisher([toy.gradient_of(net, loss)])
    assert (found["A"] == 0).all() and (found["B"] > 0).any()


# --- KL ------------------------------------------------------------------------------------------------------------


def test_kl_is_the_sum_over_the_vocabulary():
    a, b = (torch.tensor(x, dtype=torch.float64) for x in ([[0.3, -1.0, 2.0]], [[1.0, 0.5, -0.2]]))
    p, q = b.softmax(-1)[0], a.softmax(-1)[0]
    expected = sum(float(p[i] * (p[i] / q[i]).log()) for i in range(3))
    assert float(kl_divergence(a, b)) == pytest.approx(expected) and expected > 0
    assert float(kl_divergence(a, a)) == 0


def test_kl_does_not_see_a_constant_added_to_a_tokens_logits_but_the_published_one_does():
    torch.manual_seed(1)
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    same = logits + torch.randn(2, 5, 1, dtype=torch.float64)
    assert float(kl_divergence(same, logits).abs().max()) < 1e-14
    assert float(reference_divergence(same, logits)) > 1e-2


def test_the_mean_over_tokens_does_not_depend_on_the_batch():
    net = toy.model()
    start = weights_now(net)
    moved(net)
    values = []
    for which in (range(6), range(3), range(3, 6)):
        data = toy.batch(ROWS, which)
        strategy = DEFENSES.build("kl", ON["kl"])
        strategy.start = start
        step = toy.micro_step(strategy, net, data)
        values.append((step.metrics["kl"], int((data["labels"][:, 1:] != -100).sum())))
    (whole, n), parts = values[0], values[1:]
    assert whole * n == pytest.approx(sum(value * count for value, count in parts)) and whole > 0


# --- constrained SFT -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(8))
def test_betas_of_an_answer(length):
    expected = [0.5, 2.0, 2.0, 2.0, 2.0, 0.1, 0.1][:length]
    assert betas(torch.arange(length), ConstrainedSFTConfig()).tolist()[:7] == pytest.approx(expected)


def test_each_answer_of_a_row_has_early_tokens():
    keep = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 0, 0, 0, 0]]).bool()
    assert answer_positions(keep).tolist() == [0, 1, 0, 1, 2, 0, 1, 0]


def test_token_weights():
    ratio = torch.linspace(-5, 5, 11, dtype=torch.float64)
    beta = torch.full_like(ratio, 0.8)
    weights = token_weights(ratio, beta)
    assert ((weights > 0) & (weights < 2)).all() and (weights.diff() < 0).all()
    assert float(weights[5]) == 1
    assert torch.allclose(token_weights(ratio, 0 * beta), torch.ones_like(ratio))
    assert float(token_weights(ratio, 1e3 * beta)[6:].max()) < 1e-12


def test_the_weighted_loss_has_the_gradient_of_the_closed_form():
    torch.manual_seed(2)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    tokens, start = torch.tensor([0, 3, 1, 4, 2, 2]), torch.randn(6, dtype=torch.float64)
    beta = betas(torch.arange(6), ConstrainedSFTConfig())
    log_p = logits.log_softmax(-1)[torch.arange(6), tokens]
    closed = (-2 / beta * nn.functional.logsigmoid(beta * (log_p - start))).mean()
    surrogate = -(token_weights((log_p - start).detach(), beta) * log_p).mean()
    a, b = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (closed, surrogate))
    assert torch.allclose(a, b, rtol=1e-10, atol=0)


def test_a_step_pulls_each_token_by_its_place_in_the_answer():
    data = toy.batch(toy.rows(5, seed=2, longest=9))
    net = toy.model()
    strategy = build("constrained-sft", net)

    def log_p():
        logits = net(data["input_ids"], data["attention_mask"]).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, data["input_ids"][:, 1:, None])[..., 0]

    start = log_p().detach()
    moved(net)
    found = toy.method_gradient(strategy, net, data, update=1)

    def closed(first):
        """Gradient of the closed form, where the first token of an answer is taken for the one at this place."""
        now, terms = log_p(), []
        for row, labels in enumerate(data["labels"][:, 1:]):
            for place, at in enumerate((labels != -100).nonzero()[:, 0], first):
                beta = 0.3 * (5 if place == 0 else 20 if place < 5 else 1)
                terms.append(-2 / beta * nn.functional.logsigmoid(beta * (now[row, at] - start[row, at])))
        return toy.gradient_of(net, torch.stack(terms).mean())

    assert int((data["labels"][:, 1:] != -100).sum(1).max()) > 6, "early, later and further tokens"
    assert toy.difference(found, closed(0)) < 1e-12 and toy.difference(found, closed(1)) > 1e-3


def test_a_start_that_is_not_a_number_stops_the_training():
    net = toy.model()
    strategy = build("constrained-sft", net)
    next(iter(strategy.start.values()))[0, 0] = torch.nan
    with pytest.raises(DataError):
        toy.micro_step(strategy, net, DATA)


# --- Lisa ----------------------------------------------------------------------------------------------------------


def test_phases_begin_with_alignment_and_have_exact_lengths():
    trace = "".join("A" if in_alignment(update, 3, 4) else "F" for update in range(17))
    assert trace == "AAAFFFFAAAFFFFAAA"
    assert [update for update in range(17) if is_switch(update, 3, 4)] == [0, 3, 7, 10, 14]
    assert not any(in_alignment(update, 0, 4) for update in range(9))
    assert [update for update in range(9) if is_switch(update, 0, 4)] == [0]


def test_an_alignment_step_draws_all_its_micro_batches():
    strategy = build("lisa", toy.model(), align_steps=1, finetune_steps=2)
    drawn = strategy.draw(0, 2, streams())
    assert [batch is safe for batch, safe in zip(drawn, SAFE, strict=True)] == [True, True]
    assert strategy.draw(1, 2, streams()) is None and strategy.draw(2, 2, {}) is None
    assert len(strategy.draw(3, 1, streams())) == 1


def test_the_pull_is_towards_the_latest_switch():
    net = toy.model()
    strategy = build("lisa", net, align_steps=2, finetune_steps=3)
    starts = {}
    for update in range(7):
        plain = sft_gradient(net)
        found = toy.method_gradient(strategy, net, DATA, update=update)
        pull = toy.combined((1, found), (-1, plain))
        if update in (0, 2, 5):
            starts = weights_now(net)
            assert toy.difference(pull, toy.combined((0, pull))) == 0
        expected = {n: 0.5 * (p.detach() - starts[n]) for n, p in trainable(net).items()}
        assert toy.difference(pull, expected) < 1e-12
        moved(net, 0.01, seed=update)


def test_without_a_pull_the_trajectory_is_that_of_the_interleaved_batches():
    nets = [toy.model(), toy.model()]
    strategy, safe = build("lisa", nets[0], rho=0.0, align_steps=2, finetune_steps=3), streams()
    user = [toy.batch(toy.rows(3, seed=20 + update)) for update in range(8)]
    optimizers = [torch.optim.AdamW(trainable(net).values(), lr=1e-2) for net in nets]
    expected = [SAFE[0], SAFE[1], *user[2:5], SAFE[0], SAFE[1], user[7]]
    for update in range(8):
        drawn = strategy.draw(update, 1, safe)
        toy.micro_step(strategy, nets[0], user[update] if drawn is None else drawn[0], update=update)
        toy.loss_of(nets[1], expected[update]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert toy.same(weights_now(nets[0]), weights_now(nets[1])), update
    assert toy.difference(weights_now(nets[0]), weights_now(toy.model())) > 1e-2


def test_without_alignment_phases_the_pull_is_towards_the_start():
    net = toy.model()
    start = weights_now(net)
    strategy = build("lisa", net, rho=2.0, align_steps=0, finetune_steps=1)
    for update in range(3):
        plain = sft_gradient(net)
        found = toy.method_gradient(strategy, net, DATA, update=update)
        expected = {n: plain[n] + 2.0 * (p.detach() - start[n]) for n, p in trainable(net).items()}
        assert toy.difference(found, expected) < 1e-12 and strategy.draw(update, 1, {}) is None
        moved(net, 0.01, seed=update)


def test_alternating_exact_solutions_converge_where_theory_says():
    a, b, rho = 1.0, -2.0, 0.7
    x, ends, gaps = 5.0, [], []
    for phase in range(200):
        target, anchor = (a, b)[phase % 2], {"w": torch.tensor([x], dtype=torch.float64)}
        w = anchor["w"].clone().requires_grad_()
        # One Newton step is the exact minimum of a parabola.
        loss = 0.5 * ((w - target) ** 2).sum() + rho / 2 * squared_distance({"w": w}, anchor)
        (gradient,) = torch.autograd.grad(loss, w)
        x = float(w.detach() - gradient / (1 + rho))
        ends.append(x)
    x_align, x_user = ((1 + rho) * a + rho * b) / (1 + 2 * rho), ((1 + rho) * b + rho * a) / (1 + 2 * rho)
    assert ends[-2:] == pytest.approx([x_align, x_user], abs=1e-12)
    gaps = [abs(end - x_align) for end in ends[:12:2]]
    ratios = [later / earlier for earlier, later in itertools.pairwise(gaps)]
    assert ratios == pytest.approx([(rho / (1 + rho)) ** 2] * 5)


def test_drift_falls_with_rho():
    drifts = []
    for rho in (0.0, 1.0, 10.0, 1e6):
        net = toy.model(layers=1)
        strategy = build("lisa", net, rho=rho, align_steps=0)
        start = weights_now(net)
        for update in range(5):
            gradient = toy.method_gradient(strategy, net, DATA, update=update)
            with torch.no_grad():
                for name, parameter in trainable(net).items():
                    parameter -= 0.5 / (1 + rho) * gradient[name]
        drifts.append(float(squared_distance(trainable(net), start).detach()))
    assert drifts == sorted(drifts, reverse=True) and drifts[-1] < 1e-9 < 1e-3 < drifts[0]


def test_the_warm_up_has_no_pull():
    net = toy.model()
    strategy = build("lisa", net, warmup_steps=3)
    toy.method_gradient(strategy, net, DATA, update=0)
    moved(net)
    plain = sft_gradient(net)
    assert toy.same(toy.method_gradient(strategy, net, DATA, update=2), plain)
    assert toy.difference(toy.method_gradient(strategy, net, DATA, update=3), plain) > 1e-3


def test_lisas_anchor_survives_a_checkpoint():
    net = toy.model()
    strategy = build("lisa", net)
    anchor = weights_now(net)
    moved(net)
    again = build("lisa", net)
    again.load_state(strategy.state())
    assert toy.same(again.anchor, anchor)


# --- VLGuard -------------------------------------------------------------------------------------------------------


def test_the_joint_gradient_is_the_sum():
    net = toy.model()
    found = toy.method_gradient(build("vlguard", net), net, DATA, streams=streams())
    safe = toy.gradient_of(net, toy.loss_of(net, SAFE[0]))
    assert toy.difference(found, toy.combined((1, sft_gradient(net)), (0.4, safe))) < 1e-12


def test_how_many_rows_are_mixed_in():
    build_ = lambda **options: DEFENSES.build("vlguard", options)  # noqa: E731
    assert build_().mixed_in(1000) == (100, False)
    assert build_(share=0.29, mode="replace").mixed_in(100) == (29, True)
    assert build_(mode="joint").mixed_in(1000) == (0, False) == build_(share=0.0).mixed_in(1000)
    with pytest.raises(ConfigError, match="share 0.5: has no effect with mode joint; change that, or leave it out"):
        build_(mode="joint", share=0.5)
    with pytest.raises(ConfigError, match="lam 1.0: has no effect with mode replace"):
        build_(mode="replace", lam=1.0)
