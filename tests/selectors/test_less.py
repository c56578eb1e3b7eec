"""LESS against a naive implementation: one row at a time, gradients by torch.func, no hooks and no projection."""

import weakref

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.func import functional_call, grad

from pharmacist.core.errors import ConfigError
from pharmacist.nn.adapters import AdapterBank, AdapterOptions, TrainingState, learning_rate_factor
from pharmacist.nn.batching import make_batch
from pharmacist.selectors import less
from pharmacist.selectors.gradients import run_jobs
from pharmacist.selectors.less import (
    LEARNER,
    LessConfig,
    Sketch,
    adam_direction,
    checkpoint_weights,
    exact_cosines,
    exact_direction,
    load_checkpoint,
    row_features,
    warm_up_job,
)
from tests.support import peers, village
from tests.support.tiny import TinyDecoder, TokenRows, random_token_rows, row_losses


VOCABULARY, N = 15, 10
POOL, SAFE = (TokenRows(random_token_rows(n, VOCABULARY, seed=n, longest=5).pairs) for n in (N, 9))
EPOCHS = 3


def ranked(*arguments, **options):
    """A ranking by a model of its own, since adapters stay on it."""
    return peers.ranked(*arguments, model=TinyDecoder(len(peers.TOKENIZER)), **options)


def options(**changed) -> LessConfig:
    return LessConfig(**({"r": 2, "learning_rate": 0.02, "batch_size": 4, "epochs": EPOCHS} | changed))


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> tuple[AdapterBank, TrainingState]:
    """A bank whose adapter is at the middle checkpoint of a warm-up."""
    folder = tmp_path_factory.mktemp("warm")
    bank = AdapterBank(TinyDecoder(VOCABULARY), options(), 0)
    run_jobs(bank, [warm_up_job(bank, POOL, np.arange(N), EPOCHS, 0, folder)], "test")
    assert len(list(folder.glob("*epoch*"))) == EPOCHS
    checkpoint = load_checkpoint(folder, 1)
    assert checkpoint.step == 6
    bank.add(LEARNER, checkpoint.weight)
    return bank, checkpoint


def batch_of(bank, rows):
    return make_batch(rows, range(len(rows)), bank.device)


def naive_gradients(bank: AdapterBank, rows: TokenRows) -> list[dict[str, torch.Tensor]]:
    """The gradient of each row by torch.func, one at a time and without padding."""
    with bank.using(LEARNER) as model:
        full = {
            key: name for name, p in model.named_parameters() for key, q in bank.parameters(LEARNER).items() if p is q
        }

        def loss(weights, row):
            batch = make_batch(rows, [row], bank.device)
            out = functional_call(
                model,
                {full[key]: value for key, value in weights.items()},
                kwargs={"input_ids": batch.input_ids, "attention_mask": batch.attention_mask},
            )
            return row_losses(out.logits, batch.input_ids, batch.lengths, batch.prompt_lengths)[0]

        return [grad(loss)(bank.state(LEARNER), row) for row in range(len(rows))]


def flat(gradients: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([gradients[key].flatten() for key in sorted(gradients)]).numpy()


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def naive_adam(gradient: np.ndarray, checkpoint: TrainingState) -> np.ndarray:
    m, v, t = flat(checkpoint.m), flat(checkpoint.v), checkpoint.step + 1
    first, second = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
    return first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)


class Concatenation:
    """In place of a projection: every coordinate by itself, so that cosines are exact."""

    def __init__(self, bank: AdapterBank) -> None:
        sizes = {name: parameter.numel() for name, parameter in sorted(bank.parameters(LEARNER).items())}
        self.total = sum(sizes.values())
        self.start = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))

    def __call__(self, name: str, tensors: torch.Tensor) -> torch.Tensor:
        found = tensors.new_zeros(len(tensors), self.total)
        found[:, self.start[name] : self.start[name] + tensors[0].numel()] = tensors.flatten(1)
        return found


# --- features -------------------------------------------------------------------------------------------------------


def test_the_direction_is_what_torchs_adam_does():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.0)
    for step in range(4):
        gradient = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        state = optimizer.state[weight]
        m, v = (
            state[key].clone() if state else torch.zeros(3, 4, dtype=torch.float64)
            for key in ("exp_avg", "exp_avg_sq")
        )
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        expected = (before - weight.detach()) / 0.01
        found = adam_direction(gradient[None], m, v, step)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        # Negative control: the form of the authors' code, without bias correction and with eps under the root.
        published = (0.9 * m + 0.1 * gradient) / (0.999 * v + 0.001 * gradient**2 + 1e-8).sqrt()
        assert (published - expected).abs().max() > 1e-2


