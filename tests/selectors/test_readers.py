"""Views of a row, the logistic regression on them, and their way through JSON and safetensors."""

import json

import numpy as np
import pytest
import scipy.sparse
from safetensors.numpy import load, save
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from pharmacist.readers.states import N_STATISTICS, PARTS
from pharmacist.readers.views import OPENING_WORDS, Joined, Reader, States, Texts, Words, fit_logistic, into_row_space
from pharmacist.selectors.pharmacist.echo import Echo
from tests.support import village


# A regression's optimum is found to about the square root of float64's precision, differently on each machine.
OPTIMUM = 1e-6


def texts(rows, seed: int = 0) -> Texts:
    """Rows with synthetic states."""
    rng = np.random.default_rng(seed)
    return Texts(
        [row["prompt"] for row in rows],
        [row["completion"] for row in rows],
        rng.normal(size=(len(rows), len(PARTS), 6)).astype(np.float32),
        rng.normal(size=(len(rows), N_STATISTICS)),
    )


SAFE, HARMFUL = village.rows("safe", 14), village.rows("harmful", 10)
KNOWN, ANSWERS = texts(SAFE + HARMFUL), np.repeat([1, 0], [14, 10])
WEIGHTS = np.random.default_rng(2).uniform(0.5, 3, 24)
POOL = texts(village.pool(24), seed=1)
VIEWS = {
    "words": lambda: Words("completions"),
    "opening": lambda: Words("completions", opening=True),
    "prompts": lambda: Words("prompts"),
    "echo": Echo,
    "states": lambda: States(("answer", "answer_end")),
    "statistics": lambda: States(PARTS, statistics=True),
    "joined": lambda: Joined(Words("prompts"), Words("completions"), Echo()),
}
EACH = pytest.mark.parametrize("view", VIEWS)


def dense(features) -> np.ndarray:
    return features.toarray() if scipy.sparse.issparse(features) else features


def test_texts_are_taken_and_joined_row_by_row():
    order = np.array([5, 0, 23])
    both = KNOWN.take(order) + POOL
    assert len(both) == 27 and both.prompts[:3] == [KNOWN.prompts[i] for i in order]
    assert np.array_equal(both.states[:3], KNOWN.states[order]) and np.array_equal(
        both.statistics[3:], POOL.statistics
    )
    assert (KNOWN + Texts(["a"], ["b"])).states is None, "states of some rows are none"


