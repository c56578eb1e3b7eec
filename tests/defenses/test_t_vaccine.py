import itertools
import math

import pytest
import torch

from pharmacist.core.errors import ConfigError, DataError, NoMatchError
from pharmacist.defenses.alignment.t_vaccine import TVaccine, TVaccineConfig, sample_layers
from pharmacist.defenses.alignment.vaccine import Vaccine, VaccineConfig, joint_norm
from pharmacist.nn.hooks import activation_gradients, add_offsets
from pharmacist.nn.locate import attention_modules
from tests.support import toy


RHO, LAYERS = 0.7, 4
DATA, HARMFUL = toy.batch(toy.rows(4, seed=1)), toy.batch(toy.rows(3, seed=2))
OTHER = toy.batch(toy.rows(3, seed=7))


class Stream:
    """Counts what is drawn."""

    def __init__(self, *batches):
        self.batches, self.drawn = itertools.cycle(batches), 0

    def __iter__(self):
        return self

    def __next__(self):
        self.drawn += 1
        return next(self.batches)


def t_vaccine(net, seed=0, **options):
    strategy = TVaccine(TVaccineConfig(**{"rho": RHO, "layers": 2, "score_rows": 3, **options}))
    strategy.setup(net, seed)
    return strategy


def gradient(strategy, net, **options):
    return toy.method_gradient(strategy, net, DATA, streams={"harmful": Stream(HARMFUL)}, **options)


@pytest.mark.parametrize("freeze", ["layer", "attention"])
def test_with_all_layers_it_is_vaccine_bit_for_bit(freeze):
    net, vaccine = toy.model(LAYERS), Vaccine(VaccineConfig(rho=RHO))
    vaccine.setup(net, 0)
    plain = toy.method_gradient(vaccine, net, DATA)
    assert toy.same(gradient(t_vaccine(net, layers=LAYERS, freeze=freeze), net), plain)
    assert toy.difference(gradient(t_vaccine(net), net), plain) > 1e-3


def test_probabilities_are_the_mean_row_norms_of_the_harmful_gradients():
    net = toy.model(LAYERS)
    strategy = t_vaccine(net, score_rows=6)
    step = toy.micro_step(strategy, net, DATA, streams={"harmful": Stream(HARMFUL, OTHER)})
    q = torch.zeros(LAYERS, dtype=torch.float64)
    for rows in (toy.rows(3, seed=2), toy.rows(3, seed=7)):
        for number in range(3):
            one = toy.batch(rows, [number])
            grads = activation_gradients(attention_modules(net), lambda one=one: toy.loss_of(net, one))[1]
            q += torch.stack([g.norm() for g in grads.values()])
    assert torch.allclose(strategy.p, q / q.sum(), rtol=1e-12)
    assert float(strategy.p.sum()) == pytest.approx(1)
    assert float(strategy.p.max() - strategy.p.min()) > 0.01
    assert step.metrics["lowest_sampled_layer"] == min(strategy.active)


def test_layers_are_drawn_in_the_first_step_that_has_a_target():
    net, strategies = toy.model(LAYERS), []
    for update in (0, 1):  # the Trainer leaves an update without a target out
        strategies.append(t_vaccine(net))
        gradient(strategies[-1], net, update=update)
        gradient(strategies[-1], net, update=update + 1)
    assert torch.equal(strategies[0].p, strategies[1].p)
    assert all(len(strategy.active) == 2 for strategy in strategies)


def test_only_sampled_layers_are_perturbed_with_the_joint_norm_over_them(monkeypatch):
    net, added = toy.model(LAYERS), []

    def offsets(modules, eps):
        added.append({name: value.clone() for name, value in eps.items()})
        return add_offsets(modules, eps)

    monkeypatch.setattr("pharmacist.defenses.alignment.vaccine.add_offsets", offsets)
    strategy = t_vaccine(net)
    toy.micro_step(strategy, net, DATA, streams={"harmful": Stream(HARMFUL)})
    names = list(attention_modules(net))
    assert list(added[0]) == [names[n] for n in strategy.active] and len(strategy.active) == 2
    chosen = {name: attention_modules(net)[name] for name in added[0]}
    n = float(joint_norm(activation_gradients(chosen, lambda: toy.loss_of(net, DATA))[1]))
    assert float(joint_norm(added[0])) == pytest.approx(RHO * n / (n + 1e-7), rel=1e-12)
    assert toy.hooks(net) == 0


def trained(strategy, net, steps, streams):
    optimizer = torch.optim.AdamW(toy.trainable(net).values(), lr=1e-2, weight_decay=0.1)
    for update in range(steps):
        toy.micro_step(strategy, net, DATA, streams=streams, update=update)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("freeze", ["layer", "attention"])
def test_weights_and_moments_of_frozen_modules_stay_bit_for_bit(freeze):
    net = toy.model(LAYERS)
    strategy, before = t_vaccine(net, freeze=freeze), toy.fingerprint(net)
    optimizer = trained(strategy, net, 3, {"harmful": Stream(HARMFUL)})
    after = toy.fingerprint(net)
    for number, layer in enumerate(net.layers):
        for name, parameter in layer.named_parameters():
            frozen = number not in strategy.active and (freeze == "layer" or name.startswith("attend"))
            key = f"layers.{number}.{name}"
            assert torch.equal(before[key], after[key]) == frozen, key
            assert (parameter not in optimizer.state) == frozen
            assert parameter.requires_grad


