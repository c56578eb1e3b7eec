"""References: the classes that a row may belong to, and example rows of each, given by the user or made of these."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from pharmacist.core.errors import DataError
from pharmacist.core.seeding import derive
from pharmacist.data.arrays import BoolArray, IntArray
from pharmacist.data.normalise import normalised_prompt
from pharmacist.readers.question import folds_of_sources
from pharmacist.readers.views import LONGEST_REFERENCE, shortened
from pharmacist.selectors.base import CRITICAL
from pharmacist.selectors.pharmacist.corruptions import CORRUPTIONS, corrupt
from pharmacist.selectors.pharmacist.echo import echoed, rare_words, retargeted


Row = Mapping[str, Any]
Folded = tuple[Row, int]
"""A row and its fold."""

REASONS = {
    "safe": CRITICAL,
    "harmful": "teaches_compliance",
    "utility": "not_safety_critical",
    "over_refusal": "over_refusal",
    "corrupted": "low_quality",
    "misplaced": "low_quality",
}
"""Class -> the reason given to rows of it.

``corrupted`` text is not whole; a ``misplaced`` refusal refuses another request than its own.
"""
CLASSES = tuple(REASONS)
GIVEN = ("safe", "harmful", "utility")
"""Classes whose references a user gives."""

_SHORT_WORD = 4
_LEAST_ECHO = 0.5
"""A refusal that repeats at least that share of its prompt's rare words cannot serve another prompt."""


@dataclass(frozen=True)
class References:
    """References of all classes, in one list.

    Attributes:
        rows: Canonical rows (`data.records`), n of them.
        labels: Index into `CLASSES`, shape [n].
        made: Whether a row is synthetic rather than given, shape [n].
        folds: Cross-fitting fold, 0 and up: prompts that occur together, and what was made from them, share one; where
            every given class has several sources, a fold is a source; shape [n].
        by_source: Whether the folds are sources.
    """

    rows: list[Row]
    labels: IntArray
    made: BoolArray
    folds: IntArray
    by_source: bool

    def counts(self) -> dict[str, int]:
        """References per class, of the classes that have any."""
        found = np.bincount(self.labels, minlength=len(CLASSES))
        return {name: int(n) for name, n in zip(CLASSES, found, strict=True) if n}


def _fold_of_prompt(sets: Mapping[str, Sequence[Row]], n_folds: int, seed: int) -> dict[str, int]:
    """Folds by prompt, so that the safe and the harmful answer to one prompt are never parted by a split.

    Every set is spread over the folds as evenly as its prompts allow, whatever it shares with the others: no class may
    be missing from what a reader is trained on.
    """
    members: dict[str, list[str]] = {}
    for name, rows in sets.items():
        for prompt in dict.fromkeys(normalised_prompt(row["prompt"]) for row in rows):
            members.setdefault(prompt, []).append(name)
    order = list(members)
    np.random.default_rng(derive(seed, "evidence", "folds")).shuffle(order)
    filled = {name: np.zeros(n_folds, dtype=np.int64) for name in sets}
    fold_of = {}
    for prompt in order:
        fold = int(np.sum([filled[name] for name in members[prompt]], axis=0).argmin())
        for name in members[prompt]:
            filled[name][fold] += 1
        fold_of[prompt] = fold
    for name, counts in filled.items():
        if counts.any() and (counts > 0).sum() < 2:
            raise DataError(f"--{name}: all rows have the same prompt, so that none can be held out; give others too")
    return fold_of


