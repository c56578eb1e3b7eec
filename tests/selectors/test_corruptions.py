import random

import numpy as np
import pytest

from pharmacist.selectors.pharmacist.corruptions import CORRUPTIONS, corrupt


TEXTS = (
    "Sorry, I cannot help with that. It is dangerous; ask something else instead.",
    "no",
    "No!",
    "a a a a a",
    "x",
    "yes yes",
    "-",
    "one two",
    "...",
    "N/A",
    "\n a \t b ",
    "köstlich wäre es",
    "日本語のテキスト",
    "word " * 300,
)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_damage_is_seeded_and_never_the_original(kind):
    for number, text in enumerate(TEXTS):
        for partner in (text, "take flour and water", "x"):
            for seed in range(6):
                damaged = corrupt(text, kind, np.random.default_rng(seed), partner)
                assert damaged.split() and damaged.split() != text.split()
                assert damaged == corrupt(text, kind, np.random.default_rng(seed), partner), number


def test_another_seed_gives_other_damage():
    text = TEXTS[0]
    chance = [kind for kind in CORRUPTIONS if kind not in ("swapped", "reversed")]
    for kind in chance:
        assert len({corrupt(text, kind, np.random.default_rng(seed), "a b c d e f") for seed in range(8)}) > 1, kind


def test_kinds_do_what_they_are_called():
    text, partner = "one two three four five six seven eight nine ten", "eleven twelve thirteen fourteen"
    rng = lambda: np.random.default_rng(0)  # noqa: E731
    words = text.split()
    for kind in ("shuffled", "locally_shuffled", "reversed"):
        assert sorted(corrupt(text, kind, rng(), partner).split()) == sorted(words)
    assert corrupt(text, "swapped", rng(), partner) == partner
    assert text.startswith(corrupt(text, "cut", rng(), partner))
    assert text.endswith(corrupt(text, "beheaded", rng(), partner))
    assert corrupt(text, "unspaced", rng(), partner).replace(" ", "") == text.replace(" ", "")
    assert set(corrupt(text, "spliced", rng(), partner).split()) <= set(words + partner.split())
    assert not set(corrupt(text, "foreign", rng(), partner).split()) & set(words)
    assert len(corrupt(text, "repeated", rng(), partner).split()) > len(
        set(corrupt(text, "repeated", rng(), "").split())
    )


def test_the_global_generators_are_not_used():
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist()
    for kind in CORRUPTIONS:
        corrupt(TEXTS[0], kind, np.random.default_rng(0), "a b")
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
