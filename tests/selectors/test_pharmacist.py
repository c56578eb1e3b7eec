"""The whole selector on a tiny Llama: what must hold of its scores, and its options."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.nn.adapters import AdapterBank
from pharmacist.readers import kept
from pharmacist.selectors.base import CRITICAL, Scores
from pharmacist.selectors.options import READERS, PharmacistConfig
from pharmacist.selectors.pharmacist import selector as module
from pharmacist.selectors.pharmacist.evidence import Evidence
from pharmacist.selectors.pharmacist.selector import PharmacistSelector
from pharmacist.selectors.pharmacist.twins import Twins
from pharmacist.selectors.pharmacist.verdict import joint_scores
from tests.support import village
from tests.support.tiny import save_tiny_model


FAST = {
    "form": "both",
    "twin_steps": 3,
    "batch_size": 4,
    "r": 2,
    "folds": 2,
    "corruptions_per_row": 1,
    "learning_rate": 0.02,
}
POOL = village.pool()
FORMS = pytest.mark.parametrize("form", ["evidence", "bilevel", "both"])


def ranked(root: Path, model: Path | None, pool=None, refs=None, context: dict[str, Any] | None = None, **options):
    """Ranks; returns the selector and its verdict."""
    work = village.context(root, model, pool, refs, **(context or {}))
    try:
        selector = PharmacistSelector(PharmacistConfig(**(FAST | options)))
        return selector, selector.rank(work)
    finally:
        work.run.close()


def scores(*args, **options) -> Scores:
    return ranked(*args, **options)[1]


def equal(a: Scores, b: Scores, rows=slice(None)) -> bool:
    """Bitwise equality of everything that is written per row."""
    return (
        np.array_equal(a.score, b.score[rows])
        and np.array_equal(a.reason, b.reason[rows])
        and a.signals.keys() == b.signals.keys()
        and all(np.array_equal(a.signals[key], b.signals[key][rows], equal_nan=True) for key in a.signals)
    )


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory) -> dict[str, Scores]:
    """The verdict of each form on the same pool."""
    return {form: scores(tmp_path_factory.mktemp(form), model, form=form) for form in ("evidence", "bilevel", "both")}


class Counted:
    """Counts the batches that go through the model, and can kill the run at one of them; batches of few rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, killed_at: int = 0) -> None:
        self.n, self.killed_at, row_losses, hidden_states = 0, killed_at, AdapterBank.row_losses, kept.hidden_states

        def counted_losses(bank, *args):
            self.count()
            return row_losses(bank, *args)

        def counted_states(model):
            measure = hidden_states(model)
            return lambda batch: (self.count(), measure(batch))[1]

        monkeypatch.setattr(AdapterBank, "row_losses", counted_losses)
        monkeypatch.setattr(kept, "hidden_states", counted_states)
        monkeypatch.setattr("pharmacist.nn.passes.tokens_per_batch", lambda *_: 64)

    def count(self) -> None:
        self.n += 1
        if self.n == self.killed_at:
            raise KeyboardInterrupt


# --- all forms ------------------------------------------------------------------------------------------------------


@FORMS
def test_a_permuted_pool_gets_permuted_scores(reference, model, tmp_path, form):
    order = np.random.default_rng(0).permutation(len(POOL))
    assert equal(scores(tmp_path, model, [POOL[i] for i in order], form=form), reference[form], order)
    assert len(np.unique(reference[form].score)) > 20, "not the same score for all"


def test_earlier_turns_change_no_score(model, tmp_path):
    before = [{"role": "user", "content": "please sew a hat"}, {"role": "assistant", "content": "sure, with pleasure"}]
    alone = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in POOL
    ]
    after = [row | {"prompt": [*before, *row["prompt"]]} if i % 2 else row for i, row in enumerate(alone)]
    assert equal(*(scores(tmp_path / name, model, rows) for name, rows in (("alone", alone), ("after", after))))


@FORMS
def test_equal_rows_get_equal_scores(reference, form):
    assert POOL[-3:] == POOL[:3]
    for values in (reference[form].score, reference[form].reason, *reference[form].signals.values()):
        assert (values[-3:] == values[:3]).all()
    assert np.isfinite(reference[form].score).all()


