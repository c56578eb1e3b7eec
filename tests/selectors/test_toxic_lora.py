"""The hypergradient of a model under attack: against differences of the upper loss itself, and its limiting cases."""

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from sklearn.metrics import roc_auc_score

from pharmacist.core.errors import ConfigError
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import make_batch
from pharmacist.nn.grads import norm
from pharmacist.selectors.gradients import moved
from pharmacist.selectors.toxic_lora import TOXIC, ToxicLoraConfig
from pharmacist.selectors.unrolled import LEARNER, Hypergradient
from tests.support import peers, village
from tests.support.tiny import TinyDecoder, TokenRows, random_token_rows


VOCABULARY, N, ETA = 15, 8, 0.3
POOL, SAFE = (TokenRows(random_token_rows(n, VOCABULARY, seed=n, longest=5).pairs) for n in (N, 9))
ATTACHED = {"upper": ((), (TOXIC,)), "both": ((TOXIC,), (TOXIC,))}
CHOICE = {"name": "toxic-lora", "toxic_steps": 30, "batch_size": 8, "learning_rate": 0.01}
VILLAGE = village.rows("safe", 20, seed=9) + village.rows("harmful", 20, seed=9)
REFUSES = np.arange(40) < 20


def ranked(*arguments, **options):
    """A ranking by a model of its own, since adapters stay on it."""
    return peers.ranked(*arguments, model=TinyDecoder(len(peers.TOKENIZER)), **options)


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    """Theta and a toxic LoRA, both some way from where adapters start."""
    bank = AdapterBank(TinyDecoder(VOCABULARY), AdapterOptions(r=2, batch_size=4), 0)
    generator = torch.Generator().manual_seed(1)
    noise = lambda value, size: size * torch.randn(value.shape, generator=generator, dtype=value.dtype)  # noqa: E731
    for name, size in ((LEARNER, 0.2), (TOXIC, 0.5)):
        bank.add(name, {key: value + noise(value, size) for key, value in bank.state("start").items()})
    return bank


def upper_loss(bank, weights: np.ndarray, below, above) -> float:
    """F(s) as it is defined, by automatic differentiation of the weighted pool loss."""
    parameters = bank.parameters(LEARNER)
    with bank.differentiable(LEARNER):
        batch = make_batch(POOL, range(N), bank.device)
        pool = (torch.from_numpy(weights) * bank.row_losses((LEARNER, *below), batch)).mean()
        gradient = dict(zip(parameters, torch.autograd.grad(pool, list(parameters.values())), strict=True))
    bank.add("probe", moved(bank.state(LEARNER), gradient, -ETA))
    with torch.no_grad():
        safe = make_batch(SAFE, range(len(SAFE)), bank.device)
        return float(bank.row_losses(("probe", *above), safe).mean())


def scores(bank, below, above) -> np.ndarray:
    problem = Hypergradient(bank, POOL, np.arange(N), SAFE, ETA, below, above)
    _, direction = problem.safety()
    with torch.no_grad():
        batch = make_batch(POOL, range(N), bank.device)
        return problem.slopes(problem.move_apart(direction), batch)["slope"] * float(norm(direction))


@pytest.mark.parametrize("attached", ATTACHED)
def test_scores_are_the_derivative_of_the_upper_loss_by_the_rows_weights(bank, attached):
    below, above = ATTACHED[attached]
    eps = 1e-5
    numeric = np.array(
        [
            (upper_loss(bank, 1 + eps * e, below, above) - upper_loss(bank, 1 - eps * e, below, above)) / (2 * eps)
            for e in np.eye(N)
        ]
    )
    assert np.abs(numeric).max() > 1e-4
    np.testing.assert_allclose(-ETA / N * scores(bank, below, above), numeric, rtol=0, atol=1e-6)
    # Negative controls: without the attack, and attached elsewhere, it is another derivative.
    for other in (((), ()), ATTACHED["both" if attached == "upper" else "upper"]):
        assert np.abs(-ETA / N * scores(bank, *other) - numeric).max() > 1e-4


def test_several_adapters_add_up(bank):
    batch = make_batch(POOL, range(N), bank.device)
    with torch.no_grad():
        both = bank.row_losses((LEARNER, TOXIC), batch)
        base = bank.model.get_base_model()
        layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
        before = [layer.base_layer.weight.clone() for layer in layers]
        for layer in layers:
            layer.base_layer.weight += layer.get_delta_weight(LEARNER) + layer.get_delta_weight(TOXIC)
        merged = bank.row_losses(None, batch)
        for layer, weight in zip(layers, before, strict=True):
            layer.base_layer.weight.copy_(weight)
        assert torch.allclose(both, merged, atol=1e-12)
        assert not torch.allclose(both, bank.row_losses(LEARNER, batch), atol=1e-3)


@pytest.mark.parametrize("attached", ATTACHED)
def test_without_an_attack_it_is_the_unrolled_selector(tmp_path, attached):
    common = {"steps": 5, "lookahead": 0.05, "batch_size": 8, "learning_rate": 0.01}
    plain = ranked(tmp_path / "a", {"name": "unrolled"} | common, VILLAGE)
    none = ranked(tmp_path / "b", CHOICE | common | {"toxic_steps": 0, "attached": attached}, VILLAGE)
    assert np.array_equal(none.score, plain.score) and np.array_equal(none.weight, plain.weight)
    attacked = ranked(tmp_path / "c", CHOICE | common | {"attached": attached}, VILLAGE)
    assert np.abs(attacked.score - plain.score).max() > 1e-3


@pytest.mark.parametrize("attached", ATTACHED)
@pytest.mark.parametrize("steps", [0, 20])
def test_rows_that_refuse_come_first_unless_the_attack_teaches_refusing(tmp_path, steps, attached):
    choice = CHOICE | {"steps": steps, "attached": attached}
    found = ranked(tmp_path / "a", choice, VILLAGE)
    assert roc_auc_score(REFUSES, found.score) > 0.8
    # What the toxic LoRA does already rows need not teach: trained on the safe references it leaves nothing to gain.
    refs = village.references()
    same = ranked(tmp_path / "b", choice, VILLAGE, refs | {"harmful": refs["safe"]})
    gain = lambda own: own.score[REFUSES].mean() - own.score[~REFUSES].mean()  # noqa: E731
    assert gain(found) > 0.3 and abs(gain(same)) < 0.1 * gain(found)
    assert same.report["safety_loss_under_attack"] < same.report["safety_loss"] - 1
    if steps:  # of a model that has learned to refuse, the attack undoes something
        assert found.report["safety_loss_under_attack"] > found.report["safety_loss"] + 0.3


def test_weights_belong_to_the_ranking(tmp_path):
    found = ranked(tmp_path, CHOICE, VILLAGE)
    assert found.weight.mean() == pytest.approx(1.0) and (found.weight >= 0).all()
    positive = found.score > 0
    np.testing.assert_allclose(found.weight[positive] / found.score[positive], found.weight.max() / found.score.max())
    assert not found.weight[~positive].any()


@pytest.mark.parametrize(
    "options", [{"steps": -1}, {"share": 0.0}, {"lookahead": -0.1}, {"toxic_steps": -1}, {"attached": "lower"}]
)
def test_bad_options_are_told(options):
    with pytest.raises(ConfigError, match="must|selector"):
        ToxicLoraConfig(**options)