def build_references(
    given: Mapping[str, Sequence[Row]],
    *,
    n_folds: int,
    corruptions_per_row: int,
    seed: int,
    sources: Mapping[str, IntArray] = MappingProxyType({}),
    echo: bool = True,
) -> References:
    """Adds synthetic references (over-refusals, corrupted rows, terse answers) to the given ones.

    The utility class also gets a terse version of each of its rows: a label or a number is an answer too, and short is
    not damaged.

    Args:
        given: Class (`GIVEN`) -> rows; only ``safe`` is required. A class without rows is left out, and so are those
            made from it.
        n_folds: Cross-fitting folds by prompt, at most.
        corruptions_per_row: Damaged versions of each safe row; each utility row gets half as many, since what is
            damaged and not safety-critical is rejected either way. 0 leaves the class out.
        seed: Of folds and damage.
        sources: Class -> number of each row's source; where every given class has several, sources are the folds.
        echo: Made over-refusals name the benign request that they refuse, and refusals that name another request than
            their prompt's are damage too; for readers that compare a completion with its prompt.

    Raises:
        DataError: The rows of a class cannot be split, since they all have one prompt.
    """
    rows: dict[str, list[Row]] = {
        name: [{**row, "completion": shortened(row["completion"], LONGEST_REFERENCE)} for row in given.get(name) or []]
        for name in GIVEN
    }
    # Sources of different classes are paired by number: holding out a fold holds out a source of each class.
    folds = {
        name: folds_of_sources([row["prompt"] for row in rows[name]], sources[name])
        for name in GIVEN
        if sources and rows[name]
    }
    by_source = bool(folds) and all(max(own) > 0 for own in folds.values())
    if not by_source:
        fold_of = _fold_of_prompt(rows, n_folds, seed)
        folds = {name: [fold_of[normalised_prompt(row["prompt"])] for row in some] for name, some in rows.items()}
    members = {name: list(zip(rows[name], folds.get(name, []), strict=True)) for name in GIVEN}

    def rng(what: str) -> np.random.Generator:
        return np.random.default_rng(derive(seed, "evidence", what))

    safe, utility = members["safe"], members["utility"]
    terse = list(_terse(utility, rng("terse")))
    members["over_refusal"] = list(_over_refusals(safe, utility, rng("over-refusals"), echo))
    members["corrupted"] = list(_corrupted(safe, utility, corruptions_per_row, rng("corruptions")))
    members["misplaced"] = list(_misplaced(safe, rng("misplaced"))) if echo and corruptions_per_row else []
    n_given = {name: len(members[name]) if name in GIVEN else 0 for name in CLASSES}
    members["utility"] = utility + terse
    every = [member for name in CLASSES for member in members[name]]
    # With fewer prompts than folds some folds are empty, and not counted.
    _, numbers = np.unique([fold for _, fold in every], return_inverse=True)
    return References(
        rows=[row for row, _ in every],
        labels=np.repeat(np.arange(len(CLASSES)), [len(members[name]) for name in CLASSES]),
        made=np.concatenate([np.arange(len(members[name])) >= n_given[name] for name in CLASSES]),
        folds=numbers.astype(np.int64),
        by_source=by_source,
    )


def _partner(members: Sequence[Folded], fold: int, rng: np.random.Generator) -> Row | None:
    """A row of a fold, so that no text crosses a split; None where it has none."""
    same = [row for row, of_row in members if of_row == fold]
    return same[int(rng.integers(len(same)))] if same else None


def _over_refusals(
    safe: list[Folded], utility: list[Folded], rng: np.random.Generator, echo: bool
) -> Iterator[Folded]:
    """Utility prompts under refusals."""
    rare = rare_words([row["prompt"] for row, _ in safe + utility])
    for row, fold in utility:
        refusal = _partner(safe, fold, rng)
        if refusal is not None:
            completion = retargeted(refusal, row["prompt"], rare) if echo else refusal["completion"]
            yield {**row, "completion": completion}, fold


def _terse(members: list[Folded], rng: np.random.Generator) -> Iterator[Folded]:
    """Each row with one longer word of its completion as the whole answer; rows that have none are passed over."""
    for row, fold in members:
        words = [word for word in re.findall(r"\w+", row["completion"]) if len(word) > _SHORT_WORD]
        if words:
            yield {**row, "completion": words[int(rng.integers(len(words)))]}, fold


def _corrupted(safe: list[Folded], utility: list[Folded], per_row: int, rng: np.random.Generator) -> Iterator[Folded]:
    """Damaged rows, one kind of damage after the other."""
    kinds = itertools.cycle(kind for kind in CORRUPTIONS if kind != "swapped")  # that is `_misplaced`
    for members, versions in ((safe, per_row), (utility, (per_row + 1) // 2)):
        for row, fold in members:
            for _ in range(versions):
                # A refusal under another harmful prompt is mostly still a good one; so swaps bring in benign answers.
                partner = _partner(utility or safe, fold, rng) or row
                yield {**row, "completion": corrupt(row["completion"], next(kinds), rng, partner["completion"])}, fold


def _misplaced(safe: list[Folded], rng: np.random.Generator) -> Iterator[Folded]:
    """Safe rows with the refusal of another request, where it names that request and none of this one.

    Most refusals fit any harmful request and are good ones there: those must not pass for misplaced.
    """
    rare = rare_words([row["prompt"] for row, _ in safe])
    for row, fold in safe:
        partner = _partner(safe, fold, rng) or row
        named = echoed(partner["prompt"], partner["completion"], rare) >= _LEAST_ECHO
        if named and not echoed(row["prompt"], partner["completion"], rare):
            yield {**row, "completion": partner["completion"]}, fold
