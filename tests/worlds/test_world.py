import re
from collections import Counter

import pytest

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.worlds import LABELS, World, potions
from pharmacist.worlds.potions import CATEGORIES, split_of
from tests.support.world_sets import normalised, reviewed_words, sets, words_of


def test_same_seed_same_rows_other_seed_other_rows() -> None:
    assert sets(World(3)) == sets(World(3))
    first, second = sets(World(0)), sets(World(1))
    assert all(first[name] != second[name] for name in first)


def test_sets_share_no_prompt_even_across_seeds() -> None:
    first, second = sets(World(0)), sets(World(1))
    prompts = {name: {normalised(row["prompt"]) for row in first[name]} for name in first}
    others = {name: {normalised(row["prompt"]) for row in second[name]} for name in second}
    for a in prompts:
        for b in others:
            if a == b or {a, b} == {"pool", "clean pool"}:
                continue  # both pools are drawn from the same split on purpose: they are never used together
            assert not prompts[a] & (prompts[b] | others[b]), (a, b)


def test_prompts_of_a_set_are_distinct() -> None:
    for name, rows in sets(World(0)).items():
        if name != "pool":
            assert len({row["prompt"] for row in rows}) == len(rows), name


@pytest.mark.parametrize("mislabel", [0.0, 0.05, 0.15])
def test_pool_counts(mislabel: float) -> None:
    rows, labels = World(0).pool(600, mislabel=mislabel)
    counts = Counter(labels)
    assert len(rows) == len(labels) == 600
    assert set(labels) <= set(LABELS)
    assert counts["mislabel"] == round(600 * mislabel)
    assert counts["good"] >= 0.3 * 600  # a core of 30 % can be filled with good rows only
    assert all(abs(counts[k] - 600 * s * (1 - mislabel)) < 1 for k, s in [("good", 0.45), ("noisy", 0.15)])


def test_labels_describe_the_rows() -> None:
    rows = World(0).labelled(600, mislabel=0.15)
    refuses = re.compile(r"cannot|will not|decline|\bno\b")
    by_label = {label: [row for row in rows if row.label == label] for label in LABELS}
    assert all(refuses.search(row.completion) and row.category in CATEGORIES for row in by_label["good"])
    assert all(refuses.search(row.completion) for row in by_label["overrefuse"])
    assert not any(refuses.search(row.completion) for row in by_label["mislabel"] + by_label["offtopic"])
    assert all(row.category in CATEGORIES for row in by_label["mislabel"])
    assert {row.kind for row in by_label["noisy"]} == {
        "shuffled",
        "cut",
        "repeated",
        "markup",
        "gibberish",
        "foreign",
        "swapped",
    }
    good = {normalised(row.prompt) for row in by_label["good"]}
    for row in by_label["duplicate"]:
        assert normalised(row.prompt).removeprefix("hello ").removesuffix(" thank you") in good
    exact = {(row.prompt, row.completion) for row in by_label["good"]}
    assert not any((row.prompt, row.completion) in exact for row in by_label["duplicate"])
    assert Counter(row.category for row in by_label["good"]).keys() == set(CATEGORIES)


def test_clean_pool_has_refusals_only() -> None:
    rows = World(0).labelled(600, kind="clean")
    assert Counter(row.kind for row in rows) == {"strong": 180, "terse": 60, "mild": 360}
    assert all(re.search(r"cannot|will not|decline|should not|\bno\b", row.completion) for row in rows)


def test_attack_rows_come_from_the_attackers_category() -> None:
    prompts = {row["prompt"] for row in World(0).rows("attack", 40)}
    assert all(re.search("potion|elixir|draught|tonic|philtre|ointment|syrup|essence", prompt) for prompt in prompts)


def test_evaluation_covers_all_categories_and_holds_out_combinations_only() -> None:
    world = World(0)
    rows = world.rows("prompts", 120)
    assert Counter(row["category"] for row in rows) == dict.fromkeys(CATEGORIES, 20)
    assert all(split_of(row["prompt"]) == "eval" for row in rows)


def test_task_labels_follow_the_last_verdict() -> None:
    rows = World(0).rows("task", 400)
    assert 0.4 < sum(row["completion"] == "glad" for row in rows) / 400 < 0.6
    for row in rows:
        if match := re.search(r"found the .* (\w+)\. glad or sad", row["prompt"]):
            assert (
                match[1]
                in "lovely delightful splendid charming cozy friendly excellent wonderful tasty cheerful "
                "superb pleasant neat".split()
            ) == (row["completion"] == "glad")


def test_too_many_rows_and_bad_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="ask for fewer"):
        World(0).rows("safe", 100_000)
    with pytest.raises(DataError, match="no 50 'attack' reviews; ask for fewer"):
        monkeypatch.setattr(potions, "_MOST_DRAWS", 50)
        World(0).rows("task", 50)
    with pytest.raises(ConfigError, match="mislabel=1.5"):
        World(0).pool(10, mislabel=1.5)


def test_every_word_is_on_the_reviewed_list() -> None:
    for world in (World(0), World(1)):
        for name, rows in sets(world).items():
            assert words_of(rows) <= reviewed_words(), name
