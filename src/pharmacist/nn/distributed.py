"""The few things that data-parallel selection needs: processes meet, and share out independent jobs."""

from collections.abc import Sequence
from typing import TypeVar

from pharmacist.core.env import rank, world_size


T = TypeVar("T")


def barrier() -> None:
    """Waits until every process of the launcher has come here; nothing without a launcher."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def my_share(jobs: Sequence[T]) -> list[T]:
    """The jobs of this process: every `world_size`-th."""
    return list(jobs[rank() :: world_size()])


def from_main(value: T) -> T:
    """The first process's `value`, on every process: what it decides, all do."""
    if world_size() > 1:
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        PartialState()
        values = [value]
        broadcast_object_list(values)
        return values[0]
    return value