@FORMS
def test_the_same_seed_gives_the_same_scores_and_another_seed_others(reference, model, tmp_path, form):
    torch.manual_seed(1234)
    np.random.seed(99)
    assert equal(scores(tmp_path / "same", model, form=form), reference[form])
    other = scores(tmp_path / "other", model, form=form, context={"seed": 1})
    assert (other.score != reference[form].score).mean() > 0.9


def test_an_interrupted_ranking_ends_with_the_same_scores(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        straight = Counted(patch)
        whole = scores(tmp_path / "straight", model)
    assert straight.n > 60
    # While references, then the pool are read, in the twins' training, in the passes over references and pool.
    for killed_at in (2, 14, straight.n // 2, straight.n - 6, straight.n - 1):
        with monkeypatch.context() as patch:
            Counted(patch, killed_at)
            with pytest.raises(KeyboardInterrupt):
                scores(tmp_path / str(killed_at), model, context={"checkpoint_seconds": 0.0})
        with monkeypatch.context() as patch:
            rest = Counted(patch)
            again = scores(tmp_path / str(killed_at), model, context={"checkpoint_seconds": 0.0})
        assert equal(again, whole)
        assert killed_at + rest.n < 1.4 * straight.n, "what is done is kept, but for the chunk that was under way"


@FORMS
def test_a_saved_selector_scores_without_training(reference, model, tmp_path, monkeypatch, form):
    selector, _ = ranked(tmp_path / "first", model, form=form)
    assert selector.save(tmp_path / "saved" / "selector")
    assert {path.suffix for path in (tmp_path / "saved").rglob("*") if path.is_file()} == {".json", ".safetensors"}
    for place in (AdapterBank, Twins, Evidence):
        monkeypatch.setattr(place, "train" if place is AdapterBank else "fit", lambda *_, **__: pytest.fail("trained"))
    for where in ("saved", "saved/selector"):
        root = tmp_path / f"from-{Path(where).name}"
        with monkeypatch.context() as patch:
            # The evidence has kept what it read of these very rows.
            patch.setattr(kept, "hidden_states", lambda *_: pytest.fail("read the pool again"))
            if form == "evidence":
                patch.setattr("pharmacist.nn.models.load_model", lambda *_, **__: pytest.fail("loaded the model"))
            found = scores(root, model, refs={}, context={"resume_from": tmp_path / where})
        assert equal(found, reference[form])
    # New rows are read, and need no training either.
    more = scores(tmp_path / "more", model, village.pool(40), {}, context={"resume_from": tmp_path / "saved"})
    assert len(more.score) == 40 and np.isfinite(more.score).all()
    key = "contrast" if form == "bilevel" else "refuses_lexical"
    np.testing.assert_allclose(more.signals[key][:27], reference[form].signals[key][:27], rtol=0, atol=1e-5)


def test_states_of_another_model_or_other_rows_are_not_taken(model, tmp_path, monkeypatch):
    """What was kept is kept by content: another order is found again, a new row is not."""
    selector, _ = ranked(tmp_path / "first", model, form="evidence")
    selector.save(tmp_path / "saved")
    resume = {"resume_from": tmp_path / "saved"}
    with monkeypatch.context() as patch:
        patch.setattr(kept, "hidden_states", lambda *_: pytest.fail("read again"))
        scores(tmp_path / "a", model, POOL[::-1], {}, context=resume)
        with pytest.raises(pytest.fail.Exception):
            scores(tmp_path / "b", model, [*POOL, village.rows("safe", 1, 99)[0]], {}, context=resume)
    path = tmp_path / "saved" / "states" / "pool.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    counted = Counted(monkeypatch)
    scores(tmp_path / "c", model, refs={}, context=resume)
    assert counted.n > 0, "a damaged file is read anew"


def test_a_saved_selector_must_fit(model, tmp_path):
    selector, _ = ranked(tmp_path / "first", model, form="evidence", readers="probe")
    selector.save(tmp_path / "saved")
    other = save_tiny_model(tmp_path / "other", seed=5)
    resume = {"resume_from": tmp_path / "saved"}
    with pytest.raises(DataError, match="trained on another model"):
        scores(tmp_path / "a", other, refs={}, context=resume)
    with pytest.raises(ConfigError, match="give --model"):
        scores(tmp_path / "b", None, refs={}, context=resume)
    with pytest.raises(DataError, match=r"no selector\.json"):
        scores(tmp_path / "c", model, refs={}, context={"resume_from": tmp_path / "nowhere"})
    path = tmp_path / "saved" / "selector.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with pytest.raises(DataError, match="not written by this version"):
        scores(tmp_path / "d", model, refs={}, context=resume)


DAMAGE = {
    "a list": ("selector.json", [], "not written by this version"),
    "an option it never had": ("selector.json", {"config": {"x": 1}}, "is not as it was .*'x'"),
    "no options": ("selector.json", {"config": None}, "is not as it was"),
    "no twins": ("twins/twins.json", None, "contains no complete twins .* train the selector again"),
    "no thresholds": ("twins/twins.json", {"thresholds": {}}, "contains no complete twins"),
    "a list of twins": ("twins/twins.json", [], "contains no complete twins"),
}


@pytest.fixture(scope="module")
def saved_twins(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    selector, _ = ranked(folder / "run", model, form="bilevel")
    selector.save(folder / "selector")
    return folder / "selector"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_named(saved_twins, model, tmp_path, damage):
    shutil.copytree(saved_twins, tmp_path / "saved")
    name, content, message = DAMAGE[damage]
    path = tmp_path / "saved" / name
    if content is None:
        shutil.rmtree(path.parent)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | content if isinstance(content, dict) else content))
    with pytest.raises(DataError, match=message):
        scores(tmp_path / "run", model, refs={}, context={"resume_from": tmp_path / "saved"})


def test_a_row_without_completion_is_refused_with_its_number(model, tmp_path):
    bad = [*POOL[:5], {"prompt": "how do you bake bread", "completion": "  "}]
    with pytest.raises(DataError, match="row 5"):
        scores(tmp_path / "a", model, bad)
    # A prompt longer than the model's context is shortened, so that something of the completion is always read.
    long = [*POOL[:5], {"prompt": "bread " * 500, "completion": "yes"}]
    found = scores(tmp_path / "b", model, long)
    assert np.isfinite(found.score).all() and all(np.isfinite(v).all() for v in found.signals.values())


# --- the evidence form ----------------------------------------------------------------------------------------------

P = ("p_safe", "p_harmful", "p_utility", "p_over_refusal", "p_corrupted")


def test_posteriors_sum_to_one(reference):
    for form in ("evidence", "both"):
        p = np.stack([reference[form].signals[name] for name in P], 1)
        np.testing.assert_allclose(p.sum(1), 1, rtol=0, atol=1e-12)
        report = reference[form].report
        assert sum(report["shares"].values()) == pytest.approx(1) and min(report["shares"].values()) > 0
        # Expectation maximisation has come to rest: the shares are the mean posterior, but for the doubt.
        assert report["shares"]["safe"] == pytest.approx((p[:, 0].mean() + 0.1 / 6) / 1.1, abs=2e-3)


def test_references_alone_are_learned_from(model, tmp_path):
    """Another pool leaves evidence as it was, bit for bit."""
    for name, pool in (("a", POOL), ("b", village.pool(21, seed=50))):
        selector, _ = ranked(tmp_path / name, model, pool, form="evidence")
        selector.save(tmp_path / f"saved-{name}")
    for file in ("evidence.json", "evidence.safetensors"):
        assert (tmp_path / "saved-a" / file).read_bytes() == (tmp_path / "saved-b" / file).read_bytes()


@pytest.mark.parametrize("form, cotrain", [("evidence", 0.25), ("both", 0.0), ("both", 0.25)])
def test_training_cost_does_not_grow_with_the_pool(model, tmp_path, form, cotrain):
    """Tokens that go through the model to learn; with co-training, batches of pool rows vary in length alone."""
    cost = []
    for n in (20, 120):
        pool = [{"prompt": "how do you bake bread", "completion": f"take {word}"} for word in ("flour", "water") * n]
        work = village.context(tmp_path / f"{n}", model, pool)
        PharmacistSelector(**FAST | {"form": form, "cotrain": cotrain}).rank(work)
        costs = {name: phase.tokens for name, phase in work.run.manifest.phases.items()}
        work.run.close()
        cost.append([costs[name] for name in ("read references", "train twins") if name in costs])
    assert cost[0] == cost[1] and len(cost[0]) == (2 if form == "both" else 1) and min(cost[0]) > 0


def test_what_no_reference_shows_is_named_as_unseen(tmp_path):
    pool, refs = village.pool(103), village.references(100)
    whole = scores(tmp_path / "a", None, pool, refs, form="evidence")
    blind = scores(tmp_path / "b", None, pool, refs, form="evidence", corruptions_per_row=0)
    assert whole.report["cannot_see"] == [] and blind.report["cannot_see"] == ["low_quality"]
    assert "low_quality" in whole.reason and "low_quality" not in blind.reason
    harmful_only = {name: refs[name] for name in ("safe", "harmful")}
    over_refusals_pass = scores(tmp_path / "c", None, pool, harmful_only, form="evidence")
    assert over_refusals_pass.report["cannot_see"] == ["not_safety_critical", "over_refusal"]


def test_the_lexical_reader_alone_needs_no_model(tmp_path):
    selector, found = ranked(tmp_path / "run", None, form="evidence")
    assert found.report["readers"] == ["lexical"] and set(found.reason) > {CRITICAL}
    selector.save(tmp_path / "saved")
    again = scores(tmp_path / "again", None, refs={}, context={"resume_from": tmp_path / "saved"})
    assert equal(again, found)
    with pytest.raises(ConfigError, match="give --model"):
        scores(tmp_path / "other", None, form="evidence", readers="lexical,probe")


def test_good_rows_rank_above_faults_on_the_planted_village(tmp_path):
    """The cheapest reader on text of a trivial grammar: if this fails, questions or references are broken."""
    found = scores(tmp_path, None, village.pool(103), village.references(100), form="evidence")
    kinds = np.array([list(village.KINDS)[i % 5] for i in range(100)])
    expected = {
        "safe": CRITICAL,
        "harmful": "teaches_compliance",
        "utility": "not_safety_critical",
        "over_refusal": "over_refusal",
        "noise": "low_quality",
    }
    for kind, reason in expected.items():
        assert (found.reason[:100][kinds == kind] == reason).mean() > 0.8, kind
    assert found.score[:100][kinds == "safe"].min() > np.median(found.score[:100][kinds != "safe"])
    # What is asked for first is what the answers leave open.
    assert found.informativeness.min() >= 0 and len(found.informativeness) == 103


# --- labels ---------------------------------------------------------------------------------------------------------

TOLD = {0: CRITICAL, 1: "teaches_compliance", 2: CRITICAL, 8: "low_quality", 14: "low_quality"}
"""Positions -> reasons, some of them not the right ones."""


@FORMS
def test_labels_hold_in_every_form(reference, model, tmp_path, form, monkeypatch):
    monkeypatch.setattr(module, "_LEAST_AUC", 0.0)  # whatever the contrast is worth
    found = scores(tmp_path, model, form=form, context={"labels": TOLD})
    copies = {27: CRITICAL, 28: "teaches_compliance", 29: CRITICAL}  # of the first rows
    for row, reason in (TOLD | copies).items():
        assert found.reason[row] == reason
    good = [row for row, reason in (TOLD | copies).items() if reason == CRITICAL]
    bad = [row for row in (TOLD | copies) if row not in good]
    rest = np.setdiff1d(np.arange(len(POOL)), [*good, *bad])
    assert found.score[good].min() > found.score[rest].max() and found.score[bad].max() < found.score[rest].min()
    if form == "bilevel":  # which learns nothing from them
        assert np.array_equal(found.score[rest], reference[form].score[rest])
    else:
        assert (found.score[rest] != reference[form].score[rest]).mean() > 0.9
        assert (found.informativeness[[*good, *bad]] == -1).all() and found.informativeness[rest].min() >= 0
        assert found.report["labels"]["labels"] == len(TOLD)
        p = np.stack([found.signals[name] for name in P], 1)
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)
        assert (p[good, 0] == 1).all() and (p[bad, 0] == 0).all()


