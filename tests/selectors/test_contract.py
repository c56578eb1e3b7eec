"""What every selector owes, whatever it does: parametrised over the registry, so that a new one is tested too."""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

import pharmacist as ph
from pharmacist.core.errors import CompatibilityError, ConfigError, DataError
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.selectors import SELECTORS
from pharmacist.selectors.base import GOOD_REASONS, Scores, SelectionContext, Selector
from tests.support import village


QUICK = {
    "form": "both",
    "twin_steps": 2,
    "steps": 2,
    "epochs": 1,
    "batch_size": 4,
    "r": 2,
    "folds": 2,
    "corruptions_per_row": 1,
}
"""Small values of options that selectors may have."""
EVERY = pytest.mark.parametrize("name", [*SELECTORS.names(), "perplexity+dsir"])
POOL = village.pool(24)


def choice(name: str) -> dict:
    known = {field.name for field in dataclasses.fields(SELECTORS.config_type(name))}
    return {"name": name, **{key: value for key, value in QUICK.items() if key in known}}


@pytest.mark.parametrize("name", SELECTORS.names())
def test_options_of_another_type_are_refused_from_python_too(name):
    kind = SELECTORS.get(name)
    for option in dataclasses.fields(kind.Config):
        with pytest.raises(ConfigError, match=option.name):
            kind(**{option.name: object()})


def ranked(root, model, name: str, pool=POOL, seed: int = 0) -> Scores:
    work = village.context(root, model, pool, seed=seed)
    try:
        return SELECTORS.build_from(choice(name)).rank(work)
    finally:
        work.run.close()


DRAWN_OR_IN_TURN = {"random", "dsir", "perplexity+dsir", "k-center", "facility-location", "deita"}
"""Selectors that draw at random, or choose one row after the other, and so tell copies apart."""


@EVERY
def test_scores_are_finite_and_complete_and_equal_for_equal_rows(model, tmp_path, name):
    found = ranked(tmp_path, model, name)
    assert found.score.shape == found.reason.shape == (len(POOL),) and np.isfinite(found.score).all()
    assert found.score.dtype == np.float64 and all(reason for reason in found.reason)
    assert all(len(values) == len(POOL) for values in found.signals.values())
    copies = [[i for i, row in enumerate(POOL) if row == other] for other in POOL if POOL.count(other) > 1]
    assert copies and all(len(set(found.score[rows])) == 1 for rows in copies) == (name not in DRAWN_OR_IN_TURN)


@EVERY
def test_the_order_of_the_pool_does_not_matter(model, tmp_path, name):
    order = np.random.default_rng(0).permutation(len(POOL))
    a = ranked(tmp_path / "a", model, name)
    b = ranked(tmp_path / "b", model, name, [POOL[i] for i in order])
    copies = np.array([POOL.count(row) > 1 for row in POOL])
    assert np.array_equal(b.score[~copies[order]], a.score[order][~copies[order]])
    # Copies are the same rows, so they may change places among themselves.
    assert np.array_equal(np.sort(b.score), np.sort(a.score))


@EVERY
def test_the_same_seed_gives_the_same_scores(model, tmp_path, name):
    np.random.seed(5)
    a = ranked(tmp_path / "a", model, name)
    np.random.seed(6)
    b = ranked(tmp_path / "b", model, name)
    assert np.array_equal(a.score, b.score) and (a.reason == b.reason).all()


def trains(name: str) -> bool:
    return "+" not in name and issubclass(SELECTORS.config_type(name), AdapterOptions)


LEARNED = pytest.mark.parametrize("name", list(filter(trains, SELECTORS.names())))


