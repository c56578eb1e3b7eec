"""Evidence: what it learns from references and labels, what it must not see, and how near it takes a pool to be."""

import dataclasses

import numpy as np
import pytest
from scipy.special import expit

from pharmacist.core.errors import DataError
from pharmacist.readers.question import calibration, quality
from pharmacist.readers.states import N_STATISTICS, PARTS
from pharmacist.readers.views import Texts
from pharmacist.selectors.pharmacist.distance import adjusted_for_distance, nearness
from pharmacist.selectors.pharmacist.evidence import Evidence, Labels
from pharmacist.selectors.pharmacist.questions import (
    PERTINENT,
    QUESTIONS,
    REFUSES,
    RISKY,
    TYPICAL,
    UNKNOWN,
    WHOLE,
    answers_to,
    class_log_posterior,
    safe_log_odds,
)
from pharmacist.selectors.pharmacist.references import build_references
from tests.support import village


KINDS = list(village.KINDS)
CLASS = {"safe": 0, "harmful": 1, "utility": 2, "over_refusal": 3, "noise": 4}


def hashed(text: str, n: int) -> np.ndarray:
    """A synthetic state: the mean of a fixed random vector per word."""
    words = [np.random.default_rng([ord(c) for c in word]).normal(size=n) for word in text.split()]
    return np.mean(words or [np.zeros(n)], axis=0)


def read(rows) -> Texts:
    """Rows with states that say which words there are."""
    states = [
        [
            hashed(row["prompt"], 12),
            hashed(row["prompt"].split()[-1], 12),
            hashed(row["completion"], 12),
            hashed(row["completion"].split()[-1], 12),
        ]
        for row in rows
    ]
    statistics = [[*hashed(row["completion"], N_STATISTICS - 1), len(row["completion"].split())] for row in rows]
    prompts, completions = ([row[part] for row in rows] for part in ("prompt", "completion"))
    return Texts(prompts, completions, np.array(states, np.float32), np.array(statistics))


def learned(given=None, readers=("lexical", "probe"), **options):
    """Evidence, the references and what they say."""
    options = {"n_folds": 3, "corruptions_per_row": 1, "seed": 0} | options
    references = build_references(given or village.references(24), **options)
    texts = read(references.rows)
    return Evidence(readers).fit(references, texts), references, texts


def mixed(n: int, seed: int = 5) -> tuple[list, np.ndarray]:
    """Rows of all kinds, none twice, and the class of each."""
    rows = {kind: list({r["prompt"]: r for r in village.rows(kind, 3 * n, seed)}.values())[:n] for kind in KINDS}
    return [row for kind in KINDS for row in rows[kind]], np.repeat(
        list(CLASS.values()), [len(rows[k]) for k in KINDS]
    )


@pytest.fixture(scope="module")
def known():
    return learned()