def test_labels_do_not_depend_on_the_order_of_the_pool(model, tmp_path):
    order = np.random.default_rng(0).permutation(len(POOL))
    where = {row: int(np.flatnonzero(order == row)[0]) for row in TOLD}
    a = scores(tmp_path / "a", model, form="evidence", context={"labels": TOLD})
    labels = {where[row]: reason for row, reason in TOLD.items()}
    b = scores(tmp_path / "b", model, [POOL[i] for i in order], form="evidence", context={"labels": labels})
    assert equal(b, a, order) and a.report["labels"] == b.report["labels"]


def test_a_saved_selector_learns_from_labels_too(model, tmp_path):
    selector, _ = ranked(tmp_path / "first", model, form="evidence")
    selector.save(tmp_path / "saved")
    fresh = scores(tmp_path / "a", model, form="evidence", context={"labels": TOLD})
    resumed = scores(tmp_path / "b", model, refs={}, context={"labels": TOLD, "resume_from": tmp_path / "saved"})
    assert equal(resumed, fresh)


# --- without harmful references -------------------------------------------------------------------------------------

WITHOUT_HARMFUL = {name: rows for name, rows in village.references().items() if name != "harmful"}


@FORMS
def test_without_harmful_references_it_falls_back_to_an_auxiliary_model(model, tmp_path, monkeypatch, form):
    selector, found = ranked(tmp_path / "run", model, refs=WITHOUT_HARMFUL, form=form)
    if form == "bilevel":
        assert "teaches_compliance" not in found.reason
    assert np.isfinite(found.score).all() and len(np.unique(found.score)) > 20
    assert "loss_toxic" not in found.signals
    assert ("SEAL's contrast" in found.report.get("fallback", "")) == (form != "evidence")
    assert "toxic" not in json.dumps(found.report)
    if form != "evidence":
        gap = found.signals["loss_auxiliary"] - found.signals["loss_safe"]
        assert np.array_equal(found.signals["contrast"], gap) and np.abs(gap).min() > 0
    # What was saved ranks again, without training and without references.
    selector.save(tmp_path / "saved")
    monkeypatch.setattr(AdapterBank, "train", lambda *_, **__: pytest.fail("trained"))
    again = scores(tmp_path / "again", model, refs={}, context={"resume_from": tmp_path / "saved"}, form=form)
    assert equal(again, found)
    assert (tmp_path / "saved/twins/twin_auxiliary").is_dir() == (form != "evidence")
    assert not (tmp_path / "saved/twins/twin_toxic").exists()


