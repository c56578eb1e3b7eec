"""The grader `exact`."""

from collections.abc import Sequence

from pharmacist.evaluation.graders.base import Grade, Matching


class Exact(Matching):
    """The answer equals its target, apart from white space and case; one that contains it counts as ``substring``."""

    matching = ("exact", "substring")

    @classmethod
    def fits(cls, targets: Sequence[str]) -> bool:
        return True

    def problem(self, target: str) -> str:
        return "" if target.strip() else "has an empty target; fix or delete it"

    def right(self, target: str, answer: str) -> Grade:
        right, plain = (" ".join(text.casefold().split()) for text in (target, answer))
        return Grade(right == plain, right in plain)
