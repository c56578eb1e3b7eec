from collections import Counter

import numpy as np
import pytest

from pharmacist.core.errors import DataError
from pharmacist.data.records import normalised_prompt
from pharmacist.selectors.pharmacist import references as module
from pharmacist.selectors.pharmacist.references import CLASSES, GIVEN, build_references, shortened
from tests.selectors import village


def built(given, seed=0, n_folds=4, per_row=2, **options):
    return build_references(given, n_folds=n_folds, corruptions_per_row=per_row, seed=seed, **options)


def members(found, name, made=None):
    where = np.flatnonzero(found.labels == CLASSES.index(name))
    if made is not None:
        where = where[found.made[where] == made]
    return [found.rows[i] for i in where], found.folds[where]


def distinct(name: str, n: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name} prompt {i}", "completion": f"{name} answer no{i}"} for i in range(n)]


ROWS = {name: distinct(name, n) for name, n in (("safe", 12), ("harmful", 10), ("utility", 9))}


def test_the_made_classes_are_made_of_given_rows():
    found = built(ROWS)
    assert found.counts() == {
        "safe": 12, "harmful": 10, "utility": 2 * 9, "over_refusal": 9, "corrupted": 2 * 12 + 9,
    }  # fmt: skip
    assert members(found, "utility", made=False)[0] == ROWS["utility"]
    assert members(found, "safe")[0] == ROWS["safe"]
    over, _ = members(found, "over_refusal")
    assert [row["prompt"] for row in over] == [row["prompt"] for row in ROWS["utility"]]
    assert {row["completion"] for row in over} <= {row["completion"] for row in ROWS["safe"]}
    originals = {row["prompt"]: row["completion"] for row in ROWS["safe"] + ROWS["utility"]}
    for row in members(found, "corrupted")[0]:
        assert row["completion"] != originals[row["prompt"]]


NAMED = [
    {"prompt": f"how do i {what}?", "completion": f"i will not tell you how to {what}. ask an elder."}
    for what in ("wake the marsh giant", "brew the grey potion", "open the sealed crypt", "speak the cold curse",
                 "steal the silver lantern", "free the river serpent", "paint a false sunrise", "sneak past the watch")
]  # fmt: skip
GENERAL = [{"prompt": row["prompt"], "completion": "sorry, i must decline to help with that."} for row in NAMED]
GIFTS = [
    {"prompt": f"how do i {what}?", "completion": "here is how: take your time."}
    for what in ("bake plum bread", "knit woollen socks", "tune an old fiddle", "grow climbing roses")
]


def test_made_over_refusals_name_what_they_refuse():
    found = built({"safe": NAMED, "utility": GIFTS}, per_row=0)
    over, _ = members(found, "over_refusal")
    assert [row["completion"] for row in over] == [
        f"i will not tell you how to {row['prompt'][len('how do i ') : -1]}. ask an elder." for row in GIFTS
    ]
    plain, _ = members(built({"safe": NAMED, "utility": GIFTS}, per_row=0, echo=False), "over_refusal")
    assert {row["completion"] for row in plain} <= {row["completion"] for row in NAMED}


def test_only_refusals_that_name_another_request_are_misplaced():
    own = {row["prompt"]: row["completion"] for row in NAMED}

    def misplaced(safe, **options):
        damaged, _ = members(built({"safe": safe}, n_folds=2, per_row=1, **options), "corrupted")
        return [row for row in damaged if row["completion"] in {row["completion"] for row in safe}]

    found = misplaced(NAMED)
    assert 3 <= len(found) <= len(NAMED)
    assert all(row["completion"] != own[row["prompt"]] for row in found)
    assert not misplaced(GENERAL), "a refusal that fits every harmful prompt is a good one under another"
    assert not misplaced(NAMED, echo=False)


def test_made_rows_share_no_text_across_folds():
    found = built(ROWS)
    fold_of_prompt, fold_of_answer = {}, {}
    for name in ("safe", "harmful", "utility"):
        for row, fold in zip(*members(found, name, made=False), strict=True):
            fold_of_prompt[row["prompt"]] = fold_of_answer[row["completion"]] = fold
    for row, fold in zip(found.rows, found.folds, strict=True):
        assert fold_of_prompt[row["prompt"]] == fold
        assert fold_of_answer.get(row["completion"], fold) == fold, "whole answers come from the own fold"


