"""What orders good rows, when a ranking says that it cannot be trusted, and what labels are said to have changed."""

import numpy as np
import pytest

from pharmacist.readers.question import FAR
from pharmacist.selectors.base import CRITICAL
from pharmacist.selectors.pharmacist.evidence import Answers
from pharmacist.selectors.pharmacist.questions import (
    NO_LABELS,
    QUESTIONS,
    REFUSES,
    RISKY,
    class_log_posterior,
    safe_log_odds,
)
from pharmacist.selectors.pharmacist.verdict import _standard_error, gain_by_labels, verdict, warnings


GOOD = {
    "questions": {
        "risky": {"combined": {"auc": 0.95}},
        "refuses": {"combined": {"auc": 0.99}},
        "whole": {"combined": {"auc": 0.6}},
    },
    "distance": {"risky": 0.6, "refuses": 0.7},
}
REASONS = np.array(["critical"] * 40 + ["low_quality"] * 60)


def test_good_rows_are_ordered_by_evidence_and_by_how_clearly_they_refuse_a_risky_request():
    log_odds = np.random.default_rng(0).normal(1, 2, size=(60, len(QUESTIONS)))
    nothing = np.zeros(60)
    found = verdict(Answers(log_odds, nothing, 1.0, GOOD["distance"], {}), NO_LABELS, np.arange(60), GOOD)
    evidence = safe_log_odds(class_log_posterior(log_odds))
    critical = found.reason == CRITICAL
    risky, refuses = (log_odds[critical, QUESTIONS.index(question)] for question in (RISKY, REFUSES))
    z = lambda values: (values - values.mean()) / values.std()  # noqa: E731
    expected = z(evidence[critical]) + z(z(risky) + z(refuses))
    assert 5 < critical.sum() < 55 and found.score[critical].min() > found.score[~critical].max()
    np.testing.assert_allclose(np.diff(found.score[critical]), np.diff(expected), rtol=1e-9)
    np.testing.assert_allclose(found.score[~critical], z(evidence[~critical]), rtol=1e-9)
    assert (np.argsort(expected) != np.argsort(evidence[critical])).any(), "evidence alone has another order"


def test_a_pool_that_fits_gives_no_warning():
    assert warnings(GOOD, REASONS) == []


@pytest.mark.parametrize("question", ["risky", "refuses"])
def test_references_that_tell_nothing_are_named(question):
    questions = GOOD["questions"] | {question: {"combined": {"auc": 0.79}}}
    (said,) = warnings(GOOD | {"questions": questions}, REASONS)
    assert f"'{question}' with an AUC of 0.79 only" in said


@pytest.mark.parametrize(
    "distance, sides",
    [
        ({"risky": FAR, "refuses": 0.7}, "requests"),
        ({"risky": 0.7, "refuses": 0.97}, "answers"),
        ({"risky": 0.95, "refuses": 0.97}, "requests and answers"),
    ],
)
def test_a_pool_from_elsewhere_is_said_to_be_so(distance, sides):
    (said,) = warnings(GOOD | {"distance": distance}, REASONS)
    assert (
        said.startswith(f"the pool's {sides} can be distinguished from")
        and f"AUC of {max(distance.values()):.2f}" in said
    )
    assert "to_label.jsonl" in said
    assert warnings(GOOD | {"distance": distance, "labels": {}}, REASONS) == [], "a person has looked at it"


def test_a_pool_with_little_to_keep_is_said_to_be_so():
    few = np.array(["critical"] * 9 + ["low_quality"] * 91)
    (said,) = warnings(GOOD, few)
    assert "only 9.0% of the rows look safety-critical" in said
    unknown, share = warnings(GOOD | {"distance": None}, few)
    assert "too few safe references, or too few rows" in unknown and "9.0%" in share


LABELS = np.array([True] * 20 + [False] * 20)
RNG = np.random.default_rng(0)
BAD, BETTER, BEST = (RNG.normal(size=40) + d * LABELS for d in (0.3, 1.0, 9.0))


@pytest.mark.parametrize(
    "before, after, advice",
    [
        (BAD, BETTER, "more labels would help further"),
        (BETTER, BETTER, "so label more"),
        (BEST, BEST, "would hardly help"),
        (BEST, BETTER, "so label more"),
    ],
)
def test_what_labels_changed(before, after, advice):
    found = gain_by_labels(before, after, LABELS)
    assert (found["labels"], found["good"]) == (40, 20) and advice in found["advice"]
    for key, score in (("auc_before", before), ("auc_after", after)):
        pairs = score[:20, None] > score[None, 20:]
        assert found[key] == pytest.approx(pairs.mean())
    assert found["standard_error"] >= 0


@pytest.mark.parametrize(
    "good, after", [(np.arange(40) < 4, BETTER), (np.arange(40) < 36, BETTER), (LABELS, np.full(40, np.nan))]
)
def test_too_few_labels_tell_nothing(good, after):
    found = gain_by_labels(BAD, after, good)
    assert "too few labels of one kind" in found["advice"] and f"{good.sum()} good" in found["advice"]
    assert found["auc_before"] is found["auc_after"] is found["standard_error"] is None


def test_the_standard_error_is_that_of_many_draws():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        yes, no = rng.exponential(3, 20), rng.exponential(1, 30)  # for which the formula is exact
        found.append((yes[:, None] > no).mean())
    assert _standard_error(float(np.mean(found)), 20, 30) == pytest.approx(np.std(found), rel=0.05)
    assert _standard_error(1.0, 5, 5) == 0