def test_the_gradient_of_sampled_layers_does_not_depend_on_the_frozen_ones_being_frozen():
    """Freezing saves work; it must not change what the others get."""
    net = toy.model(LAYERS)
    by_layer, by_attention = t_vaccine(net), t_vaccine(net, freeze="attention")
    a, b = gradient(by_layer, net), gradient(by_attention, net)
    assert by_layer.active == by_attention.active
    for name in a:
        sampled = int(name.split(".")[1]) in by_layer.active
        if sampled:
            assert torch.allclose(a[name], b[name], atol=1e-14) and a[name].any()
        else:
            assert not a[name].any() and b[name].any() != ("attend" in name)


def test_the_schedule_of_measurements_and_draws():
    net = toy.model(LAYERS)
    strategy = t_vaccine(net, sample_every=2, score_every=6, seed=1)
    stream, measured, drawn = Stream(HARMFUL), [], []
    for update in range(13):
        count, active = stream.drawn, strategy.active
        strategy.active = list(active)
        before = strategy.active
        for micro in (0, 1):
            toy.micro_step(strategy, net, DATA, streams={"harmful": stream}, update=update, micro=micro, scale=0.5)
        if stream.drawn > count:
            assert stream.drawn == count + 1
            measured.append(update)
        if strategy.active is not before:
            drawn.append(update)
    assert measured == [0, 6, 12] and drawn == [0, 2, 4, 6, 8, 10, 12]
    assert TVaccineConfig().score_every == 200 and TVaccineConfig().sample_every == 20


def test_layers_are_drawn_by_successive_weighted_sampling():
    p, count, n = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.zeros(4), 6000
    for seed in range(n):
        drawn = sample_layers(p, 2, seed)
        assert len(set(drawn)) == 2 and drawn == sorted(drawn)
        count[drawn] += 1
    expected = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    assert [round(float(value), 3) for value in expected] == [0.829, 0.669, 0.372, 0.130]
    for found, wanted in zip(count / n, expected, strict=True):
        assert abs(float(found - wanted)) < 4 * math.sqrt(0.25 / n)
    assert sample_layers(p, 2, 5) == sample_layers(p, 2, 5)


def test_gradient_checkpointing_changes_nothing():
    plain, saving = toy.model(LAYERS), toy.model(LAYERS, checkpointing=True)
    found = [gradient(t_vaccine(net), net) for net in (plain, saving)]
    assert toy.difference(*found) < 1e-14


def test_below_the_lowest_sampled_layer_the_first_pass_builds_no_graph():
    net = toy.model(LAYERS)
    strategy = t_vaccine(net)
    gradient(strategy, net)
    strategy.active = [2, 3]
    graphs = []
    for layer in net.layers:
        layer.register_forward_hook(lambda module, args, out: graphs.append(out.grad_fn is not None))
    toy.micro_step(strategy, net, DATA, streams={"harmful": Stream(HARMFUL)}, update=1)
    first, main = graphs[:LAYERS], graphs[LAYERS:]
    assert first == main == [False, False, True, True]


def test_an_exception_leaves_everything_trainable():
    net, calls = toy.model(LAYERS), []
    strategy = t_vaccine(net)
    gradient(strategy, net)

    def fail(module, args):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    net.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        toy.micro_step(strategy, net, DATA, streams={"harmful": Stream(HARMFUL)}, update=1)
    assert all(p.requires_grad for layer in net.layers for p in layer.parameters())
    assert toy.hooks(net) == 1


def test_it_resumes_between_measurements_and_draws_with_the_same_layers():
    def run(split):
        net, stream = toy.model(LAYERS), Stream(HARMFUL, OTHER)
        strategy, active = t_vaccine(net, sample_every=2, score_every=5), []
        optimizer = torch.optim.SGD(toy.trainable(net).values(), lr=1e-2)
        for update in range(9):
            if update == split:
                before, strategy = strategy, t_vaccine(net, sample_every=2, score_every=5)
                strategy.load_state(before.state())
                assert torch.equal(strategy.p, before.p) and len(set(strategy.p.tolist())) == LAYERS
            toy.micro_step(strategy, net, DATA, streams={"harmful": stream}, update=update)
            optimizer.step()
            optimizer.zero_grad()
            active.append(strategy.active)
        return active, toy.fingerprint(net)

    straight = run(None)
    assert len({tuple(layers) for layers in straight[0]}) > 1
    for split in (1, 3, 4, 7):
        resumed = run(split)
        assert resumed[0] == straight[0] and toy.same(resumed[1], straight[1])


@pytest.mark.parametrize(("layers", "given", "count"), [(4, None, 4), (10, None, 8), (10, 9, 9)])
def test_the_default_fits_every_model(layers, given, count, capsys):
    strategy = TVaccine(TVaccineConfig(layers=given, score_rows=3))
    assert strategy.setup(net := toy.model(layers), 0)["sampled_at_a_time"] == count
    assert ("the model has 4 layers, and all of them" in capsys.readouterr().err) == (layers == 4)
    toy.method_gradient(strategy, net, DATA, streams={"harmful": Stream(HARMFUL)})
    assert len(strategy.active) == count


def test_impossible_settings_are_refused():
    net = toy.model(LAYERS)
    with pytest.raises(ConfigError, match="layers 5: the model has 4 layers"):
        t_vaccine(net, layers=5)
    for name in ("layers", "sample_every", "score_every", "score_rows"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1"):
            TVaccineConfig(**{name: 0})
    with pytest.raises(ConfigError, match="rho"):
        TVaccineConfig(rho=-1)
    with pytest.raises(ConfigError, match="freeze"):
        TVaccineConfig(freeze="nothing")
    with pytest.raises(DataError, match="only 1 layers have a harmful gradient"):
        sample_layers(torch.tensor([0.0, 1.0]), 2, 0)
    net.layers[2].requires_grad_(False)
    with pytest.raises(NoMatchError, match="layers.2 has no trained weights"):
        t_vaccine(net)