# --- the regression -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regularisation", [0.01, 100.0])
@pytest.mark.parametrize("width", [12, 150])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_logistic_regression_is_exact(regularisation, width, sparse, recwarn):
    """The gradient of the balanced, weighted, penalised likelihood, written from its definition, is zero."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        answers = np.repeat([0, 1], [45, 15])
        features = rng.normal(size=(60, width)) * rng.uniform(0.1, 3, width) + answers[:, None]
        weights = rng.uniform(0.5, 3, 60)
        w, b = fit_logistic(
            scipy.sparse.csr_matrix(features) if sparse else features, answers, weights, regularisation
        )
        share = weights / np.where(answers == 1, weights[answers == 1].sum(), weights[answers == 0].sum()) * 30
        residual = share * (expit(features @ w + b) - answers)
        assert np.abs(residual @ features + w / regularisation).max() < 1e-7 * 60 and abs(residual.sum()) < 1e-7 * 60
    assert not recwarn.list


def test_both_answers_weigh_the_same_whatever_their_number():
    features = dense(Words("completions").fit(KNOWN).features(KNOWN))
    once = fit_logistic(features, ANSWERS, np.ones(24), 5.0)
    more = np.concatenate([features, np.repeat(features[ANSWERS == 0], 4, axis=0)])
    often = fit_logistic(more, np.concatenate([ANSWERS, np.zeros(40, int)]), np.ones(64), 5.0 * 24 / 64)
    np.testing.assert_allclose(often[0], once[0], rtol=0, atol=OPTIMUM)
    assert often[1] == pytest.approx(once[1], abs=OPTIMUM)
    nothing = fit_logistic(np.zeros((24, 3)), ANSWERS, WEIGHTS, 5.0)
    assert np.abs(nothing[0]).max() < OPTIMUM and abs(nothing[1]) < OPTIMUM, "equal odds, not those of 14 to 10"


@EACH
def test_swapped_answers_negate_the_log_odds(view):
    forth = Reader(VIEWS[view]()).fit(KNOWN, ANSWERS).log_odds(POOL)
    back = Reader(VIEWS[view]()).fit(KNOWN, 1 - ANSWERS).log_odds(POOL)
    np.testing.assert_allclose(back, -forth, rtol=0, atol=OPTIMUM)
    assert np.ptp(forth) > 100 * OPTIMUM


@EACH
def test_equal_rows_under_both_answers_leave_a_reader_undecided(view):
    both = KNOWN + KNOWN
    answers = np.repeat([1, 0], 24)
    found = Reader(VIEWS[view]()).fit(both, answers).log_odds(POOL)
    assert np.abs(found).max() < OPTIMUM
    answers[0] = 0  # negative control
    assert np.abs(Reader(VIEWS[view]()).fit(both, answers).log_odds(POOL)).max() > 100 * OPTIMUM


@pytest.mark.parametrize("sparse", [False, True])
def test_the_row_space_gives_the_plain_regression(sparse):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, 70))
    features[5] = features[6]  # fewer dimensions than rows
    rotated, back = into_row_space(scipy.sparse.csr_matrix(features) if sparse else features)
    assert rotated.shape == (20, 19)
    np.testing.assert_allclose(rotated @ rotated.T, features @ features.T, rtol=0, atol=1e-9)
    answers = np.arange(20) % 2
    plain = LogisticRegression(C=0.3, solver="newton-cg", tol=1e-12, max_iter=1000).fit(features, answers)
    inside = LogisticRegression(C=0.3, solver="newton-cg", tol=1e-12, max_iter=1000).fit(rotated, answers)
    np.testing.assert_allclose(back(inside.coef_[0]), plain.coef_[0], rtol=0, atol=OPTIMUM)
    few = rng.normal(size=(20, 4))
    assert into_row_space(few)[0] is few


# --- views ----------------------------------------------------------------------------------------------------------


@EACH
def test_a_saved_reader_reads_the_same_bit_for_bit(view):
    reader = Reader(VIEWS[view]()).fit(KNOWN, ANSWERS)
    tensors, content = reader.state()
    tensors = load(save({key: np.ascontiguousarray(value) for key, value in tensors.items()}))
    loaded = Reader(VIEWS[view]()).load(tensors, json.loads(json.dumps(content)))
    assert np.array_equal(loaded.log_odds(POOL), reader.log_odds(POOL))
    assert np.array_equal(dense(loaded.features(POOL)), dense(reader.features(POOL)))


@EACH
def test_each_row_is_read_by_itself(view):
    reader = Reader(VIEWS[view]()).fit(KNOWN, ANSWERS)
    together = dense(reader.features(POOL))
    for i in range(len(POOL)):
        assert np.array_equal(dense(reader.features(POOL.take(np.array([i]))))[0], together[i])


@pytest.mark.parametrize("view", ["words", "opening", "echo", "joined"])
def test_words_never_seen_are_no_error(view):
    reader = Reader(VIEWS[view]()).fit(KNOWN, ANSWERS)
    assert np.isfinite(reader.log_odds(Texts(["zzz", "…"], ["qqq", "日本"]))).all()


def test_words_read_one_side_and_an_opening_its_beginning():
    start = " ".join(f"w{i}" for i in range(OPENING_WORDS))
    known = Texts(["a b", "b c"], [f"{start} late words", "w0 w1"])
    row, other = Texts(["a b"], [f"{start} late words"]), Texts(["c c"], [f"{start} never mind"])
    same = lambda view: (view.fit(known).features(row) != view.features(other)).nnz == 0  # noqa: E731
    assert same(Words("completions", opening=True)) and not same(Words("completions"))
    assert not same(Words("prompts"))
    only = Texts(["x y z"], row.completions)
    view = Words("completions").fit(known)
    assert (view.features(only) != view.features(row)).nnz == 0, "the prompt says nothing"


def test_states_are_standardised_and_statistics_have_a_quarter():
    view = States(("answer",), statistics=True).fit(KNOWN)
    found = view.features(KNOWN)
    assert found.shape == (24, 6 + N_STATISTICS)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-9)
    variance = found.var(0)
    np.testing.assert_allclose(variance, np.repeat([0.75 / 6, 0.25 / N_STATISTICS], [6, N_STATISTICS]), rtol=1e-6)
    raw = KNOWN.states[:, PARTS.index("answer")].astype(np.float64)
    np.testing.assert_allclose(np.corrcoef(found[:, 0], raw[:, 0])[0, 1], 1, rtol=1e-9)
    constant = Texts(["a"] * 3, ["b"] * 3, np.ones((3, 4, 6), np.float32), np.ones((3, N_STATISTICS)))
    assert not States(PARTS, statistics=True).fit(constant).features(constant).any()


def test_joined_views_lie_side_by_side():
    parts = [Words("prompts").fit(KNOWN), Echo().fit(KNOWN)]
    found = dense(Joined(Words("prompts"), Echo()).fit(KNOWN).features(POOL))
    assert np.array_equal(found, np.concatenate([dense(part.features(POOL)) for part in parts], axis=1))
