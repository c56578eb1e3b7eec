"""Echo: the words of a prompt that an answer repeats, by which the refusal of another request is found.

Other readers learn from single words, and no word by itself shows that an answer belongs to another prompt.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, ClassVar

import numpy as np

from pharmacist.core.scripts import WORD
from pharmacist.data.arrays import FloatArray
from pharmacist.readers.views import Features, State, Texts, framed, vectorizer


Row = Mapping[str, Any]

_RARE_SHARE = 0.05
"""A word in more of the prompts than that is how people ask, not what they ask for."""


def words(text: str) -> list[str]:
    """Words in lower case, in order; of a script without spaces, its letters."""
    return re.findall(WORD, text.lower())


def rare_words(prompts: Sequence[str]) -> frozenset[str]:
    """Words that at most a twentieth of some prompts hold, or one prompt alone."""
    count = Counter(word for prompt in prompts for word in set(words(prompt)))
    most = max(1.0, _RARE_SHARE * len(prompts))
    return frozenset(word for word, n in count.items() if n <= most)


def echoed(prompt: str, completion: str, rare: frozenset[str]) -> float:
    """Share of a prompt's rare words that a completion repeats; 0 where it has none."""
    asked = set(words(prompt)) & rare
    return len(asked & set(words(completion))) / len(asked) if asked else 0.0


def retargeted(row: Row, prompt: str, rare: frozenset[str]) -> str:
    """The completion of a row with what it repeats of its own prompt replaced by the gist of another.

    The longest run of words that completion and own prompt share gives way to the other prompt's words from its first
    to its last rare one. Without a rare word in the run, or in the other prompt, the completion stays as it is.
    """
    completion = str(row["completion"])
    matches, other = list(re.finditer(WORD, completion)), list(re.finditer(WORD, prompt))
    said = [match.group().lower() for match in matches]
    run = SequenceMatcher(None, words(str(row["prompt"])), said, autojunk=False).find_longest_match()
    gist = [match for match in other if match.group().lower() in rare]
    if not gist or not rare.intersection(said[run.b : run.b + run.size]):
        return completion
    before, after = completion[: matches[run.b].start()], completion[matches[run.b + run.size - 1].end() :]
    return before + prompt[gist[0].start() : gist[-1].end()] + after


def echo_features(prompts: Iterable[str], completions: Iterable[str], rarity: Mapping[str, float]) -> FloatArray:
    """What each completion repeats of its own prompt, and of others, shape [rows, 2].

    The share of the prompt's words that the completion repeats; and the words of other prompts that it holds, against
    the prompt's own, at most 1. Both are weighted by `rarity` of the words of known prompts, so in [0, 1]; unknown
    words weigh as much as the rarest.
    """
    rarest = max(rarity.values(), default=1.0)

    def weight(some: set[str]) -> float:
        return math.fsum(rarity.get(word, rarest) for word in some)  # whatever the order of the set

    features = []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked, said = set(words(prompt)), set(words(completion))
        total = weight(asked)
        strays = weight({word for word in said - asked if word in rarity})
        features.append([weight(asked & said) / total, min(1.0, strays / total)] if total > 0 else [0.0, 0.0])
    return np.array(features, dtype=np.float64).reshape(-1, 2)


class Echo:
    """What an answer repeats of its own request, and of others (`echo_features`)."""

    regularisation: ClassVar[float] = 100.0

    def __init__(self) -> None:
        self._rarity: dict[str, float] = {}

    def fit(self, texts: Texts) -> "Echo":
        known = vectorizer().fit([framed(prompt) for prompt in texts.prompts])
        # A word that all prompts hold weighs nothing. Word pairs are in there too, and are never asked for.
        self._rarity = {word: float(known.idf_[column]) - 1 for word, column in known.vocabulary_.items()}
        return self

    def features(self, texts: Texts) -> Features:
        return echo_features(texts.prompts, texts.completions, self._rarity)

    def state(self) -> State:
        return {}, {"rarity": self._rarity}

    def load(self, tensors: Mapping[str, FloatArray], content: Mapping[str, Any]) -> "Echo":
        self._rarity = dict(content["rarity"])
        return self