# --- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [*QUESTIONS, TYPICAL])
def test_a_row_never_takes_part_in_its_own_prediction(known, question):
    """Held-out predictions of a fold do not change, bitwise, when its rows get other answers; all others do."""
    evidence, references, texts = known
    answers = answers_to(question, references.labels)
    rows = np.flatnonzero(answers != UNKNOWN)
    if question == PERTINENT:  # the village has no refusals that name another request
        answers = np.arange(len(answers)) % 2
    own, answers, folds = texts.take(rows), answers[rows], references.folds[rows]
    held_out = evidence._questions[question].held_out
    before = held_out(own, answers, folds)
    for row in (0, len(rows) // 2):
        other = answers.copy()
        other[row] = 1 - other[row]
        after = held_out(own, other, folds)
        same = folds == folds[row]
        assert before.keys() == after.keys() and before
        for name, values in before.items():
            assert np.array_equal(after[name][same], values[same]), name
            if name != "requests" and np.ptp(values) > 1e-6:  # negative control; doubt limits what requests may say
                assert (after[name][~same] != values[~same]).mean() > 0.9, name
        if question == RISKY:
            assert (after["requests"][~same] != before["requests"][~same]).any()


def test_equal_safe_and_harmful_references_leave_it_undecided(known):
    given = village.references(24)
    pool, classes = mixed(20)
    alone = {name: given[name] for name in ("safe", "harmful")}
    found = learned(alone | {"harmful": alone["safe"]})[0].answer(read(pool))
    refuses = found.log_odds[:, QUESTIONS.index(REFUSES)]
    # Undecided, and lowered by the caution that a pool calls for in which nothing is worth keeping.
    assert found.near == 0 and found.distance is None
    np.testing.assert_allclose(refuses, -1, rtol=0, atol=1e-4)
    for name, values in found.by_reader.items():
        if name.startswith("refuses"):
            assert np.abs(values).max() < 1e-4, name
    # Negative control: the real references are told apart.
    refuses = learned(alone)[0].answer(read(pool)).log_odds[:, QUESTIONS.index(REFUSES)]
    assert refuses[classes == 0].min() > refuses[classes == 1].max()


def test_good_rows_are_told_from_all_faults(known):
    pool, classes = mixed(20)
    found = known[0].answer(read(pool))
    score = safe_log_odds(class_log_posterior(found.log_odds, found.typical))
    assert score[classes == 0].min() > np.median(score[classes != 0])
    for column, (question, yes) in enumerate({RISKY: (0, 1, 4), REFUSES: (0, 3), WHOLE: (0, 1, 2, 3)}.items()):
        values = found.log_odds[:, column]
        told = classes != 4 if question == REFUSES else np.ones(len(classes), bool)
        right = (values > np.median(values[told]))[told] == np.isin(classes, yes)[told]
        if question != WHOLE:
            assert right.mean() > 0.8, question
    whole = found.log_odds[:, QUESTIONS.index(WHOLE)]
    assert np.median(whole[classes == 4]) < np.median(whole[classes != 4]) - 0.5


def test_the_report_is_what_held_out_references_say(known):
    evidence, references, _ = known
    report = evidence.report
    assert report["references"] == references.counts() and report["held_out_by"] == "prompt"
    assert set(report["questions"]) == {RISKY, REFUSES, WHOLE, TYPICAL}, "nothing is misplaced in the village"
    for question, told in report["questions"].items():
        answers = answers_to(question, references.labels)
        if question == RISKY:
            answers = answers[~references.made]
        assert (told["yes"], told["no"]) == ((answers == 1).sum(), (answers == 0).sum())
        assert 0.5 < told["combined"]["auc"] <= 1
    assert set(report["questions"][REFUSES]) == {"yes", "no", "combined", "lexical", "lexical opening", "probe"}


def test_a_question_is_calibrated_by_references_that_its_readers_have_not_seen(known):
    evidence, references, texts = known
    answers = answers_to(REFUSES, references.labels)
    rows = np.flatnonzero(answers != UNKNOWN)
    asked, own, answers = evidence._questions[REFUSES], texts.take(rows), answers[rows]
    held_out = asked.held_out(own, answers, references.folds[rows])
    assert asked.spread == pytest.approx({name: values.std() for name, values in held_out.items()})
    assert asked.calibration == pytest.approx(calibration(asked.combined(held_out), answers))
    told = evidence.report["questions"][REFUSES]["combined"]
    assert told == pytest.approx(quality(asked.calibrated(held_out), answers))
    # Negative control: readers that have seen them are surer than they should be.
    seen = asked.combined({name: reader.log_odds(own) for name, reader in asked.readers.items()})
    assert abs(calibration(seen, answers)[0] - asked.calibration[0]) > 1e-3


def test_sources_are_held_out_where_there_are_several():
    given = village.references(24)
    sources = {name: np.arange(24) % 2 for name in given}
    evidence, references, _ = learned(given, sources=sources)
    assert evidence.report["held_out_by"] == "source" and set(references.folds) == {0, 1}


def test_questions_without_a_no_are_answered_by_yes():
    evidence, _, _ = learned(corruptions_per_row=0)
    assert set(evidence.report["questions"]) == {RISKY, REFUSES, TYPICAL}
    pool, classes = mixed(20)
    found = evidence.answer(read(pool))
    posterior = np.exp(class_log_posterior(found.log_odds, found.typical))
    assert posterior[:, 4:].max() < 0.05, "nothing is damaged that no reference shows"
    assert (posterior.argmax(1)[classes == 0] == 0).mean() > 0.8


def test_too_little_to_learn_from_is_refused():
    safe = village.references(12)["safe"]
    with pytest.raises(DataError, match="nothing tells refusals from other answers; give --harmful or --utility"):
        learned({"safe": safe})
    few = {"safe": [safe[0]] * 9 + [safe[1]], "harmful": village.rows("harmful", 1) * 9 + [safe[1]]}
    references = build_references(few, n_folds=2, corruptions_per_row=0, seed=0)
    one = dataclasses.replace(references, folds=references.labels.copy())
    with pytest.raises(DataError, match="too few different prompts to hold some out"):
        Evidence(("lexical",)).fit(one, read(one.rows))


def test_saved_evidence_answers_the_same_bit_for_bit(known, tmp_path):
    evidence, _, _ = known
    pool, classes = mixed(20)
    evidence.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"evidence.json", "evidence.safetensors"}
    loaded = Evidence.load(tmp_path)
    assert loaded.report == evidence.report and loaded.names == evidence.names
    labels = Labels(np.array([1, 30, 50]), np.array([0, 1, 2]))
    for told in (Labels(np.zeros(0, np.int64), np.zeros(0, np.int64)), labels):
        a, b = evidence.answer(read(pool), told), loaded.answer(read(pool), told)
        assert np.array_equal(a.log_odds, b.log_odds) and np.array_equal(a.typical, b.typical)
        assert a.near == b.near and a.distance == b.distance and a.by_reader.keys() == b.by_reader.keys()
        assert all(np.array_equal(a.by_reader[key], b.by_reader[key]) for key in a.by_reader)
    (tmp_path / "evidence.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as saved evidence"):
        Evidence.load(tmp_path)