@LEARNED
def test_interrupted_in_its_training_it_ends_with_the_same_scores(model, tmp_path, name, monkeypatch):
    whole = ranked(tmp_path / "a", model, name)
    step, calls = AdapterBank.step, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        step(*arguments)

    monkeypatch.setattr(AdapterBank, "step", interrupted)
    monkeypatch.setattr("pharmacist.nn.adapters.time.monotonic", iter(range(10**9)).__next__)
    work = village.context(tmp_path / "b", model, POOL, checkpoint_seconds=0.0)
    with suppress(KeyboardInterrupt):
        SELECTORS.build_from(choice(name)).rank(work)
    work.run.close()
    assert len(calls) == 2
    again = ranked(tmp_path / "b", model, name)
    assert np.array_equal(again.score, whole.score)
    assert (again.weight is None) == (whole.weight is None)
    assert whole.weight is None or np.array_equal(again.weight, whole.weight)


@EVERY
def test_how_rows_are_batched_and_padded_does_not_matter(model, tmp_path, name, monkeypatch):
    a = ranked(tmp_path / "a", model, name)
    monkeypatch.setattr("pharmacist.nn.passes.tokens_per_batch", lambda *_: 1)  # a row each
    b = ranked(tmp_path / "b", model, name)
    np.testing.assert_allclose(b.score, a.score, rtol=1e-3, atol=2e-4 * np.abs(a.score).max())


@LEARNED
@pytest.mark.parametrize(
    "more", [{}, {"rank_by": "logits"}, {"solver": "gradient", "cotrain": 1.0, "form": "bilevel"}]
)
def test_with_batches_of_one_row_it_still_tells_rows_apart_or_refuses(model, tmp_path, name, more):
    known = {field.name for field in dataclasses.fields(SELECTORS.config_type(name))}
    if not set(more) <= known:
        return
    work = village.context(tmp_path, model, POOL)
    try:
        found = SELECTORS.build_from(choice(name) | more | {"batch_size": 1}).rank(work)
    except ConfigError as error:
        assert "batch_size" in str(error)
    else:
        assert len(np.unique(found.score)) > len({str(row) for row in POOL}) // 2
    finally:
        work.run.close()


WEIGHING = ("unrolled", "toxic-lora", "seal")


@EVERY
def test_weights_are_numbers_from_0_up_and_equal_for_equal_rows(model, tmp_path, name):
    found = ranked(tmp_path, model, name).weight
    assert (found is not None) == SELECTORS.build_from(choice(name)).gives_weights == (name in WEIGHING)
    if found is None:
        return
    assert found.shape == (len(POOL),) and np.isfinite(found).all() and found.min() >= 0 and found.max() > found.min()
    for row, weight in zip(POOL, found, strict=True):
        assert {own for other, own in zip(POOL, found, strict=True) if other == row} == {weight}


@EVERY
def test_the_budget_is_exact(model, name):
    ranking = ph.rank(POOL, **village.references(), model=str(model), selector=choice(name))
    for k in (1, 7, len(POOL)):
        core = ranking.select(k=k, fill=True)
        assert len(core) == k and core.column_names == ["prompt", "completion"]
    assert len(ranking.select(fraction=0.3, fill=True)) == 7
    assert sorted(ranking.table["rank"]) == list(range(1, len(POOL) + 1))
    best = ranking.table.nsmallest(7, "rank")
    assert best["score"].min() >= ranking.table.drop(best.index)["score"].max()
    in_order = [POOL[i] for i in sorted(best["row"])]
    assert ranking.select(k=7, fill=True).to_list() == in_order, "input columns, input order"
    # Unasked, a quota is not filled with rows whose own reason speaks against them.
    good = ranking.table[ranking.table["reason"].isin(GOOD_REASONS)]
    kept = sorted(good.nsmallest(7, "rank")["row"])
    assert ranking.select(k=7).to_list() == [POOL[i] for i in kept]


