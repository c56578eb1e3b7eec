"""Exact match: the answer equals its target, white space and case aside; contained in it counts as ``substring``."""

from collections.abc import Mapping, Sequence
from typing import Any

from pharmacist.core.errors import DataError
from pharmacist.evaluation.graders.base import Grade, Matching


class Exact(Matching):
    """See the module."""

    name = "exact"
    version = 1
    matching = ("exact", "substring")

    @classmethod
    def fits(cls, targets: Sequence[str]) -> bool:
        """Any text does."""
        del targets
        return True

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuses empty targets, which every answer would contain."""
        for number, row in enumerate(rows):
            if not row["completion"].strip():
                raise DataError(f"--task: row {number} has an empty target; mend or delete it")

    def right(self, target: str, answer: str) -> Grade:
        """Equality, and containment."""
        return Grade(_plain(target) == _plain(answer), _plain(target) in _plain(answer))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
