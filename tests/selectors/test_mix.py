"""Several selectors as one: closed form of the mean of places, what makes no sense, options of the parts."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from pharmacist.core.errors import ConfigError, UnknownNameError
from pharmacist.selectors import SELECTORS
from pharmacist.selectors.base import RANKED, SelectionContext
from pharmacist.selectors.baselines import LengthSelector
from pharmacist.selectors.mix import share_of_rows_behind
from tests.support import village
from tests.support.peers import ranked


POOL = village.pool(24)


def test_places_by_hand():
    assert share_of_rows_behind(np.array([5.0, -1.0, 2.0])).tolist() == [1, 0, 0.5]
    assert share_of_rows_behind(np.array([1.0, 1.0, 0.0])).tolist() == [0.75, 0.75, 0]
    assert share_of_rows_behind(np.array([7.0])).tolist() == [0]


def test_the_score_is_the_mean_of_the_places(tmp_path):
    parts = [ranked(tmp_path / name, {"name": name}, POOL).score for name in ("perplexity", "length", "ifd")]
    mixed = ranked(tmp_path / "mix", {"name": "perplexity+length+ifd"}, POOL)
    expected = np.mean([share_of_rows_behind(score) for score in parts], axis=0)
    np.testing.assert_allclose(mixed.score, expected, atol=1e-15)
    assert np.array_equal(mixed.signals["perplexity_place"], share_of_rows_behind(parts[0]))
    assert np.array_equal(mixed.signals["length_characters"], parts[1])
    assert len(set(mixed.signals)) == len(mixed.signals) and set(mixed.report) == {"perplexity", "length", "ifd"}


class Shortest(LengthSelector):
    """The other way round and on another scale."""

    name = "shortest"

    def rank(self, context):
        """Minus a root of the characters."""
        found = super().rank(context)
        return replace(found, score=-np.sqrt(found.score))


def test_a_scale_does_not_count_and_a_selector_against_itself_cancels(tmp_path, monkeypatch):
    monkeypatch.setitem(SELECTORS._table, "shortest", f"{__name__}:Shortest")
    mixed = ranked(tmp_path / "a", {"name": "length+shortest"}, POOL)
    np.testing.assert_allclose(mixed.score, 0.5, atol=1e-15)
    one = ranked(tmp_path / "b", {"name": "shortest"}, POOL).score
    both = ranked(tmp_path / "c", {"name": "shortest+length", "length": {"keep": "shortest"}}, POOL).score
    assert spearmanr(one, both)[0] == pytest.approx(1), "the same order on another scale"


def test_the_order_of_the_parts_changes_no_score_but_who_says_what_a_row_is(tmp_path):
    a = ranked(tmp_path / "a", {"name": "length+classifier", "classifier": {"folds": 2}}, POOL)
    b = ranked(tmp_path / "b", {"name": "classifier+length", "classifier": {"folds": 2}}, POOL)
    np.testing.assert_allclose(a.score, b.score, atol=1e-15)
    assert (a.reason == b.reason).all() and RANKED not in a.reason, "one that only measures says nothing"
    ifd_first = ranked(tmp_path / "c", {"name": "ifd+classifier", "classifier": {"folds": 2}}, POOL)
    assert (ifd_first.reason != a.reason).any()


def test_a_part_does_not_see_the_adapters_of_another(model, tmp_path, monkeypatch):
    trained = {"form": "bilevel", "twin_steps": 2, "r": 2, "cotrain": 0.0}

    def losses(folder: str, choice: dict) -> np.ndarray:
        work = village.context(tmp_path / folder, model, POOL)
        try:
            return SELECTORS.build_from(choice).rank(work).signals
        finally:
            work.run.close()

    mixed = {"name": "pharmacist+perplexity", "pharmacist": trained}
    alone = losses("a", {"name": "perplexity"})["perplexity"]
    assert np.array_equal(losses("b", mixed)["perplexity_perplexity"], alone)
    monkeypatch.setattr(SelectionContext, "forget_changed_model", lambda _: None)
    assert not np.array_equal(losses("c", mixed)["perplexity_perplexity"], alone), "else this proves nothing"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("length+length", "'length' is named twice"),
        ("full+length", "'full' ranks nothing; leave it out"),
        ("random+full", "'random' adds nothing but chance"),
        ("length+lenght", "unknown selector 'lenght'"),
        ("length+", "unknown selector ''"),
    ],
)
def test_mixtures_that_make_no_sense(name, message):
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        SELECTORS.build_from({"name": name})


def test_options_of_the_parts():
    mixed = SELECTORS.build_from({"name": "dsir+k-center", "dsir": {"buckets": 7}, "k_center": {"block": 9}})
    assert mixed.needs == {"safe", "embedder"}
    given = asdict(mixed.config)
    assert given["dsir"]["buckets"] == 7 and given["k_center"]["block"] == 9
    assert asdict(SELECTORS.build_from({"name": "dsir+k-center", **given}).config) == given, "as a manifest holds them"
    with pytest.raises(ConfigError, match="selector 'dsir' has no option 'bukkets'; did you mean 'buckets'"):
        SELECTORS.build_from({"name": "dsir+length", "dsir": {"bukkets": 7}})
    with pytest.raises(ConfigError, match="has no option 'buckets'"):
        SELECTORS.build_from({"name": "dsir+length", "buckets": 7})


@pytest.mark.parametrize("name", ["length+k-center", "facility-location+perplexity", "deita", "length+deita"])
def test_what_a_part_cannot_hold_is_said_before_another_part_works(tmp_path, name):
    selector = SELECTORS.build_from({"name": name})
    selector.check_room(100, tmp_path)
    with pytest.raises(ConfigError, match="comparing 10{12} rows"):
        selector.check_room(10**12, tmp_path)
    SELECTORS.build_from({"name": "length+perplexity"}).check_room(10**12, tmp_path)  # these take any


def test_the_scorer_of_deita_is_asked_too(tmp_path, monkeypatch):
    monkeypatch.setattr("pharmacist.selectors.deita.check_room", lambda *_: None)
    with pytest.raises(ConfigError, match="comparing 10{12} rows"):
        SELECTORS.build_from({"name": "deita", "scorer": "k-center"}).check_room(10**12, tmp_path)


def test_the_scorer_of_deita_refuses_what_it_cannot_work_with_before_the_pool_is_read():
    selector = SELECTORS.build_from({"name": "deita", "scorer": "pharmacist"})
    assert selector.notice({"safe", "harmful"}) is None and selector.uses == {"harmful", "utility", "model"}
    with pytest.raises(ConfigError, match="safe references alone offer no other answers"):
        selector.notice({"safe"})


@pytest.mark.parametrize("choice", [{"name": "pharmacist+length"}, {"name": "deita", "scorer": "pharmacist"}])
def test_what_a_part_says_against_its_scores_is_not_lost(tmp_path, choice):
    alone = ranked(tmp_path / "alone", {"name": "pharmacist"}, POOL).warnings
    assert alone and ranked(tmp_path / "mix", choice, POOL).warnings == alone


@pytest.mark.parametrize("name", ["length+classifier", "ifd+classifier", "classifier+pharmacist"])
def test_how_far_to_trust_the_reasons_is_said(tmp_path, name):
    refs = {kind: village.references()[kind] for kind in ("safe", "harmful")}
    alone = ranked(tmp_path / "alone", {"name": "classifier"}, POOL, refs).report
    mixed = ranked(tmp_path / "mix", {"name": name}, POOL, refs).report
    assert alone["cannot_see"] and alone["questions"]
    for key in ("cannot_see", "questions", "held_out_by"):
        assert mixed[key] == alone[key]


def test_a_selector_takes_part_with_one_set_of_options():
    """Its partial results lie under its name: the second set would be given the results of the first."""
    twice = {"name": "embedding+deita", "embedding": {"nearest": 3}, "deita": {"scorer": "length+embedding"}}
    with pytest.raises(ConfigError, match="ranks by 'embedding' twice, with different options"):
        SELECTORS.build_from(twice)
    SELECTORS.build_from(twice | {"embedding": {"nearest": 0}})