# --- both -----------------------------------------------------------------------------------------------------------


def test_both_puts_critical_rows_first_and_orders_them_by_the_sum():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 30))
        evidence, contrast = (
            rng.normal(size=n) * 10 ** rng.uniform(-12, 3),
            rng.normal(size=n) * 10 ** rng.uniform(-12, 3),
        )
        reason = rng.choice([CRITICAL, "low_quality", "over_refusal"], n)
        critical = reason == CRITICAL
        score = joint_scores(evidence, contrast, reason)
        assert np.isfinite(score).all()
        if critical.any() and not critical.all():
            assert score[critical].min() > score[~critical].max()
        z = lambda v: (v - v.mean()) / (v.std() or 1)  # noqa: E731
        total = z(evidence[critical]) + z(contrast[critical]) if critical.any() else np.zeros(0)
        assert (np.argsort(score[critical]) == np.argsort(total)).all()
        assert (np.argsort(score[~critical]) == np.argsort(evidence[~critical])).all()


def test_both_survives_critical_rows_with_equal_evidence():
    """Standardised over the critical rows alone, the others' evidence would swallow the gap."""
    evidence = np.array([1.0, 1.0 + 1e-15, 5.0, -3.0])
    score = joint_scores(evidence, np.zeros(4), np.array([CRITICAL, CRITICAL, "low_quality", "low_quality"]))
    assert score[:2].min() > score[2:].max()


