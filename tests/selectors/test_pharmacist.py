"""The whole selector on a tiny Llama: section 6 (1, 2, 4, 6, 7, 8) of the method, and its options."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.data.formats import open_source
from pharmacist.data.records import read_records
from pharmacist.nn.adapters import AdapterBank
from pharmacist.selectors import pharmacist as module
from pharmacist.selectors.base import CRITICAL, Scores
from pharmacist.selectors.evidence.combine import log_odds
from pharmacist.selectors.options import READERS, PharmacistConfig
from pharmacist.selectors.pharmacist import Pharmacist, _Worker, both
from tests.selectors import village
from tests.tiny import save_tiny_model


FAST = {
    "readers": "lexical,probe,adapters", "adapter_steps": 3, "twin_steps": 3, "batch_size": 4, "r": 2, "folds": 2,
    "corruptions_per_row": 1, "learning_rate": 0.02,
}  # fmt: skip
POOL = village.pool()
FORMS = pytest.mark.parametrize("form", ["evidence", "bilevel", "both"])


def ranked(root: Path, model: Path | None, pool=None, refs=None, context: dict[str, Any] | None = None, **options):
    """Ranks; returns the selector and its verdict."""
    work = village.context(root, model, pool, refs, **(context or {}))
    try:
        selector = Pharmacist(PharmacistConfig(**(FAST | options)))
        return selector, selector.rank(work)
    finally:
        work.run.close()


def scores(*args, **options) -> Scores:
    return ranked(*args, **options)[1]


def trained(root: Path, model: Path | None, pool=None, refs=None, **options):
    work = village.context(root, model, pool, refs)
    try:
        worker = _Worker(PharmacistConfig(**(FAST | options)), work)
        return worker, worker.train()
    finally:
        work.run.close()


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
    """Counts the batches that go through an adapter, and can kill the run at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, killed_at: int = 0) -> None:
        self.n, original = 0, AdapterBank.row_losses

        def row_losses(bank, *args):
            self.n += 1
            if self.n == killed_at:
                raise KeyboardInterrupt
            return original(bank, *args)

        monkeypatch.setattr(AdapterBank, "row_losses", row_losses)


# --- section 6, both forms ------------------------------------------------------------------------------------------


@FORMS
def test_a_permuted_pool_gets_permuted_scores(reference, model, tmp_path, form):
    order = np.random.default_rng(0).permutation(len(POOL))
    assert equal(scores(tmp_path, model, [POOL[i] for i in order], form=form), reference[form], order)
    assert len(np.unique(reference[form].score)) > 20, "not the same score for all"


def test_earlier_turns_change_no_score(model, tmp_path):
    before = [{"role": "user", "content": "please sew a hat"}, {"role": "assistant", "content": "sure, with pleasure"}]
    alone = [{"prompt": [{"role": "user", "content": row["prompt"]}],
              "completion": [{"role": "assistant", "content": row["completion"]}]} for row in POOL]  # fmt: skip
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


