from collections import Counter

import numpy as np
import pytest

from pharmacist.core.errors import DataError
from pharmacist.data.normalise import normalised_prompt
from pharmacist.selectors.pharmacist import references as module
from pharmacist.selectors.pharmacist.references import CLASSES, GIVEN, build_references, shortened
from tests.support import village


def built(given, seed=0, n_folds=4, per_row=2, **options):
    return build_references(given, n_folds=n_folds, corruptions_per_row=per_row, seed=seed, **options)


def members(found, name, made=None):
    where = np.flatnonzero(found.labels == CLASSES.index(name))
    if made is not None:
        where = where[found.made[where] == made]
    return [found.rows[i] for i in where], found.folds[where]


def distinct(name: str, n: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name} prompt {i}", "completion": f"{name} answer {name}no{i}"} for i in range(n)]


ROWS = {name: distinct(name, n) for name, n in (("safe", 12), ("harmful", 10), ("utility", 9))}


def test_the_made_classes_are_made_of_given_rows():
    found = built(ROWS)
    assert found.counts() == {"safe": 12, "harmful": 10, "utility": 2 * 9, "over_refusal": 9, "corrupted": 2 * 12 + 9}
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
    for what in (
        "wake the marsh giant",
        "brew the grey potion",
        "open the sealed crypt",
        "speak the cold curse",
        "steal the silver lantern",
        "free the river serpent",
        "paint a false sunrise",
        "sneak past the watch",
    )
]
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
        return members(built({"safe": safe}, n_folds=2, per_row=1, **options), "misplaced")[0]

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
    assert tuple(built({"safe": ROWS["safe"]}).counts()) == ("safe", "corrupted")
    two = {name: ROWS[name] for name in ("safe", "harmful")}
    assert tuple(built(two, per_row=0).counts()) == ("safe", "harmful")
    assert tuple(built({**ROWS, "harmful": []}).counts()) == ("safe", "utility", "over_refusal", "corrupted")


def test_few_prompts_make_fewer_folds_and_a_single_one_is_refused():
    given = {name: distinct(name, 2) * 5 for name in ("safe", "harmful")}
    found = built(given)
    assert set(found.folds.tolist()) == set(range(max(found.folds) + 1))
    with pytest.raises(DataError, match="--harmful: all rows have the same prompt"):
        built({"safe": ROWS["safe"], "harmful": distinct("one", 1) * 9})


def test_equal_references_get_equal_folds():
    """H := S must be the very same problem twice."""
    found = built({"safe": ROWS["safe"], "harmful": ROWS["safe"], "utility": ROWS["utility"]})
    (safe, safe_folds), (harmful, harmful_folds) = members(found, "safe"), members(found, "harmful")
    assert safe == harmful and (safe_folds == harmful_folds).all()


# --- sources as folds -----------------------------------------------------------------------------------------------


def sourced(**numbers):
    """`ROWS` whose sources are numbered by these functions of the row's place."""
    return {name: np.array([numbers[name](i) for i in range(len(rows))]) for name, rows in ROWS.items()}


