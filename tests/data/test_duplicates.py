import random
import re

import numpy as np
import pytest

from pharmacist.data import duplicates
from pharmacist.data.duplicates import choose_bands, find_duplicates
from pharmacist.data.formats import open_source
from pharmacist.data.records import read_records, to_dataset


def words(rng: random.Random, n: int) -> list[str]:
    return ["".join(rng.choices("bdfgklmnprst", k=5)) for _ in range(n)]


def rows_of(pairs):
    return to_dataset(
        [{"prompt": " ".join(prompt), "completion": " ".join(completion)} for prompt, completion in pairs]
    )


def clusters_of(*pairs, **options):
    rows = to_dataset([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    return find_duplicates(rows, **options).tolist()


def jaccard_clusters(pairs, threshold: float) -> list[int]:
    """The same by the definition: all pairs, sets of tuples, union-find."""

    def shingles(text):
        tokens = re.findall(r"\w+", text)
        return {tuple(tokens[i : i + 3]) for i in range(max(1, len(tokens) - 2))}

    def similarity(a, b):
        return len(a & b) / len(a | b)

    sets = [(shingles(" ".join(prompt)), shingles(" ".join(completion))) for prompt, completion in pairs]
    parent = list(range(len(pairs)))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for j in range(len(pairs)):
        for i in range(j):
            (p, c), (q, d) = sets[i], sets[j]
            whole = (len(p & q) + len(c & d)) / (len(p | q) + len(c | d))
            if whole >= threshold and min(similarity(p, q), similarity(c, d)) >= threshold / 2:
                a, b = root(i), root(j)
                parent[max(a, b)] = min(a, b)
    return [root(i) for i in range(len(pairs))]


def planted(seed: int, n: int = 120):
    """Rows and copies of them with up to six words changed: similarities on both sides of the threshold."""
    rng = random.Random(seed)
    pairs = [(words(rng, rng.randint(4, 15)), words(rng, rng.randint(10, 50))) for _ in range(n)]
    for _ in range(n):
        prompt, completion = map(list, rng.choice(pairs[:n]))
        for _ in range(rng.randint(0, 6)):
            side = rng.choice([prompt, completion, completion])
            side[rng.randrange(len(side))] = words(rng, 1)[0]
        pairs.append((prompt, completion))
    rng.shuffle(pairs)
    return pairs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.95])
def test_clusters_are_those_of_the_definition(seed, threshold):
    pairs = planted(seed)
    found = find_duplicates(rows_of(pairs), threshold=threshold).tolist()
    expected = jaccard_clusters(pairs, threshold)
    # MinHash may miss a pair that lies just above the threshold; it can never join what the definition keeps apart.
    wrong = [(a, b) for a, b in zip(found, expected, strict=True) if a != b]
    assert len(wrong) <= 0.01 * len(pairs), wrong
    assert all(expected[cluster] == expected[row] for row, cluster in enumerate(found))
    assert len(set(expected)) < len(pairs) - 10, "the test must have something to find"


def test_exact_duplicates_up_to_case_space_and_final_punctuation():
    pairs = [("How do I bake?", "Take flour."), ("what", "No."), ("how do i  BAKE", "take\nflour"), ("what", "Yes.")]
    assert clusters_of(*pairs) == [0, 1, 0, 3]
    assert clusters_of(*pairs, threshold=1.0) == [0, 1, 0, 3]


def test_other_answers_and_other_prompts_are_no_duplicates():
    rng = random.Random(0)
    prompt, refusal = " ".join(words(rng, 60)), " ".join(words(rng, 60))
    # By the whole text alone each of these pairs would be above the threshold.
    assert clusters_of((prompt, "positive"), (prompt, "negative")) == [0, 1]
    assert clusters_of(("how do i brew this", refusal), ("where can we find that", refusal)) == [0, 1]
    assert clusters_of((prompt, "positive"), (prompt + " please", "positive")) == [0, 0]


def test_a_system_prompt_that_rows_share_makes_no_duplicates(tmp_path):
    system = {"role": "system", "content": " ".join(words(random.Random(0), 60))}
    asked = ["How do I bake bread?", "Where does the miller live?", "How do I bake bread?"]
    rows = [
        {
            "messages": [
                system,
                {"role": "user", "content": text},
                {"role": "assistant", "content": "I cannot say that."},
            ]
        }
        for text in asked
    ]
    read = read_records(open_source(rows), work_dir=tmp_path)
    assert find_duplicates(read.dataset).tolist() == [0, 1, 0]