def test_an_interrupted_ranking_ends_with_the_same_scores(reference, model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        straight = Counted(patch)
        assert equal(scores(tmp_path / "straight", model), reference["both"])
    # In the readers' training, in the twins' training, in the passes over references and pool.
    for killed_at in (7, straight.n // 2, straight.n - 30, straight.n - 1):
        with monkeypatch.context() as patch:
            Counted(patch, killed_at)
            with pytest.raises(KeyboardInterrupt):
                scores(tmp_path / str(killed_at), model, context={"checkpoint_seconds": 0.0})
        with monkeypatch.context() as patch:
            rest = Counted(patch)
            again = scores(tmp_path / str(killed_at), model, context={"checkpoint_seconds": 0.0})
        assert equal(again, reference["both"])
        assert killed_at + rest.n < straight.n + 20, "little is done twice"


@FORMS
def test_a_saved_selector_scores_without_training(reference, model, tmp_path, monkeypatch, form):
    selector, _ = ranked(tmp_path / "first", model, form=form)
    assert selector.save(tmp_path / "saved" / "selector")
    assert {path.suffix for path in (tmp_path / "saved").rglob("*") if path.is_file()} == {".json", ".safetensors"}
    monkeypatch.setattr(AdapterBank, "train", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(_Worker, "train", lambda *_: pytest.fail("trained"))
    for where in ("saved", "saved/selector"):
        root = tmp_path / f"from-{Path(where).name}"
        found = scores(root, model, refs={}, context={"resume_from": tmp_path / where})
        assert equal(found, reference[form])
    # New rows: those that were there before keep their evidence.
    more = scores(tmp_path / "more", model, village.pool(40), {}, context={"resume_from": tmp_path / "saved"})
    key = "contrast" if form == "bilevel" else "p_safe"
    np.testing.assert_allclose(more.signals[key][:27], reference[form].signals[key][:27], rtol=0, atol=1e-5)


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


def test_a_row_without_completion_is_refused_with_its_number(model, tmp_path):
    bad = [*POOL[:5], {"prompt": "how do you bake bread", "completion": "  "}]
    with pytest.raises(DataError, match="row 5"):
        scores(tmp_path / "a", model, bad)
    # A prompt longer than the model's context is shortened, so that something of the completion is always read.
    long = [*POOL[:5], {"prompt": "bread " * 500, "completion": "yes"}]
    found = scores(tmp_path / "b", model, long)
    assert np.isfinite(found.score).all() and all(np.isfinite(v).all() for v in found.signals.values())


# --- the evidence form ----------------------------------------------------------------------------------------------


def out_of_fold(root, model, monkeypatch, change=None, **options) -> tuple[dict[str, np.ndarray], Any]:
    """The out-of-fold predictions of all readers, and the references they were made on."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(_Worker, "combine", lambda self, trained, refs, found: seen.update(found=found, refs=refs))
    if change is not None:
        build = module.build_references
        monkeypatch.setattr(module, "build_references", lambda *args, **kwargs: change(build(*args, **kwargs)))
    trained(root, model, form="evidence", **options)
    monkeypatch.undo()
    return seen["found"], seen["refs"]


def test_a_row_never_takes_part_in_its_own_prediction(model, tmp_path, monkeypatch):
    before, refs = out_of_fold(tmp_path / "a", model, monkeypatch)
    for number, row in enumerate((0, 17)):

        def relabelled(found, row=row):
            labels = found.labels.copy()
            labels[row] = (labels[row] + 1) % len(found.classes)
            return dataclasses.replace(found, labels=labels)

        after, _ = out_of_fold(tmp_path / f"b{number}", model, monkeypatch, relabelled)
        same_fold = refs.folds == refs.folds[row]
        for name in before:
            assert np.array_equal(before[name][same_fold], after[name][same_fold]), name
            # Negative control: the other folds do learn from it.
            assert (before[name][~same_fold] != after[name][~same_fold]).any(1).mean() > 0.9, name


def test_out_of_fold_predictions_are_complete_and_sum_to_one(model, tmp_path, monkeypatch):
    found, refs = out_of_fold(tmp_path, model, monkeypatch, folds=4, adapter_folds=3)
    assert set(found) == {"lexical", "probe", "adapters"} and refs.n_folds == 4
    for values in found.values():
        assert values.shape == (len(refs.labels), len(refs.classes))
        np.testing.assert_allclose(np.exp(values).sum(1), 1, rtol=0, atol=1e-9)


def test_equal_references_make_every_reader_undecided(reference, model, tmp_path):
    refs = village.references()
    found = scores(tmp_path, model, refs=refs | {"harmful": refs["safe"]})
    np.testing.assert_allclose(found.signals["p_safe"], found.signals["p_harmful"], rtol=0, atol=1e-6)
    assert (found.signals["contrast"] == 0).all()
    # Negative control: the real references are told apart.
    other = reference["both"]
    assert np.abs(other.signals["p_safe"] - other.signals["p_harmful"]).max() > 0.1 and other.signals["contrast"].all()


def test_posteriors_sum_to_one(reference):
    for form in ("evidence", "both"):
        p = np.stack([reference[form].signals[f"p_{name}"] for name in module.REASONS], 1)
        np.testing.assert_allclose(p.sum(1), 1, rtol=0, atol=1e-12)
    found = reference["evidence"]
    np.testing.assert_allclose(found.score, np.log(p[:, 0] / (1 - p[:, 0])), rtol=1e-6)
    assert (found.reason == np.array(list(module.REASONS.values()))[p.argmax(1)]).all()


def test_the_pool_never_influences_a_reader(model, tmp_path):
    learned = []
    for number, pool in enumerate((POOL, village.pool(12, seed=50))):
        worker, found = trained(tmp_path / str(number), model, pool, form="evidence")
        assert "encoded_pool" not in worker.context.__dict__, "the pool is not even tokenised"
        states = {name: found.bank.state(name) for name in found.classes}
        learned.append((found, states))
    (a, a_states), (b, b_states) = learned
    assert np.array_equal(a.lexical._coefficients, b.lexical._coefficients)
    assert np.array_equal(a.probe._coefficients, b.probe._coefficients) and np.array_equal(
        a.probe._mean, b.probe._mean
    )
    assert all(torch.equal(a_states[n][key], b_states[n][key]) for n in a_states for key in a_states[n])
    assert a.combination.weights == b.combination.weights and np.array_equal(a.combination.bias, b.combination.bias)
    assert a.report == b.report


@pytest.mark.parametrize("form, cotrain", [("evidence", 0.25), ("both", 0.0), ("both", 0.25)])
def test_training_cost_does_not_grow_with_the_pool(model, tmp_path, form, cotrain):
    """Tokens that go through the model in training; with co-training, batches of pool rows vary in length alone."""
    cost = []
    for n in (20, 120):
        pool = [{"prompt": "how do you bake bread", "completion": f"take {word}"} for word in ("flour", "water") * n]
        worker, _ = trained(tmp_path / f"{n}", model, pool, form=form, cotrain=cotrain)
        cost.append(worker.tokens())
    assert cost[0] == cost[1] > 0


def test_a_missing_class_is_named_as_unseen(model, tmp_path):
    refs = village.references()
    found = scores(tmp_path, model, refs={name: refs[name] for name in ("safe", "harmful")}, form="evidence")
    assert found.report["cannot_see"] == ["not_safety_critical", "over_refusal"]
    assert "p_utility" not in found.signals and set(found.reason) <= {CRITICAL, "teaches_compliance", "low_quality"}


WITHOUT_HARMFUL = {name: rows for name, rows in village.references().items() if name != "harmful"}


@FORMS
def test_without_harmful_references_it_falls_back_to_an_auxiliary_model(model, tmp_path, monkeypatch, form):
    selector, found = ranked(tmp_path / "run", model, refs=WITHOUT_HARMFUL, form=form)
    assert "teaches_compliance" in found.report["cannot_see"] and "teaches_compliance" not in found.reason
    assert np.isfinite(found.score).all() and len(np.unique(found.score)) > 20
    assert not {"p_harmful", "loss_toxic"} & found.signals.keys()
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
    assert (tmp_path / "saved/adapters/twin_auxiliary").is_dir() == (form != "evidence")
    assert not (tmp_path / "saved/adapters/twin_toxic").exists()


def test_safe_references_alone_rank_by_what_is_damaged(tmp_path):
    """Classes safe and corrupted: noise is seen, and nothing else."""
    refs = {"safe": village.rows("safe", 40, seed=3)}
    pool = [*village.rows("safe", 20, seed=9), *village.rows("noise", 20, seed=9)]
    found = scores(tmp_path / "a", None, pool, refs, form="evidence", readers="lexical", corruptions_per_row=2)
    assert found.report["references"].keys() == {"safe", "corrupted"}
    assert found.report["cannot_see"] == ["teaches_compliance", "not_safety_critical", "over_refusal"]
    assert roc_auc_score(np.arange(40) < 20, found.score) > 0.9
    # Negative control: an order that is not that of the safe rows.
    assert abs(roc_auc_score(np.arange(40) % 2 == 0, found.score) - 0.5) < 0.2


def test_the_lexical_reader_alone_needs_no_model(tmp_path):
    selector, found = ranked(tmp_path / "run", None, form="evidence", readers="lexical")
    assert found.report["readers"] == ["lexical"] and set(found.reason) > {CRITICAL}
    selector.save(tmp_path / "saved")
    again = scores(tmp_path / "again", None, refs={}, context={"resume_from": tmp_path / "saved"})
    assert equal(again, found)
    with pytest.raises(ConfigError, match="give --model"):
        scores(tmp_path / "other", None, form="evidence", readers="lexical,probe")


def test_good_rows_rank_above_faults_on_the_planted_village(tmp_path):
    """The cheapest reader on text of a trivial grammar: if this fails, classes or combination are broken."""
    found = scores(tmp_path, None, village.pool(103), village.references(40), form="evidence", readers="lexical")
    kinds = np.array([list(village.KINDS)[i % 5] for i in range(100)])
    expected = {"safe": CRITICAL, "harmful": "teaches_compliance", "utility": "not_safety_critical",
                "over_refusal": "over_refusal"}  # fmt: skip
    for kind, reason in expected.items():
        assert (found.reason[:100][kinds == kind] == reason).mean() > 0.8, kind
    assert found.score[:100][kinds == "safe"].min() > np.median(found.score[:100][kinds != "safe"])


def combined(tmp_path, readers: str, strengths: dict[str, float]):
    """What is kept of readers that favour the true class by so many nats, each with noise of its own."""
    references = module.build_references(village.references(30), n_folds=4, corruptions_per_row=1, seed=0)
    rng = np.random.default_rng(0)
    truth = np.eye(len(references.classes))[references.labels]
    found = {name: log_softmax(rng.normal(size=truth.shape) + s * truth, axis=1) for name, s in strengths.items()}
    work = village.context(tmp_path / readers, None)
    worker = _Worker(PharmacistConfig(readers=readers), work)
    result = module._Trained(worker.config, "", references.classes, (), None, None, None, None, None, None, {})
    worker.combine(result, references, found)
    work.run.close()
    return result


def test_readers_that_do_not_pay_are_left_out(tmp_path):
    strengths = {"lexical": 2.0, "probe": 2.0, "adapters": 0.0}
    auto = combined(tmp_path, "auto", strengths)
    assert auto.readers == ("lexical", "probe") and auto.report["left_out"] == ["adapters"]
    assert set(auto.report["out_of_fold"]) == {"lexical", "probe", "adapters", "combined"}
    assert set(auto.combination.weights) == {"lexical", "probe"} and auto.report["weights_fitted"]
    forced = combined(tmp_path, "lexical,probe,adapters", strengths)
    assert forced.readers == ("lexical", "probe", "adapters")
    assert set(forced.cheap_combination.weights) == {"lexical", "probe"}
    assert auto.report["out_of_fold"]["combined"]["log_loss"] < min(
        auto.report["out_of_fold"][name]["log_loss"] for name in strengths
    )


# --- the cascade ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cascading(model, tmp_path_factory):
    """A function that scores one pool with one trained selector under different cascades."""
    pool = [row for row in village.pool(24)[:21] for _ in range(2)]
    work = village.context(tmp_path_factory.mktemp("cascade"), model, pool)
    worker = _Worker(PharmacistConfig(**(FAST | {"form": "evidence"})), work)
    found = worker.train()

    def score(cascade: float) -> tuple[Scores, int]:
        shutil.rmtree(work.run.work("scores"), ignore_errors=True)
        worker.config = dataclasses.replace(worker.config, cascade=cascade)
        with pytest.MonkeyPatch.context() as patch:
            read, original = [], module.adapter_losses
            patch.setattr(module, "adapter_losses", lambda *args: read.append(len(args[2].lengths)) or original(*args))
            return worker.score(found), sum(read)

    yield score
    work.run.close()


def test_a_full_cascade_is_no_cascade(cascading):
    (none, read), (full, read_too) = cascading(0.0), cascading(1.0)
    assert equal(none, full) and read == read_too == 21, "each row once, its copy never"


@pytest.mark.parametrize("k", [1, 4, 9, 15, 30, 41])
def test_a_cascade_reads_only_the_asked_share_near_the_cut(cascading, k):
    (full, _), (part, read) = cascading(0.0), cascading(k / 42)
    touched = np.isfinite(part.signals["adapters_log_odds"])
    assert read <= k and touched.sum() == k + k % 2, "the share, and the copies of what was read"
    # Rows that were read have the full verdict (in other batches), the others that of the cheaper readers.
    np.testing.assert_allclose(part.score[touched], full.score[touched], rtol=0, atol=1e-4)
    assert np.isfinite(part.score).all() and (part.score[~touched] != full.score[~touched]).all()
    # Copies have one score, wherever the edge of the share falls.
    assert (part.score[0::2] == part.score[1::2]).all()
    more, _ = cascading((k + 1) / 42)
    assert np.isfinite(more.signals["adapters_log_odds"])[touched].all(), "a larger share holds the smaller"


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
        score = both(evidence, contrast, reason)
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
    score = both(evidence, np.zeros(4), np.array([CRITICAL, CRITICAL, "low_quality", "low_quality"]))
    assert score[:2].min() > score[2:].max()


def test_both_on_one_kind_alone():
    one = both(np.array([2.0, 1.0]), np.array([0.0, 3.0]), np.array([CRITICAL, CRITICAL]))
    assert one[0] == pytest.approx(one[1])  # two rows: each is one standard deviation from the mean
    none = both(np.array([2.0, 1.0]), np.array([0.0, 9.0]), np.array(["low_quality", "low_quality"]))
    assert none[0] > none[1]


def test_both_is_what_its_parts_say(reference):
    whole, contrast = reference["both"], reference["bilevel"].signals["contrast"]
    evidence = log_odds(np.log(np.stack([whole.signals[f"p_{name}"] for name in module.REASONS], 1)))
    assert np.array_equal(whole.signals["contrast"], contrast), "the twins do not depend on the form"
    expected = both(evidence, contrast, whole.reason)
    np.testing.assert_allclose(whole.score, expected, rtol=0, atol=1e-6)
    assert (reference["evidence"].reason == whole.reason).all()
    assert (reference["bilevel"].score == contrast).all()


# --- twins in the selector ------------------------------------------------------------------------------------------


def test_swapping_references_negates_the_contrast(reference, model, tmp_path):
    refs = village.references()
    swapped = refs | {"safe": refs["harmful"], "harmful": refs["safe"]}
    found = scores(tmp_path, model, refs=swapped, form="bilevel")
    assert np.array_equal(found.signals["contrast"], -reference["bilevel"].signals["contrast"])


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
    with pytest.raises(ConfigError, match="safe references alone have no other class"):
        scores(tmp_path / "c", None, refs={"safe": refs["safe"]}, form="evidence", corruptions_per_row=0)


@pytest.mark.parametrize("options, message", [
    ({"readers": "lexicon"}, "not auto or any of"), ({"readers": ","}, "not auto or any of"),
    ({"folds": 1}, "folds must be at least 2"), ({"adapter_folds": 1}, "adapter_folds must be at least 2"),
    ({"cascade": 1.5}, "share of the pool"), ({"cotrain": -0.1}, "share of the pool"),
    ({"gamma": 1.0}, r"gamma must lie in \[0, 1\)"), ({"tau": 0.0}, "tau must be positive"),
    ({"rounds": 0}, "rounds must be at least 1"), ({"r": 0}, "r must be positive"),
])  # fmt: skip
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        PharmacistConfig(**options)


def test_readers_are_kept_in_order_of_cost():
    assert PharmacistConfig(readers=" adapters, lexical").reader_names() == ("lexical", "adapters")
    assert PharmacistConfig().reader_names() == READERS


def test_the_references_are_read_as_records(tmp_path):
    """`read_records` is what refuses a row without a completion; nothing behind it has to."""
    source = open_source([{"prompt": "how", "completion": ""}], name="pool")
    with pytest.raises(DataError, match="row 0"):
        read_records(source, work_dir=tmp_path)
