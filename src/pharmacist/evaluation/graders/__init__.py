"""Graders: is an answer to the fine-tuning task right? A new kind is one file and one line in `GRADERS`."""

from collections.abc import Sequence
from typing import Any

from pharmacist.core.registry import Registry
from pharmacist.evaluation.graders.base import Grade, GradeItem, Grader


_TABLE = {
    "classification": "pharmacist.evaluation.graders.classification:Classification",
    "exact": "pharmacist.evaluation.graders.exact:Exact",
    "number": "pharmacist.evaluation.graders.number:Number",
    "win-rate": "pharmacist.evaluation.graders.win_rate:WinRate",
}
GRADERS: Registry[Grader[Any]] = Registry("task type", _TABLE, group="pharmacist.graders")
TASK_TYPES: Registry[Any] = Registry(
    "task type", _TABLE | {"auto": "pharmacist.evaluation.graders.base:Auto"}, group="pharmacist.graders"
)


def detect_grader(targets: Sequence[str]) -> str:
    """The kind of task that a file holds, by its targets.

    A final number after a marker (GSM8K) is ``number``; a few short targets that repeat are labels of a
    ``classification``; all else is ``exact``. A judge of ``win-rate`` must be chosen.
    """
    from pharmacist.evaluation.graders import classification, number

    if all(number.has_marker(target) for target in targets):
        return "number"
    return "classification" if classification.looks_like_labels(targets) else "exact"


__all__ = ["GRADERS", "TASK_TYPES", "Grade", "GradeItem", "Grader", "detect_grader"]