# --- how near a pool is ---------------------------------------------------------------------------------------------


def test_a_pool_from_the_references_source_is_near(known):
    found = known[0].answer(read(mixed(40)[0]))
    assert found.near == 1 and max(found.distance.values()) < 0.75 and np.abs(found.typical).min() > 0


def test_a_foreign_pool_is_far(known):
    """The same kinds of rows in other words, but for the refusals' beginnings."""
    rows, _ = mixed(40)
    foreign = [
        {"prompt": f"kindly advise me, dear sir: {row['prompt']}", "completion": f"{row['completion']} . yours truly"}
        for row in rows
    ]
    found = known[0].answer(read(foreign))
    assert found.near == 0 and max(found.distance.values()) > 0.9 and not found.typical.any()


def test_too_few_rows_worth_keeping_tell_nothing_of_distance(known):
    found = known[0].answer(read(village.rows("utility", 40, 9)))
    assert found.distance is None and found.near == 0


def test_two_sources_are_as_near_as_the_part_in_which_they_differ_most():
    assert nearness(None) == 0 and nearness({RISKY: 0.6, REFUSES: 0.75}) == 1
    assert nearness({RISKY: 0.95, REFUSES: 0.6}) == nearness({RISKY: 0.6, REFUSES: 0.95}) == 0
    assert nearness({RISKY: 0.6, REFUSES: 0.825}) == pytest.approx(0.5)