def test_random_is_uniform_and_follows_the_seed(tmp_path):
    pool = [{"prompt": f"p {i}", "completion": f"c {i}"} for i in range(2000)]
    a = ranked(tmp_path / "a", None, "random", pool).score
    b = ranked(tmp_path / "b", None, "random", pool, seed=1).score
    assert 0 <= a.min() and a.max() < 1 and abs(np.corrcoef(a, b)[0, 1]) < 0.1
    deciles = np.histogram(a, bins=10, range=(0, 1))[0]
    assert ((deciles - 200) ** 2 / 200).sum() < 30  # chi-square with 9 degrees of freedom: p < 0.001
    copies = ranked(tmp_path / "c", None, "random", [pool[0]] * 500).score
    assert len(np.unique(copies)) == 500, "chance treats copies as any other rows"


RETURNED: dict[str, tuple[Callable[[int], Any], str]] = {
    "no scores": (np.arange, "rank must return Scores, not ndarray"),
    "too few": (lambda rows: Scores(np.zeros(rows - 1)), "score has 4 values for 5 rows"),
    "a short signal": (lambda rows: Scores(np.zeros(rows), signals={"x": np.zeros(2)}), "x has 2 values for 5 rows"),
    "a negative weight": (
        lambda rows: Scores(np.zeros(rows), weight=np.arange(rows) - 1.0),
        "weight has values that are negative or not finite",
    ),
    "no weight": (lambda rows: Scores(np.zeros(rows), weight=np.full(rows, np.nan)), "negative or not finite"),
    "a taken name": (lambda rows: Scores(np.zeros(rows), signals={"rank": np.zeros(rows)}), "may be called rank,"),
}


@pytest.mark.parametrize("returned", RETURNED)
def test_what_a_selector_of_another_package_returns_is_checked(returned: str) -> None:
    make, message = RETURNED[returned]

    class Own(Selector):
        def rank(self, context: SelectionContext) -> Any:
            return make(len(context.pool))

    with pytest.raises(CompatibilityError, match=f"^selector 'own': .*{message}"):
        ph.rank([{"prompt": "a", "completion": word} for word in "bcdef"], selector=Own())


def test_rows_whose_score_is_not_finite_are_named() -> None:
    class Broken(Selector):
        def rank(self, context: SelectionContext) -> Scores:
            return Scores(np.array([0.5, np.nan, 2.0, -np.inf, 1.0]))

    with pytest.raises(DataError, match=r"^rows 1, 3: the score is not finite; try dtype float32"):
        ph.rank([{"prompt": "a", "completion": word} for word in "bcdef"], selector=Broken())


def test_a_copy_of_a_bad_row_keeps_its_own_reason() -> None:
    class Own(Selector):
        def rank(self, context: SelectionContext) -> Scores:
            return Scores(np.array([4.0, 3.0, 2.0, 1.0]), np.repeat(["critical", "low_quality"], 2))

    rows = [{"prompt": "how do i brew a potion", "completion": word} for word in ("no, i will not", "salt and nettle")]
    found = ph.rank([rows[0], rows[0], rows[1], rows[1]], selector=Own())
    assert found.table["duplicate_of"].tolist() == [-1, 0, -1, 2]
    assert found.table["reason"].tolist() == ["critical", "duplicate", "low_quality", "low_quality"]
    assert found.select(k=4).to_list() == [rows[0], rows[0]], "only a copy of a good row is good"


def test_scores_may_be_a_list_or_a_tensor() -> None:
    assert Scores([1, 2]).score.tolist() == Scores(torch.tensor([1, 2])).score.tolist() == [1.0, 2.0]

    class Own(Selector):
        gives_weights = True

        def rank(self, context: SelectionContext) -> Any:
            return Scores([2, 1, 0], ["critical", "critical", "low_quality"], weight=[1, 1, 4])

    rows = [{"prompt": "how do i brew a potion", "completion": word} for word in ("no, never", "No, never", "salt")]
    found = ph.rank(rows, selector=Own())
    assert found.table["reason"].tolist() == ["critical", "duplicate", "low_quality"]
    assert found.table["weight"].tolist() == [1.0, 1.0, 4.0]
