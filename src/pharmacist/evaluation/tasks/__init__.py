"""Tasks: grade answers against targets. A new kind is one file and one line in `TASKS`."""

from collections.abc import Sequence
from typing import Any

from pharmacist.core.registry import Registry
from pharmacist.evaluation.tasks.base import Grade, Task, TaskItem


_TABLE = {
    "classification": "pharmacist.evaluation.tasks.classification:Classification",
    "exact": "pharmacist.evaluation.tasks.exact:Exact",
    "number": "pharmacist.evaluation.tasks.number:Number",
    "win-rate": "pharmacist.evaluation.tasks.win_rate:WinRate",
}
TASKS: Registry[Task[Any]] = Registry("task type", _TABLE, group="pharmacist.tasks")
TASK_TYPES: Registry[Any] = Registry(
    "task type", _TABLE | {"auto": "pharmacist.evaluation.tasks.base:Auto"}, group="pharmacist.tasks"
)


def detect_task(targets: Sequence[str]) -> str:
    """The kind of task that a file holds, by its targets.

    A final number after a marker (GSM8K) is ``number``; a few short targets that repeat are labels of a
    ``classification``; all else is ``exact``. A judge of ``win-rate`` must be chosen.
    """
    from pharmacist.evaluation.tasks import classification, number

    if all(number.has_marker(target) for target in targets):
        return "number"
    return "classification" if classification.looks_like_labels(targets) else "exact"


__all__ = ["TASKS", "TASK_TYPES", "Grade", "Task", "TaskItem", "detect_task"]