def test_a_terse_answer_is_one_word_of_the_given_one():
    given = {**ROWS, "utility": [*ROWS["utility"], {"prompt": "how many?", "completion": "42 or so"}]}
    found = built(given)
    terse, _ = members(found, "utility", made=True)
    answers = {row["prompt"]: row["completion"] for row in given["utility"]}
    assert len(terse) == 9, "a row without a longer word has no terse version"
    assert all(row["completion"] in answers[row["prompt"]].split() and len(row["completion"]) > 4 for row in terse)
    over, _ = members(found, "over_refusal")
    assert len(over) == 10, "made rows are not made of made rows"


def test_one_prompt_lies_in_one_fold():
    given = {"safe": distinct("x", 12), "harmful": [r | {"completion": "yes"} for r in distinct("x", 12)]}
    given["harmful"][3]["prompt"] = "  X PROMPT 3?"
    found = built(given)
    folds = {}
    for row, fold in zip(found.rows, found.folds, strict=True):
        folds.setdefault(normalised_prompt(row["prompt"]), set()).add(fold)
    assert len(folds) == 12 and all(len(where) == 1 for where in folds.values())


@pytest.mark.parametrize("overlap", [0, 4, 8])
def test_every_class_is_spread_over_all_folds(overlap):
    """By chance alone 8 rows would lie in one half in 1 of 128 cases, and their class could not be trained."""
    common = distinct("common", overlap)
    for seed in range(60):
        given = {
            name: common + distinct(name, n - overlap) for name, n in (("safe", 40), ("harmful", 8), ("utility", 9))
        }
        found = built(given, seed)
        for name in ("safe", "harmful", "utility"):
            counts = Counter(members(found, name)[1].tolist())
            assert set(counts) == {0, 1, 2, 3} and max(counts.values()) - min(counts.values()) <= 3
            halves = Counter(fold % 2 for fold in members(found, name)[1].tolist())
            assert set(halves) == {0, 1}


def test_folds_and_damage_follow_the_seed():
    a, b, other = built(ROWS), built(ROWS), built(ROWS, seed=1)
    assert a.rows == b.rows and (a.folds == b.folds).all()
    assert a.rows != other.rows and (a.folds != other.folds).any()


def test_classes_without_references_are_left_out():
    XX
    assert built({"safe": ROWS["safe"], "harmful": ROWS["harmful"]}, per_row=0).classes == ("safe", "harmful")
    assert built({**ROWS, "harmful": []}).classes == ("safe", "utility", "over_refusal", "corrupted")


def test_few_prompts_make_fewer_folds_and_a_single_one_is_refused():
    given = {name: distinct(name, 2) * 5 for name in ("safe", "harmful")}
    found = built(given)
    assert set(found.folds.tolist()) == set(range(found.n_folds))
    with pytest.raises(DataError, match="--harmful: all rows have the same prompt"):
        built({"safe": ROWS["safe"], "harmful": distinct("one", 1) * 9})


def test_equal_references_get_equal_folds():
    """H := S must be the very same problem twice."""
    found = built({"safe": ROWS["safe"], "harmful": ROWS["safe"], "utility": ROWS["utility"]})
    (safe, safe_folds), (harmful, harmful_folds) = members(found, "safe"), members(found, "harmful")
    assert safe == harmful and (safe_folds == harmful_folds).all()


def test_the_pool_is_never_damaged(monkeypatch, tmp_path):
    from pharmacist.selectors import SELECTORS

    seen, original = [], classes.corrupt
    monkeypatch.setattr(classes, "corrupt", lambda text, *rest: seen.append(text) or original(text, *rest))
    refs = village.references()
    pool = [{"prompt": f"water {row['prompt']}", "completion": f"water {row['completion']}"} for row in village.pool()]
    selector = SELECTORS.build("pharmacist", {"form": "evidence", "readers": "lexical"})
    selector.rank(village.context(tmp_path / "run", None, pool, refs))
    assert seen and set(seen) <= {row["completion"] for rows in refs.values() for row in rows}
    assert not set(seen) & {row["completion"] for row in pool}