def test_features_equal_the_naive_ones(warm):
    bank, checkpoint = warm
    gradients = np.array([flat(g) for g in naive_gradients(bank, POOL)])
    plain = row_features(bank, Concatenation(bank), batch_of(bank, POOL), None)
    np.testing.assert_allclose(plain, unit(gradients), rtol=0, atol=1e-10)
    adam = row_features(bank, Concatenation(bank), batch_of(bank, POOL), checkpoint)
    expected = np.array([naive_adam(g, checkpoint) for g in gradients])
    np.testing.assert_allclose(adam, unit(expected), rtol=0, atol=1e-10)
    # What the rows have in common is the momentum: their steps are far more alike than their gradients.
    alike = lambda rows: (rows @ rows.T)[np.triu_indices(N, 1)].mean()  # noqa: E731
    assert alike(adam.numpy()) > alike(plain.numpy()) + 0.2


def test_exact_cosines_equal_the_naive_ones(warm):
    bank, checkpoint = warm
    target = unit(np.array([flat(g) for g in naive_gradients(bank, SAFE)])).mean(0)
    scale = 1 / (np.sqrt(flat(checkpoint.v) / (1 - 0.999**checkpoint.step)) + 1e-8)
    direction = exact_direction(bank, SAFE, checkpoint)
    np.testing.assert_allclose(flat(direction), target * scale, rtol=1e-8)
    rows = np.array([flat(g) for g in naive_gradients(bank, POOL)])
    found = exact_cosines(bank, direction, batch_of(bank, POOL))
    np.testing.assert_allclose(found, unit(rows) @ (target * scale), rtol=1e-9)


def test_the_mean_of_cosines_is_not_the_cosine_with_the_mean(warm):
    """Why references are normalised one by one: else the longest gradient speaks for all."""
    bank, checkpoint = warm
    rows = np.array([flat(g) for g in naive_gradients(bank, SAFE)])
    direction = flat(exact_direction(bank, SAFE, checkpoint))
    scale = 1 / (np.sqrt(flat(checkpoint.v) / (1 - 0.999**checkpoint.step)) + 1e-8)
    other = rows.mean(0) * scale
    assert direction @ other / np.linalg.norm(direction) / np.linalg.norm(other) < 0.999


def test_scores_weigh_checkpoints_by_their_learning_rate():
    weights = checkpoint_weights(N, options())
    steps = [learning_rate_factor(step, 9) for step in range(9)]
    np.testing.assert_allclose(weights, np.array(steps).reshape(3, 3).mean(1) / np.mean(steps) / 3, rtol=1e-12)
    assert weights.sum() == pytest.approx(1) and weights[0] > weights[2]


# --- the projection -------------------------------------------------------------------------------------------------


def sketch(shape, dimensions, seed=0, name="w") -> Sketch:
    return Sketch({name: torch.Size(shape)}, dimensions, seed, torch.device("cpu"))


@pytest.mark.parametrize("mean", [0.0, 1.0])  # gradients have much in common: without signs it would add up
def test_projections_keep_inner_products_on_average(mean):
    generator = torch.Generator().manual_seed(0)
    x, y = mean + torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
    y = y + 0.3 * x
    dimensions, draws = 32, 400
    found = np.array(
        [
            float(pair[0] @ pair[1])
            for seed in range(draws)
            if (pair := sketch((40, 5), dimensions, seed)("w", torch.stack([x, y]))) is not None
        ]
    )
    exact = float((x * y).sum())
    assert abs(found.mean() - exact) < 4 * found.std() / np.sqrt(draws)
    spread = float(x.square().sum() * y.square().sum() + exact**2) / dimensions
    assert found.std() < 1.2 * np.sqrt(spread), "no noisier than a dense projection"


def test_projections_are_linear_seeded_and_see_every_coordinate():
    draw = sketch((6, 7), 16)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(draw("w", a + 2 * b), draw("w", a) + 2 * draw("w", b))
    torch.testing.assert_close(draw("w", a)[1:2], draw("w", a[1:2]), rtol=0, atol=0)
    torch.testing.assert_close(sketch((6, 7), 16)("w", a), draw("w", a), rtol=0, atol=0)
    assert not torch.equal(sketch((6, 7), 16, seed=1)("w", a), draw("w", a))
    assert not torch.equal(sketch((6, 7), 16, name="v")("v", a), draw("w", a)), "weights are projected independently"
    each = draw("w", torch.eye(42, dtype=torch.float64).view(42, 6, 7))
    assert (each.abs().sum(1) == 1).all()
    large = sketch((6, 7), 64)
    torch.testing.assert_close(large("w", a) @ large("w", b).T, a.flatten(1) @ b.flatten(1).T)


