"""Exact match: the answer equals its target, white space and case aside; contained in it counts as ``substring``."""

from collections.abc import Sequence

from pharmacist.core.errors import DataError
from pharmacist.evaluation.tasks.base import Grade, Task


class Exact(Task):
    """See the module."""

    name = "exact"
    version = 1
    matching = ("exact", "substring")

    def prepare(self, targets: Sequence[str]) -> None:
        """Refuses empty targets, which every answer would contain."""
        for row, target in enumerate(targets):
            if not target.strip():
                raise DataError(f"--task: row {row} has an empty target; mend or delete it")

    def grade(self, targets: Sequence[str], answers: Sequence[str]) -> list[Grade]:
        """Equality, and containment."""
        pairs = [(_plain(target), _plain(answer)) for target, answer in zip(targets, answers, strict=True)]
        return [Grade(target == answer, target in answer) for target, answer in pairs]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
