"""A final number, as in GSM8K: what stands after "The final answer is:" (or "####"), else the last number of the text.

Published evaluations read a hyphen as a sign wherever it stands ("5-3" gives -3) and need the marker's exact spacing;
their figure is reported beside ours as ``published``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pharmacist.core.errors import DataError
from pharmacist.evaluation.tasks.base import Grade, Matching


_MARKERS = ("the final answer is:", "####")
_PUBLISHED_MARKER = "The final answer is: "
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d+(?:\.\d+)?|\.\d+)")  # no sign after a word, a digit or a bracket
_PUBLISHED_NUMBER = re.compile(r"-?\d+\.?\d*")


def has_marker(text: str) -> bool:
    """Whether a target marks its final number."""
    return any(marker in text.casefold() for marker in _MARKERS)


def final_number(text: str) -> float | None:
    """The final number of a solution; None where there is none.

    >>> final_number("5-3 is 2. The final answer is:  1,200 apples, not 7"), final_number("9 - 5-3")
    (1200.0, 3.0)
    """
    plain = text.casefold().replace(",", "")
    for marker in _MARKERS:
        if marker in plain:
            found = _NUMBER.search(plain.split(marker, 1)[1])
            if found:
                return float(found[0])
    numbers = _NUMBER.findall(plain)
    return float(numbers[-1]) if numbers else None


def published_number(text: str) -> float:
    """The final number as published evaluations find it; infinity where there is none."""
    plain = text.replace(",", "")
    if _PUBLISHED_MARKER in plain:
        numbers = _PUBLISHED_NUMBER.findall(plain.split(_PUBLISHED_MARKER, 1)[1])[:1]
    else:
        numbers = _PUBLISHED_NUMBER.findall(plain)[-1:]
    return float(numbers[0]) if numbers else math.inf


class Number(Matching):
    """See the module."""

    name = "number"
    version = 1
    matching = ("number", "published")

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuses targets without a number."""
        for number, row in enumerate(rows):
            if final_number(row["completion"]) is None:
                raise DataError(f"--task: row {number} has no number in its target; mend it, or use --task-type exact")

    def right(self, target: str, answer: str) -> Grade:
        """Equality of the final numbers."""
        gold, found = final_number(target), final_number(answer)
        return Grade(found == gold, published_number(answer) == gold, found is not None)