# --- the selector ---------------------------------------------------------------------------------------------------


def test_the_whole_ranking_equals_a_naive_one(tmp_path):
    """From the selector's own checkpoints, the published score without projection."""
    settings = {"epochs": 2, "batch_size": 4, "r": 2, "learning_rate": 0.01}
    naive_score = np.zeros(30)
    found = ranked(tmp_path / "a", {"name": "less", "features": "projected", "dimensions": 60000, **settings})
    exact = ranked(tmp_path / "b", {"name": "less", "features": "exact", **settings})
    config = LessConfig(**settings)
    pool, safe = (TokenRows(peers.token_rows(rows)) for rows in (village.pool(), village.references()["safe"]))
    bank = AdapterBank(TinyDecoder(len(peers.TOKENIZER)), AdapterOptions(**{k: settings[k] for k in ("r",)}), 0)
    naive_exact = np.zeros(30)
    for epoch, weight in enumerate(checkpoint_weights(30, config)):
        checkpoint = load_checkpoint(tmp_path / "a" / "work" / "less", epoch)
        bank.add(LEARNER, checkpoint.weight)
        rows, target = (np.array([flat(g) for g in naive_gradients(bank, part)]) for part in (pool, safe))
        target = unit(target).mean(0)
        naive_score += weight * unit(np.array([naive_adam(row, checkpoint) for row in rows])) @ target
        direction = target / (np.sqrt(flat(checkpoint.v) / (1 - 0.999**checkpoint.step)) + 1e-8)
        naive_exact += weight * unit(rows) @ direction / np.linalg.norm(direction)
    np.testing.assert_allclose(exact.score, naive_exact, rtol=0, atol=1e-8)
    assert np.abs(found.score - naive_score).max() < 0.02 and np.corrcoef(found.score, naive_score)[0, 1] > 0.99
    # Fewer dimensions, more noise.
    few = ranked(tmp_path / "c", {"name": "less", "dimensions": 64, **settings})
    assert np.abs(few.score - naive_score).max() > 2 * np.abs(found.score - naive_score).max()


def test_of_features_nothing_but_cosines_is_kept(tmp_path):
    """Neither memory nor disk grows by the features, which are a thousand times as much as the cosines."""
    settings = {"epochs": 1, "batch_size": 4, "r": 2, "dimensions": 4096}
    found = ranked(tmp_path, {"name": "less", "features": "projected", **settings})
    folder = tmp_path / "work" / "read" / "less-cosines0"
    stored = load_file(folder / "000000.safetensors")
    assert set(stored) == {"cosine", "rows"} and stored["cosine"].ndim == 1
    np.testing.assert_array_equal(found.signals["cosine_0"][stored["rows"]], stored["cosine"])
    assert set(found.signals["cosine_0"]) == set(stored["cosine"]), "of the other rows each equals one that was read"
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert written < 30 * 64 < 30 * 2 * 4096


def test_references_are_added_up_and_never_held_together(tmp_path, monkeypatch):
    alive = []
    original = less.row_features

    def spied(*args):
        found = original(*args)
        alive.append(weakref.ref(found))
        assert sum(ref() is not None for ref in alive) <= 2, "one batch's features, and the ones before it at most"
        return found

    monkeypatch.setattr(less, "row_features", spied)
    ranked(tmp_path, {"name": "less", "epochs": 1, "batch_size": 2, "r": 2, "dimensions": 64})
    assert len(alive) > 4


def test_a_killed_warm_up_leaves_the_same_checkpoints(tmp_path, monkeypatch):
    def run(folder, seconds):
        bank = AdapterBank(TinyDecoder(VOCABULARY), options(), 0, seconds)
        run_jobs(bank, [warm_up_job(bank, POOL, np.arange(N), EPOCHS, 0, folder)], "test")

    run(tmp_path / "straight", 1e9)
    step = AdapterBank.step

    def killed(self, number, *rest):
        if number == 7:
            raise KeyboardInterrupt
        step(self, number, *rest)

    monkeypatch.setattr(AdapterBank, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 0.0)
    monkeypatch.setattr(AdapterBank, "step", step)
    run(tmp_path / "killed", 0.0)
    for epoch in range(EPOCHS):
        name = f"after-epoch{epoch}.safetensors"
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.parametrize("changed", [{"epochs": 0}, {"share": 0.0}, {"share": 1.5}, {"dimensions": 0}])
def test_bad_options_are_told(changed):
    with pytest.raises(ConfigError, match="must|selector"):
        LessConfig(**changed)
