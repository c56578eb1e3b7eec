"""The evidence classes and their references, given by the user or made by the selector."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pharmacist.core.errors import DataError
from pharmacist.core.seeding import derive
from pharmacist.data.records import normalised_prompt
from pharmacist.selectors.base import CRITICAL
from pharmacist.selectors.evidence.corruptions import CORRUPTIONS, corrupt
from pharmacist.selectors.evidence.echo import echoed, rare_words, retargeted


Row = Mapping[str, Any]

_SHORT_WORD = 4
_OF_ITS_OWN = 0.5
"""A refusal that repeats at least that share of its prompt's rare words cannot serve another prompt."""

REASONS = {
    "safe": CRITICAL,
    "harmful": "teaches_compliance",
    "utility": "not_safety_critical",
    "over_refusal": "over_refusal",
    "corrupted": "low_quality",
}
"""Class -> the reason given to rows that look most like it."""


@dataclass(frozen=True)
class EvidenceReferences:
    """References of all classes, in one list.

    Attributes:
        classes: Names, `REASONS` in order, those without references left out.
        rows: Canonical rows (`data.records`), n of them.
        labels: Index into `classes`, shape [n].
        made: Whether a row was made rather than given, shape [n].
        folds: Cross-fitting fold; a made row lies in the fold of the rows it was made from, shape [n].
        n_folds: How many folds.
    """

    classes: tuple[str, ...]
    rows: list[Row]
    labels: npt.NDArray[np.int64]
    made: npt.NDArray[np.bool_]
    folds: npt.NDArray[np.int64]
    n_folds: int

    def counts(self) -> dict[str, int]:
        """References per class."""
        return {name: int((self.labels == i).sum()) for i, name in enumerate(self.classes)}