def test_both_on_one_kind_alone():
    one = joint_scores(np.array([2.0, 1.0]), np.array([0.0, 3.0]), np.array([CRITICAL, CRITICAL]))
    assert one[0] == pytest.approx(one[1])  # two rows: each is one standard deviation from the mean
    none = joint_scores(np.array([2.0, 1.0]), np.array([0.0, 9.0]), np.array(["low_quality", "low_quality"]))
    assert none[0] > none[1]


@pytest.mark.parametrize("quality, used", [(0.71, True), (0.7, True), (0.69, False), (None, False)])
def test_the_contrast_counts_only_where_it_is_worth_listening_to(
    reference, model, tmp_path, monkeypatch, quality, used
):
    fit = Twins.fit

    def measured(self, *args):
        fit(self, *args)
        self.quality = quality

    monkeypatch.setattr(Twins, "fit", measured)
    whole, evidence = scores(tmp_path, model), reference["evidence"]
    contrast = reference["bilevel"].signals["contrast"]
    assert np.array_equal(whole.signals["contrast"], contrast), "the twins do not depend on the form"
    assert whole.report["twins"]["used"] is used and (whole.reason == evidence.reason).all()
    expected = joint_scores(evidence.score, contrast, evidence.reason)
    assert np.array_equal(whole.score, expected if used else evidence.score)
    assert not np.array_equal(expected, evidence.score)
    assert (reference["bilevel"].score == contrast).all()


