"""The grader `exact`."""

from collections.abc import Mapping, Sequence
from typing import Any

from pharmacist.core.errors import DataError
from pharmacist.evaluation.graders.base import Grade, Matching


class Exact(Matching):
    """The answer equals its target, apart from white space and case; one that contains it counts as ``substring``."""

    version = 1
    matching = ("exact", "substring")

    @classmethod
    def fits(cls, targets: Sequence[str]) -> bool:
        return True

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for number, row in enumerate(rows):
            if not row["completion"].strip():
                raise DataError(f"--task: row {number} has an empty target; mend or delete it")

    def right(self, target: str, answer: str) -> Grade:
        right, plain = (" ".join(text.casefold().split()) for text in (target, answer))
        return Grade(right == plain, right in plain)