def _fold_of_prompt(sets: Mapping[str, Sequence[Row]], n_folds: int, seed: int) -> dict[str, int]:
    """Folds by prompt, so that the safe and the harmful answer to one prompt are never on two sides of a split.

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
    given: Mapping[str, Sequence[Row]], *, n_folds: int, corruptions_per_row: int, seed: int, echo: bool = True
) -> EvidenceReferences:
    """Adds the made classes (over-refusing, corrupted) to the given ones (safe, harmful, utility).

    The utility class also gets a terse version of each of its rows: a label or a number is an answer too, and short is
    not damaged.

    Args:
        given: Class -> rows; only ``safe`` is required. A class without rows is left out, and so are those made from
            it.
        n_folds: Cross-fitting folds, at most.
        corruptions_per_row: Damaged versions of each safe row; each utility row gets half as many, since what is
            damaged and not safety-critical is rejected either way. 0 leaves the class out.
        seed: Of folds and damage.
        echo: Made over-refusals name the benign request that they refuse, and refusals that name another request than
            their prompt's are damage too; for readers that compare a completion with its prompt.

    Raises:
        DataError: The rows of a class cannot be split, since they all have one prompt.
    """
    fold_of = _fold_of_prompt({name: given.get(name) or [] for name in ("safe", "harmful", "utility")}, n_folds, seed)

    def folds(rows: Sequence[Row]) -> list[int]:
        return [fold_of[normalised_prompt(row["prompt"])] for row in rows]

    members: dict[str, list[Row]] = {name: list(given.get(name) or []) for name in ("safe", "harmful", "utility")}
    fold: dict[str, list[int]] = {name: folds(rows) for name, rows in members.items()}
    members["over_refusal"], fold["over_refusal"] = _over_refusals(members, fold, seed, echo)
    members["corrupted"], fold["corrupted"] = _corrupted(members, fold, corruptions_per_row, seed)
    if echo and corruptions_per_row:
        misplaced, of_misplaced = _misplaced(members["safe"], fold["safe"], seed)
        members["corrupted"] += misplaced
        fold["corrupted"] += of_misplaced
    made = {name: [name in ("over_refusal", "corrupted")] * len(rows) for name, rows in members.items()}
    terse, of_terse = _terse(members["utility"], fold["utility"], seed)
    members["utility"] += terse
    fold["utility"] += of_terse
    made["utility"] += [True] * len(terse)
    classes = tuple(name for name in REASONS if members[name])
    # With fewer prompts than folds some folds are empty, and not counted.
    used, numbers = np.unique([f for name in classes for f in fold[name]], return_inverse=True)
    return EvidenceReferences(
        classes=classes,
        rows=[row for name in classes for row in members[name]],
        labels=np.repeat(np.arange(len(classes)), [len(members[name]) for name in classes]),
        made=np.array([m for name in classes for m in made[name]], dtype=np.bool_),
        folds=numbers.astype(np.int64),
        n_folds=len(used),
    )


def _partner(rows: list[Row], fold: list[int], own: int, rng: np.random.Generator) -> Row:
    """A row of the same fold where there is one, so that no damage carries text across a split."""
    same = [row for row, f in zip(rows, fold, strict=True) if f == own] or rows
    return same[int(rng.integers(len(same)))]


def _over_refusals(
    members: Mapping[str, list[Row]], fold: Mapping[str, list[int]], seed: int, echo: bool
) -> tuple[list[Row], list[int]]:
    rng = np.random.default_rng(derive(seed, "evidence", "over-refusals"))
    rare = rare_words([row["prompt"] for name in ("safe", "utility") for row in members[name]])
    made: list[Row] = []
    for row, f in zip(members["utility"], fold["utility"], strict=True):
        refusal = _partner(members["safe"], fold["safe"], f, rng)
        completion = retargeted(refusal, row["prompt"], rare) if echo else refusal["completion"]
        made.append({**row, "completion": completion})
    return made, list(fold["utility"])


def _terse(rows: list[Row], fold: list[int], seed: int) -> tuple[list[Row], list[int]]:
    """Each row with one longer word of its completion as the whole answer; rows that have none are passed over."""
    rng = np.random.default_rng(derive(seed, "evidence", "terse"))
    made: list[Row] = []
    folds: list[int] = []
    for row, f in zip(rows, fold, strict=True):
        words = [word for word in re.findall(r"\w+", row["completion"]) if len(word) > _SHORT_WORD]
        if words:
            made.append({**row, "completion": words[int(rng.integers(len(words)))]})
            folds.append(f)
    return made, folds


def _corrupted(
    members: Mapping[str, list[Row]], fold: Mapping[str, list[int]], per_row: int, seed: int
) -> tuple[list[Row], list[int]]:
    rng = np.random.default_rng(derive(seed, "evidence", "corruptions"))
    kinds = list(CORRUPTIONS)
    made: list[Row] = []
    folds: list[int] = []
    for name, other in (("safe", "utility"), ("utility", "utility")):
        # A refusal under another harmful prompt is mostly still a good one; so swaps bring in benign answers.
        source = other if members[other] else name
        for row, f in zip(members[name], fold[name], strict=True):
            for _ in range(per_row if name == "safe" else (per_row + 1) // 2):
                partner = _partner(members[source], fold[source], f, rng)
                kind = kinds[len(made) % len(kinds)]
                made.append({**row, "completion": corrupt(row["completion"], kind, rng, partner["completion"])})
                folds.append(f)
    return made, folds


def _misplaced(rows: list[Row], fold: list[int], seed: int) -> tuple[list[Row], list[int]]:
    """Prompts of safe rows with the refusal of another request, where it names that request and none of this one.

    Most refusals fit any harmful prompt and are good ones there: those must not pass for damage.
    """
    rng = np.random.default_rng(derive(seed, "evidence", "misplaced"))
    rare = rare_words([row["prompt"] for row in rows])
    made: list[Row] = []
    folds: list[int] = []
    for row, f in zip(rows, fold, strict=True):
        partner = _partner(rows, fold, f, rng)
        named = echoed(partner["prompt"], partner["completion"], rare) >= _OF_ITS_OWN
        if named and not echoed(row["prompt"], partner["completion"], rare):
            made.append({**row, "completion": partner["completion"]})
            folds.append(f)
    return made, folds
