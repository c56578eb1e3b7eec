"""Graders: is an answer to the fine-tuning task right? A new kind is one file and one line in `GRADERS`."""

from collections.abc import Sequence
from typing import Any

from pharmacist.core.registry import Registry
from pharmacist.evaluation.graders.base import Grade, GradeItem, Grader


_TABLE = {
    "number": "pharmacist.evaluation.graders.number:Number",
    "classification": "pharmacist.evaluation.graders.classification:Classification",
    "exact": "pharmacist.evaluation.graders.exact:Exact",
    "win-rate": "pharmacist.evaluation.graders.win_rate:WinRate",
}
"""In the order in which ``auto`` tries them."""
_AUTO = {"auto": "pharmacist.evaluation.graders.base:Auto"}
GRADERS: Registry[Grader] = Registry("task type", _TABLE, group="pharmacist.graders")
TASK_TYPES: Registry[Any] = Registry("task type", _TABLE | _AUTO, group="pharmacist.graders")


def detect_grader(targets: Sequence[str]) -> str:
    """The name of the first grader that fits these targets (`Grader.fits`)."""
    return next(name for name in _TABLE if GRADERS.get(name).fits(targets))


__all__ = ["GRADERS", "TASK_TYPES", "Grade", "GradeItem", "Grader", "detect_grader"]
