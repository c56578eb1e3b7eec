"""Selectors by embeddings: property 24 (brute force on few points), closed forms, pools larger than a block."""

import tracemalloc
from contextlib import nullcontext
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.nn.passes import run_pass
from pharmacist.selectors import SELECTORS, embeddings
from pharmacist.selectors.cover import COVERS, cover_scores, facility_location_gains, k_center_radii
from pharmacist.selectors.embeddings import check_room, likeness, unit
from tests.support import village
from tests.support.peers import DECODER, ranked, token_rows


RNG = np.random.default_rng(0)
POOL = village.pool(20)
SEEDS = pytest.mark.parametrize("seed", range(8))
GREEDY = pytest.mark.parametrize("name", ["k-center", "facility-location"])


def points(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def radius(x: np.ndarray, chosen) -> float:
    return float(np.linalg.norm(x[:, None] - x[None, list(chosen)], axis=2).min(1).max())


def value(x: np.ndarray, chosen, weights: np.ndarray) -> float:
    return float(weights @ ((1 + x @ x[list(chosen)].T) / 2).max(1))


@SEEDS
def test_k_center_is_within_twice_the_best_radius(seed):
    x = points(9, 3, seed)
    order = np.argsort(-k_center_radii(x))
    reached = [radius(x, order[:k]) for k in range(1, 9)]
    assert (np.diff(reached) <= 1e-12).all()
    for k in range(1, 9):
        best = min(radius(x, chosen) for chosen in combinations(range(9), k))
        assert best <= reached[k - 1] <= 2 * best + 1e-9
    # A point's score is the radius that was left when its turn came.
    np.testing.assert_allclose(k_center_radii(x)[order[1:]], reached, rtol=1e-6)


def test_another_order_breaks_the_bound_of_k_center():
    x = np.concatenate([points(8, 2, 0) * 0.01, [[100.0, 0], [0, 100.0]]])
    best = min(radius(x, chosen) for chosen in combinations(range(10), 3))
    assert radius(x, range(3)) > 2 * best > 0


def test_k_center_takes_no_copy_before_a_distinct_point():
    x = np.concatenate([points(6, 2, 1), points(6, 2, 1)])
    radii = k_center_radii(x)
    order = np.argsort(-radii, kind="stable")
    assert set(order[:6] % 6) == set(range(6)) and radii[order[6:]].max() < 1e-7 < radii[order[:6]].min()


@SEEDS
def test_lazy_facility_location_is_the_naive_greedy_one_and_near_the_best(seed):
    x, weights = unit(points(9, 3, seed)), np.random.default_rng(seed).integers(1, 4, 9).astype(float)
    gains = facility_location_gains(x, weights)
    order, chosen = np.argsort(-gains, kind="stable"), []
    for k in range(9):  # naive: every point is asked at every step
        before = value(x, chosen, weights) if chosen else 0.0
        fresh = {j: value(x, [*chosen, j], weights) - before for j in range(9) if j not in chosen}
        assert fresh[order[k]] == pytest.approx(max(fresh.values()), abs=1e-12)
        assert gains[order[k]] == pytest.approx(fresh[order[k]], abs=1e-12)
        chosen.append(order[k])
        best = max(value(x, some, weights) for some in combinations(range(9), k + 1))
        assert value(x, chosen, weights) >= (1 - 1 / np.e) * best
    assert (np.diff(gains[order]) <= 0).all() and (gains >= 0).all(), "submodular and monotone"


@pytest.mark.parametrize("n", [1, 2, 300])
def test_facility_location_ends_whatever_ties_and_rounding_do(n):
    # Equal points in numbers that no binary fraction is: every gain is a tie that rounding may break either way.
    x = unit(np.repeat(points(-(-n // 10), 7, 3), 10, axis=0)[:n] / 3)
    gains = facility_location_gains(x, np.full(n, 0.1))
    assert np.isfinite(gains).all() and (gains >= 0).all()
    assert (gains > 1e-9).sum() <= -(-n // 10), "a copy adds nothing"


def test_weights_stand_for_copies():
    x = unit(points(5, 3, 0))
    copies = np.array([3, 1, 1, 1, 1])
    weighted = facility_location_gains(x, copies.astype(float))
    plain = facility_location_gains(np.repeat(x, copies, axis=0), np.ones(7))
    np.testing.assert_allclose(np.sort(plain)[::-1][:5], np.sort(weighted)[::-1], atol=1e-12)
    assert np.abs(weighted - facility_location_gains(x, np.ones(5))).max() > 0.1


@GREEDY
def test_blocks_depend_on_content_alone(name):
    x, keys = unit(points(50, 4, 0)), np.arange(50, dtype=np.uint64)
    order = RNG.permutation(50)
    found = cover_scores(x, keys, COVERS[name], block=8)
    assert np.array_equal(cover_scores(x[order], keys[order], COVERS[name], block=8), found[order])
    assert not np.array_equal(found, cover_scores(x, keys, COVERS[name], block=9))


def state(prompt: list[int], completion: list[int]) -> np.ndarray:
    hidden = DECODER(torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states[-1][0]
    return hidden.mean(0).numpy()


def states(rows: list[dict[str, str]]) -> np.ndarray:
    return np.array([state(*pair) for pair in token_rows(rows)])


def test_embedding_is_the_cosine_to_the_centroid_of_the_safe_references(tmp_path):
    refs = village.references()
    known, own = unit(states(refs["safe"])), unit(states(POOL))
    found = ranked(tmp_path / "a", {"name": "embedding"}, POOL, refs)
    centroid = known.mean(0) / np.linalg.norm(known.mean(0))
    np.testing.assert_allclose(found.score, own @ centroid, rtol=1e-12)
    nearest = ranked(tmp_path / "b", {"name": "embedding", "nearest": 3}, POOL, refs)
    expected = [np.mean(sorted(float(row @ ref) for ref in known)[-3:]) for row in own]
    np.testing.assert_allclose(nearest.score, expected, rtol=1e-12)
    assert not np.array_equal(np.argsort(nearest.score), np.argsort(found.score))


def test_likeness_of_one_reference_is_the_same_either_way():
    x, reference = unit(points(6, 4, 0)), unit(points(1, 4, 1))
    np.testing.assert_allclose(likeness(x, reference, 0), likeness(x, reference, 1), atol=1e-15)


def test_a_reference_set_that_is_too_small_for_its_neighbours_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="selector.nearest 13: there are 12 safe references"):
        ranked(tmp_path, {"name": "embedding", "nearest": 13}, POOL)


@GREEDY
def test_copies_come_last_and_points_are_the_centred_mean_states(tmp_path, name):
    score = ranked(tmp_path, {"name": name}, POOL).score  # its last three rows repeat its first
    assert score[-3:].tolist() == [0, 0, 0] and score[:-3].min() > 0
    own = states(POOL[:-3])
    copies = np.array([POOL.count(row) for row in POOL[:-3]], dtype=float)
    # Sorted: two points that only cover each other gain the same, and rounding decides which comes first.
    found, expected = np.sort(score[:-3]), np.sort(COVERS[name](unit(own - own.mean(0)), copies))
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert not np.allclose(found, np.sort(COVERS[name](unit(own), copies)), atol=1e-3), "the centre matters"


@GREEDY
@SEEDS
def test_points_in_several_blocks_are_covered_nearly_as_in_one(name, seed):
    x = unit(points(240, 3, seed))
    far = lambda chosen: radius(x, chosen)  # noqa: E731
    near = lambda chosen: -value(x, chosen, np.ones(240)) / 240  # noqa: E731
    loss, found = far if name == "k-center" else near, {}
    for block in (240, 60):
        score = cover_scores(x, np.arange(240, dtype=np.uint64), COVERS[name], block)
        found[block] = loss(np.argsort(-score)[:40])
    chance = [loss(RNG.permutation(240)[:40]) for _ in range(20)]
    assert found[240] <= found[60] + 1e-3 and found[60] < np.mean(chance)


def test_wide_states_are_projected_and_keep_their_geometry(tmp_path, monkeypatch):
    exact = ranked(tmp_path / "a", {"name": "k-center"}, POOL).score
    monkeypatch.setattr(embeddings, "DIMENSION", 12)  # the decoder's width is 16
    projected = ranked(tmp_path / "b", {"name": "k-center"}, POOL).score
    assert not np.array_equal(exact, projected) and np.isfinite(projected).all()
    assert np.array_equal(projected, ranked(tmp_path / "c", {"name": "k-center"}, POOL).score)
    assert abs(projected.max() - exact.max()) < 0.5 * exact.max()


def test_what_will_not_fit_is_said_beforehand(tmp_path, monkeypatch):
    check_room(10_000, tmp_path / "not" / "there" / "yet")  # 22 MiB
    with pytest.raises(ConfigError, match=r"comparing 10{12} rows .* needs \d+\.\d GiB of memory .* a smaller pool"):
        check_room(10**12, tmp_path)
    monkeypatch.setattr(type(DECODER), "forward", lambda *_, **__: pytest.fail("the model ran"))
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="comparing 20 rows .* GiB of memory"):
        patch.setattr(embeddings, "available_memory", lambda: 100)
        ranked(tmp_path / "a", {"name": "k-center"}, POOL)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=f"comparing 20 rows .* disk .* {tmp_path}"):
        patch.setattr(embeddings.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
        ranked(tmp_path / "b", {"name": "k-center"}, POOL)


@pytest.mark.parametrize("source", ["model", "encoder"])
def test_points_are_held_once(tmp_path, monkeypatch, source):
    """What is asked for beforehand is what is taken: no second array of all points while they are put in place."""
    n, width, rng = 40_000, 64, np.random.default_rng(0)
    sums = rng.normal(size=(n // 2, width))
    if source == "model":
        sequences = SimpleNamespace(
            lengths=np.full(n, 3, dtype=np.int32),
            prompt_lengths=np.ones(n, dtype=np.int32),
            content_keys=np.arange(n, dtype=np.uint64) // 2,
            token_ids=lambda rows: [np.array([1, 2, row // 2], dtype=np.int32) for row in rows],
        )
        measure = lambda batch: {"kept": sums[batch.input_ids[:, 2].numpy()]}  # noqa: E731
        work = lambda: run_pass(  # noqa: E731
            torch.nn.Linear(1, 1), sequences, measure, work=tmp_path, description="test", tokens=3000
        )["kept"]
    else:
        rows = Dataset.from_dict({"prompt": [f"row {i // 2}" for i in range(n)], "completion": ["yes"] * n})
        encode = lambda texts, **_: sums[[int(text.split()[1]) for text in texts]]  # noqa: E731
        monkeypatch.setattr(embeddings, "load_sentence_encoder", lambda *_: SimpleNamespace(encode=encode))
        run = SimpleNamespace(work=lambda *_: tmp_path, phase=lambda _: nullcontext())
        context = SimpleNamespace(embedder="encoder", device="cpu", run=run)
        work = lambda: embeddings.embed(context, rows, "points", lambda states: states)  # noqa: E731
    work()  # what is read is on the disk now, and only put in place below
    tracemalloc.start()
    found = work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, np.repeat(sums, 2, axis=0))
    assert found.nbytes == 8 * n * width and peak < 1.6 * found.nbytes


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory, request):
    """A sentence encoder that needs no download: the mean hidden states of the tiny Llama."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(request.getfixturevalue("model")))
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    folder = tmp_path_factory.mktemp("encoder")
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder))
    return folder


@pytest.mark.parametrize("name", ["embedding", "k-center"])
def test_a_sentence_encoder_needs_no_model(tmp_path, sentence_model, name):
    def scores(folder, pool):
        work = village.context(tmp_path / folder, None, pool, embedder=str(sentence_model))
        try:
            return SELECTORS.build_from({"name": name}).rank(work).score
        finally:
            work.run.close()

    order = np.r_[RNG.permutation(17), 17:20]
    a = scores("a", POOL)
    b = scores("b", [POOL[i] for i in order])
    assert len(np.unique(a.round(6))) > 10 and np.array_equal(np.sort(a), np.sort(b))
    if name == "embedding":
        assert np.array_equal(b, a[order]) and np.array_equal(a[-3:], a[:3]) and a.max() <= 1 + 1e-9


def test_a_sentence_encoder_that_is_not_there_is_told(tmp_path):
    pytest.importorskip("sentence_transformers")
    work = village.context(tmp_path, None, POOL, embedder=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere: sentence-transformers cannot load it"):
        SELECTORS.build_from({"name": "k-center"}).rank(work)
    work.run.close()


def test_without_sentence_transformers_the_extra_is_named(tmp_path, monkeypatch):
    work = village.context(tmp_path, None, POOL, embedder=str(tmp_path / "nowhere"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'pharmacist\[embeddings\]'"):
        SELECTORS.build_from({"name": "k-center"}).rank(work)
    work.run.close()