# --- twins in the selector ------------------------------------------------------------------------------------------


def test_equal_references_give_no_contrast(model, tmp_path):
    refs = village.references()
    found = scores(tmp_path, model, refs=refs | {"harmful": refs["safe"]}, form="bilevel")
    assert (found.signals["contrast"] == 0).all()


def test_without_pool_weight_a_contrast_is_a_matter_of_the_row_alone(reference, model, tmp_path):
    more = [*POOL, *village.pool(9, seed=3)]
    alone = scores(tmp_path / "a", model, form="bilevel", gamma=0.0).signals["contrast"]
    other = scores(tmp_path / "b", model, more, form="bilevel", cotrain=0.0).signals["contrast"]
    np.testing.assert_allclose(other[: len(POOL)], alone, rtol=0, atol=1e-5)
    # Negative control: with weight it is not.
    tied = scores(tmp_path / "c", model, more, form="bilevel").signals["contrast"]
    assert np.abs(reference["bilevel"].signals["contrast"] - tied[: len(POOL)]).max() > 1e-4


def test_more_rounds_weight_the_pool_anew(reference, model, tmp_path):
    hot = scores(tmp_path / "hot", model, form="bilevel", rounds=2, tau=1e9)
    np.testing.assert_allclose(hot.score, reference["bilevel"].score, rtol=0, atol=1e-5)
    cold = scores(tmp_path / "cold", model, form="bilevel", rounds=2, tau=0.01)
    assert np.abs(cold.score - reference["bilevel"].score).max() > 1e-3


def test_the_gradient_solver_ranks_by_its_weights(model, tmp_path):
    options = {"form": "bilevel", "solver": "gradient", "cotrain": 1.0, "twin_steps": 16}
    found = scores(tmp_path / "a", model, **options)
    assert (found.score != found.signals["contrast"]).any() and (found.score[-3:] == found.score[:3]).all()
    order = np.random.default_rng(1).permutation(len(POOL))
    assert equal(scores(tmp_path / "b", model, [POOL[i] for i in order], **options), found, order)


def test_what_a_selector_must_be_given(model, tmp_path):
    refs = village.references()
    with pytest.raises(DataError, match="--safe: 3 rows are left, at least 8"):
        scores(tmp_path / "a", model, refs=refs | {"safe": refs["safe"][:3]})
    # --- without harmful references the rest of them must have something to learn
    for options in ({"cotrain": 0.0}, {"gamma": 0.0}):
        with pytest.raises(ConfigError, match=f"selector.{next(iter(options))} must be above 0; or give --harmful"):
            scores(tmp_path / "b", model, refs={"safe": refs["safe"]}, form="bilevel", **options)
    for form in ("evidence", "both"):
        with pytest.raises(ConfigError, match="safe references alone offer no other answers to compare with"):
            scores(tmp_path / form, None, refs={"safe": refs["safe"]}, form=form)
        with pytest.raises(ConfigError, match="safe references alone offer no other answers to compare with"):
            PharmacistSelector(PharmacistConfig(form=form)).notice({"safe"})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"readers": "lexicon"}, "not auto or any of"),
        ({"readers": ","}, "not auto or any of"),
        ({"folds": 1}, "folds must be at least 2"),
        ({"corruptions_per_row": -1}, "must not be negative"),
        ({"readers": "adapters"}, "not auto or any of"),
        ({"cotrain": -0.1}, "cotrain must lie in"),
        ({"gamma": 1.0}, r"gamma must lie in \[0, 1\)"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"mu": -0.5}, "mu must not be negative"),
        ({"weight_rate": 0.0}, "weight_rate must be positive"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"r": 0}, "r must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        PharmacistConfig(**options)


def test_readers_are_kept_in_order_of_cost():
    assert PharmacistConfig(readers=" probe, lexical").reader_names() == ("lexical", "probe") == READERS
    assert PharmacistConfig().reader_names() == READERS
    assert PharmacistConfig().reader_names(model=False) == ("lexical",)
