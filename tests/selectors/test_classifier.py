"""The plain text classifier: a peer that must be a fair one."""

import numpy as np
import pytest

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.selectors.classifier import ClassifierConfig
from tests.support import village
from tests.support.peers import ranked


KINDS = list(village.KINDS)
POOL = village.pool(43)
KIND = np.array([KINDS[i % len(KINDS)] for i in range(40)] + KINDS[:3])
REASON = {
    "safe": "critical",
    "harmful": "teaches_compliance",
    "utility": "not_safety_critical",
    "over_refusal": "over_refusal",
    "noise": "low_quality",
}


def test_it_tells_the_classes_apart(tmp_path):
    found = ranked(tmp_path, {"name": "classifier"}, POOL, village.references(24))
    safe = KIND == "safe"
    assert found.score[safe].min() > found.score[~safe].max()
    right = found.reason == np.array([REASON[kind] for kind in KIND])
    assert right.mean() > 0.9 and right[safe].all()
    np.testing.assert_allclose(sum(found.signals.values()), 1, rtol=1e-12)
    np.testing.assert_allclose(
        found.score, np.log(found.signals["p_safe"]) - np.log1p(-found.signals["p_safe"]), rtol=1e-6
    )
    assert found.report["questions"]["safe"]["combined"]["auc"] > 0.95


def test_references_without_a_difference_teach_nothing(tmp_path):
    refs = village.references(24) | {"harmful": village.rows("safe", 24, seed=9)}
    refs["safe"] = village.rows("safe", 24, seed=8)
    found = ranked(tmp_path, {"name": "classifier", "corruptions_per_row": 0}, POOL, refs)
    assert found.report["questions"]["safe"]["combined"]["auc"] < 0.9


def test_the_pool_teaches_it_nothing(tmp_path):
    whole = ranked(tmp_path / "a", {"name": "classifier"}, POOL)
    part = ranked(tmp_path / "b", {"name": "classifier"}, POOL[:9])
    np.testing.assert_allclose(part.score, whole.score[:9], rtol=1e-12)


def test_what_it_cannot_see_is_said(tmp_path):
    refs = {name: village.references()[name] for name in ("safe", "harmful")}
    found = ranked(tmp_path, {"name": "classifier"}, POOL, refs)
    assert found.report["cannot_see"] == ["not_safety_critical", "over_refusal"]


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(DataError, match="--harmful: 3 rows are left, at least 8 are needed"):
        ranked(tmp_path, {"name": "classifier"}, POOL, village.references() | {"harmful": village.rows("harmful", 3)})
    with pytest.raises(ConfigError, match="folds must be at least 2"):
        ClassifierConfig(folds=1)
    with pytest.raises(ConfigError, match="corruptions_per_row must not be negative"):
        ClassifierConfig(corruptions_per_row=-1)