def test_sources_are_the_folds_where_every_kind_has_several():
    sources = sourced(safe=lambda i: i % 3, harmful=lambda i: 5 + 2 * (i % 2), utility=lambda i: i // 3)
    found = built(ROWS, sources=sources)
    assert found.by_source and set(found.folds) == {0, 1, 2}
    for name, rows in ROWS.items():
        _, numbers = np.unique(sources[name], return_inverse=True)
        given, folds = members(found, name, made=False)
        assert given == rows and (folds == numbers).all(), "in the order of their numbers, whatever these are"
    fold_of = {row["prompt"]: fold for name in GIVEN for row, fold in zip(*members(found, name, False), strict=True)}
    for row, fold in zip(found.rows, found.folds, strict=True):
        assert fold_of[row["prompt"]] == fold, "made rows share the source of what they were made from"


def test_a_prompt_of_several_sources_is_held_out_of_all_of_them():
    sources = sourced(safe=lambda i: i % 2, harmful=lambda i: i % 2, utility=lambda i: i % 2)
    twice = {name: [*rows, {**rows[0], "prompt": rows[0]["prompt"].upper()}] for name, rows in ROWS.items()}
    found = built(twice, sources={name: np.append(own, 1) for name, own in sources.items()})
    assert found.by_source
    for name in GIVEN:
        _, folds = members(found, name, made=False)
        assert folds.tolist() == [*sources[name], 0], "the copy in the second source is held out with the first"
    copies = {name: rows * 2 for name, rows in ROWS.items()}
    same = built(copies, sources={name: np.repeat([0, 1], len(rows)) for name, rows in ROWS.items()})
    assert not same.by_source and same.folds.tolist() == built(copies).folds.tolist(), "a file given twice"


@pytest.mark.parametrize("alone", GIVEN)
def test_one_kind_from_a_single_source_leaves_the_folds_to_the_prompts(alone):
    kinds = {name: (lambda i: 0) if name == alone else (lambda i: i % 2) for name in GIVEN}
    found, plain = built(ROWS, sources=sourced(**kinds)), built(ROWS)
    assert not found.by_source and found.rows == plain.rows and (found.folds == plain.folds).all()


def test_made_rows_take_nothing_from_another_source():
    """Texts of the two sources have no word in common, so that any exchange would be seen."""
    halves = {
        name: [
            {part: text.replace(" answer ", f" {said} ") for part, text in row.items()}
            for said in ("replied", "retorted")
            for row in distinct(f"{name} {said}", 8)
        ]
        for name in GIVEN
    }
    sources = {name: np.repeat([0, 1], 8) for name in GIVEN}
    found = built(halves, per_row=3, sources=sources)
    for name in ("over_refusal", "corrupted", "utility"):
        rows, folds = members(found, name)
        assert set(folds.tolist()) == {0, 1}
        for row, fold in zip(rows, folds, strict=True):
            assert ("replied" if fold else "retorted") not in row["completion"]
    # Negative control: with folds by prompts the halves are mixed.
    over, _ = members(built(halves, per_row=3), "over_refusal")
    assert any(("replied" in row["prompt"]) != ("replied" in row["completion"]) for row in over)


def test_a_partner_is_of_the_same_fold_or_there_is_none():
    rows = distinct("x", 9)
    folded = list(zip(rows, [0, 1, 2] * 3, strict=True))
    for seed in range(30):
        partner = module._partner(folded, 1, np.random.default_rng(seed))
        assert rows.index(partner) % 3 == 1
    assert module._partner(folded, 7, np.random.default_rng(0)) is None
    # A benign row in whose fold no refusal lies is not refused with one of another fold.
    sources = sourced(safe=lambda i: i % 2, harmful=lambda i: i % 2, utility=lambda i: i % 3)
    over, folds = members(built(ROWS, sources=sources), "over_refusal")
    assert len(over) == 6 and set(folds.tolist()) == {0, 1}


# --- long references ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, kept",
    [
        (1, "One two three."),
        (3, "One two three."),
        (4, "One two three."),
        (5, "One two three. Four five!"),
        (6, "One two three. Four five! Six"),
        (99, None),
    ],
)
def test_whole_sentences_are_kept_and_at_least_one(words, kept):
    text = " One two three. Four five!\nSix\n\nSeven eight "
    assert shortened(text, words) == (text.strip() if kept is None else kept)


def test_sentences_are_never_cut_and_only_left_out_from_the_end():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sentences = [" ".join(["word"] * int(n)) + str(rng.choice(list(".!?…"))) for n in rng.integers(1, 9, 6)]
        text, words = " ".join(sentences), int(rng.integers(1, 40))
        found = shortened(text, words)
        n = next(n for n in range(1, 7) if found == " ".join(sentences[:n]))
        assert n == 1 or len(found.split()) <= words
        assert n == 6 or len(" ".join(sentences[: n + 1]).split()) > words


def test_given_completions_are_shortened_to_whole_sentences():
    long = [{**row, "completion": "This is said at some length. " * 40} for row in ROWS["safe"]]
    rows, _ = members(built({**ROWS, "safe": long}), "safe")
    assert {row["completion"] for row in rows} == {" ".join(["This is said at some length."] * 16)}
    assert members(built(ROWS), "harmful")[0] == ROWS["harmful"], "short ones stay as they are"


def test_the_pool_is_never_damaged(monkeypatch, tmp_path):
    from pharmacist.selectors import SELECTORS

    seen, original = [], module.corrupt
    monkeypatch.setattr(module, "corrupt", lambda text, *rest: seen.append(text) or original(text, *rest))
    refs = village.references()
    pool = [{"prompt": f"water {row['prompt']}", "completion": f"water {row['completion']}"} for row in village.pool()]
    selector = SELECTORS.build("pharmacist", {"form": "evidence", "readers": "lexical"})
    selector.rank(village.context(tmp_path / "run", None, pool, refs))
    assert seen and set(seen) <= {row["completion"] for rows in refs.values() for row in rows}
    assert not set(seen) & {row["completion"] for row in pool}
