"""Corruptions: damaged versions of reference completions, from which low-quality rows are learned."""

from collections.abc import Callable

import numpy as np


Generator = np.random.Generator

_SYLLABLES = ("ba", "ke", "lo", "mi", "nu", "ra", "se", "ti", "vo", "zu", "dal", "fen", "gor", "hin", "jul", "pax")
_DEBRIS = ("â€™", "Ã©", "ï¿½", "Â", "\ufffd", "&#39;", "&nbsp;", "\\u00e2")
_MARKUP = ('<div class="c{}">', "</span>", "<br/>", "{{{{field_{}}}}}", "[[{}]]", "## {}", "null,", '"id": {},')
_PLACEHOLDERS = ("[INSERT ANSWER HERE]", "Lorem ipsum dolor sit amet", "N/A", "...", "TBD", "see above", "asdf", "-")


def _shuffled(text: str, rng: Generator, partner: str) -> str:
    words = text.split()
    return " ".join(words[i] for i in rng.permutation(len(words)))


def _locally_shuffled(text: str, rng: Generator, partner: str) -> str:
    words, size = text.split(), int(rng.integers(3, 6))
    groups = [words[i : i + size] for i in range(0, len(words), size)]
    return " ".join(group[i] for group in groups for i in rng.permutation(len(group)))


def _cut(text: str, rng: Generator, partner: str) -> str:
    # Mid-sentence and without closing punctuation: what a broken download or a token limit leaves.
    words = text.split()
    return " ".join(words[: max(1, int(len(words) * rng.uniform(0.1, 0.6)))]).rstrip(".!?")


def _repeated(text: str, rng: Generator, partner: str) -> str:
    words = text.split()
    start = int(rng.integers(0, max(1, len(words) - 4)))
    phrase = words[start : start + int(rng.integers(1, 6))]
    return " ".join(words[: start + len(phrase)] + phrase * int(rng.integers(3, 9)))


def _spliced(text: str, rng: Generator, partner: str) -> str:
    a, b = text.split(), partner.split()
    return " ".join(a[: int(len(a) * rng.uniform(0.2, 0.6))] + b[int(len(b) * rng.uniform(0.3, 0.7)) :])


def _marked_up(text: str, rng: Generator, partner: str) -> str:
    words = text.split()
    for _ in range(max(2, len(words) // 6)):
        piece = str(rng.choice(_MARKUP)).format(int(rng.integers(100)))
        words.insert(int(rng.integers(0, len(words) + 1)), piece)
    return " ".join(words)


def _mojibake(text: str, rng: Generator, partner: str) -> str:
    letters = list(text)
    for position in rng.integers(0, len(letters), size=max(2, len(letters) // 12)):
        letters[position] += str(rng.choice(_DEBRIS))
    return "".join(letters)


def _mistyped(text: str, rng: Generator, partner: str) -> str:
    letters = list(text)
    for position in rng.integers(0, max(1, len(letters) - 1), size=max(3, len(letters) // 5)):
        if rng.random() < 0.5:
            letters[position : position + 2] = letters[position : position + 2][::-1]
        else:
            letters[position] = chr(ord("a") + int(rng.integers(26)))
    return "".join(letters)


def _foreign(text: str, rng: Generator, partner: str) -> str:
    # Pseudo-words of about the same lengths: no reader may depend on a particular language being the wrong one.
    syllables = [max(1, len(word) // 2) for word in text.split()]
    return " ".join("".join(str(rng.choice(_SYLLABLES)) for _ in range(n)) for n in syllables)


CORRUPTIONS: dict[str, Callable[[str, Generator, str], str]] = {
    "shuffled": _shuffled,
    "cut": _cut,
    "repeated": _repeated,
    "swapped": lambda text, rng, partner: partner,
    "marked_up": _marked_up,
    "locally_shuffled": _locally_shuffled,
    "mojibake": _mojibake,
    "beheaded": lambda text, rng, partner: " ".join(text.split()[int(len(text.split()) * rng.uniform(0.4, 0.8)) :]),
    "mistyped": _mistyped,
    "foreign": _foreign,
    "spliced": _spliced,
    "placeholder": lambda text, rng, partner: " ".join([str(rng.choice(_PLACEHOLDERS))] * int(rng.integers(1, 4))),
    "unspaced": lambda text, rng, partner: "".join(c for c in text if c != " " or rng.random() < 0.3),
    "reversed": lambda text, rng, partner: " ".join(text.split()[::-1]),
}
"""Kinds of damage by name: (completion, source of chance, another row's completion) -> text, maybe the same."""


def corrupt(text: str, kind: str, rng: Generator, partner: str) -> str:
    """Damages a completion that is not empty: what comes back, cut at white space, gives other words.

    Where one of `CORRUPTIONS` would leave the text as it is (one word cannot be shuffled), the next kinds are tried.
    `partner` is the completion of another row.
    """
    kinds = list(CORRUPTIONS)
    start = kinds.index(kind)
    for name in kinds[start:] + kinds[:start]:
        damaged = CORRUPTIONS[name](text, rng, partner).strip()
        if damaged and damaged.split() != text.split():
            return damaged
    return text + " \ufffd"