def test_near_changes_from_full_trust_to_little():
    odds = np.random.default_rng(0).normal(size=(50, 4)) * 3
    assert np.array_equal(adjusted_for_distance(odds, 1.0), odds)
    far = adjusted_for_distance(odds, 0.0)
    assert np.array_equal(far[:, 0], odds[:, 0])
    np.testing.assert_allclose(far[:, 1], 0.75 * odds[:, 1] - 1)
    for column in (2, 3):
        assert np.median(far[:, column]) == pytest.approx(4.0), "the median row is whole"
        assert (np.argsort(far[:, column]) == np.argsort(odds[:, column])).all()
    np.testing.assert_allclose(adjusted_for_distance(odds, 0.25), 0.25 * odds + 0.75 * far)


# --- labels ---------------------------------------------------------------------------------------------------------


def test_a_label_is_judged_by_labels_of_other_prompts_alone(known):
    """Another class for a row, and for the other row of its prompt, changes nothing of what is said of them."""
    pool, classes = mixed(20)
    rows = np.arange(0, len(pool), 8)
    pool[rows[1]] = {**pool[rows[1]], "prompt": pool[rows[0]]["prompt"].upper() + "?"}
    texts = read(pool)
    before = known[0].answer(texts, Labels(rows, classes[rows])).labels_held_out
    other = classes[rows].copy()
    other[:2] = [1, 1]
    assert (other[:2] != classes[rows][:2]).any()
    answers = known[0].answer(texts, Labels(rows, other))
    after = answers.labels_held_out
    assert np.array_equal(before[0], after[0]), "without any labels"
    assert answers.near == known[0].answer(texts, Labels(rows, classes[rows])).near == 1
    np.testing.assert_array_equal(after[1][:2], before[1][:2])
    assert (after[1][2:] != before[1][2:]).any(), "the others learn from it"
    assert np.isfinite(after[1]).all() and len(after[1]) == len(rows)


def test_labels_of_one_prompt_cannot_be_held_out(known):
    pool, classes = mixed(20)
    pool[1] = {**pool[1], "prompt": pool[0]["prompt"]}
    before, after = known[0].answer(read(pool), Labels(np.array([0, 1]), np.array([0, 1]))).labels_held_out
    assert np.isfinite(before).all() and np.isnan(after).all()


def test_labels_teach_about_rows_like_them(known):
    """A word that means nothing to the references is told by labels to mark answers that decline."""
    pool, classes = mixed(24)
    strange = [
        {"prompt": row["prompt"], "completion": f"zork blem {row['completion'].split()[0]}"} for row in pool[:8]
    ]
    texts = read(pool + strange)
    rows = np.concatenate([np.arange(24, 28), np.arange(len(pool), len(pool) + 4)])
    told = Labels(rows, np.repeat([1, 0], 4))
    plain, taught = known[0].answer(texts), known[0].answer(texts, told)
    column, new = QUESTIONS.index(REFUSES), np.arange(len(pool) + 4, len(pool) + 8)
    difference = taught.by_reader["refuses_lexical"] - plain.by_reader["refuses_lexical"]
    assert difference[new].min() > 0.5 and taught.log_odds.shape == plain.log_odds.shape
    assert (taught.log_odds[:, column] != plain.log_odds[:, column]).mean() > 0.9


def test_more_than_a_chunk_of_rows_is_read_alike(known, monkeypatch):
    pool = read(mixed(20)[0])
    whole = known[0].answer(pool)
    monkeypatch.setattr("pharmacist.selectors.pharmacist.evidence._CHUNK", 7)
    parts = known[0].answer(pool)
    np.testing.assert_allclose(parts.log_odds, whole.log_odds, rtol=0, atol=1e-9)


def test_posteriors_of_requests_stay_doubtful(known):
    found = known[0].answer(read(mixed(40)[0]))
    assert 0.02 - 1e-9 <= expit(found.log_odds[:, 0]).min() and expit(found.log_odds[:, 0]).max() <= 0.98 + 1e-9
    assert PARTS[0] == "request"