def test_sums_are_told_apart_by_their_signs():
    base = "so the box holds seven green and nine red balls and the answer is then"
    assert clusters_of((base, "3 + 4"), (base, "3 - 4"), (base, "3 + 4!")) == [0, 1, 0]


def test_scripts_without_spaces_are_cut_into_characters():
    text = "今日は天気がいいから散歩しましょうそれから買い物に行きます"
    assert clusters_of((text, text + text[::-1]), (text, text + text[::-1] + "ね")) == [0, 0]
    assert clusters_of((text, text), (text[::-1], text[::-1])) == [0, 1]


def test_short_and_wordless_texts():
    assert clusters_of(("a", "no"), ("b", "no"), ("a", "yes"), ("A", "No"), ("?", "!"), ("!", "?"), ("?", "!")) == (
        [0, 1, 2, 0, 4, 5, 4]
    )


def test_chains_are_one_cluster_named_by_its_first_row():
    rng = random.Random(4)
    text = words(rng, 80)
    chain = []
    for _ in range(6):
        chain.append((["p", "q", "r", "s"], list(text)))
        text[rng.randrange(80)], text[rng.randrange(80)] = words(rng, 2)
    assert find_duplicates(rows_of([(words(rng, 4), words(rng, 80)), *chain[::-1]])).tolist() == [0] + [1] * 6
    assert jaccard_clusters([chain[0], chain[-1]], 0.8) == [0, 1], "its ends must be far apart"


def test_results_depend_on_the_rows_alone(tmp_path):
    pairs = planted(7)
    first = find_duplicates(rows_of(pairs), work_dir=tmp_path / "work")
    assert not list((tmp_path / "work").iterdir()), "temporary files are left"
    assert first.dtype == np.int64 and (first <= np.arange(len(first))).all() and (first[first] == first).all()
    np.testing.assert_array_equal(first, find_duplicates(rows_of(pairs)))


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_pool_decides_nothing(seed, monkeypatch):
    # A family of cousins, few permutations: large buckets whose members are not all alike.
    rng = random.Random(seed)
    text = words(rng, 30)
    pairs = []
    for _ in range(80):
        changed = list(text)
        for _ in range(rng.randint(1, 6)):
            changed[rng.randrange(30)] = words(rng, 1)[0]
        pairs.append((["the", "same", "prompt"], changed))
    monkeypatch.setattr(duplicates, "PERMUTATIONS", 12)
    first = find_duplicates(rows_of(pairs), threshold=0.5)
    together = {frozenset(np.flatnonzero(first == c).tolist()) for c in set(first.tolist())}
    assert 1 < len(together) < 80
    for order in (np.arange(80)[::-1], np.random.default_rng(seed).permutation(80)):
        second = find_duplicates(rows_of([pairs[i] for i in order]), threshold=0.5)
        assert together == {frozenset(order[np.flatnonzero(second == c)].tolist()) for c in set(second.tolist())}


def test_batches_do_not_show(monkeypatch):
    pairs = planted(9, 40)
    whole = find_duplicates(rows_of(pairs))
    monkeypatch.setattr(duplicates, "_BATCH", 7)
    np.testing.assert_array_equal(find_duplicates(rows_of(pairs)), whole)


def test_work_grows_with_rows_and_not_with_pairs(monkeypatch):
    rng = random.Random(2)
    text = words(rng, 60)
    pairs = []
    for _ in range(400):
        changed = list(text)
        changed[rng.randrange(60)] = words(rng, 1)[0]
        pairs.append((["same", "prompt", "here"], changed))
    compared = 0
    compare = duplicates._Finder.compare

    def counting(self, a, b):
        nonlocal compared
        compared += len(a)
        return compare(self, a, b)

    monkeypatch.setattr(duplicates._Finder, "compare", counting)
    assert set(find_duplicates(rows_of(pairs)).tolist()) == {0}
    assert compared < 10 * len(pairs), "80 000 pairs are near-duplicates"


def test_views_and_edges():
    rows = to_dataset(
        [{"prompt": p, "completion": "x y z w"} for p in ("one two", "three four", "one two", "five six")]
    )
    assert find_duplicates(rows.select([3, 2, 0])).tolist() == [0, 1, 1]
    assert find_duplicates(rows.select([])).tolist() == []
    assert find_duplicates(rows.select([1])).tolist() == [0]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("num_perm", [16, 64, 128, 256])
def test_bands_find_what_lies_at_the_threshold(threshold, num_perm):
    bands, rows = choose_bands(threshold, num_perm)
    assert 1 <= bands * rows <= num_perm
    assert 1 - (1 - threshold**rows) ** bands >= 0.995 or rows == 1
