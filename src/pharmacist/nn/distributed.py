"""The few things that data-parallel selection needs: processes meet, and share out independent jobs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from pharmacist.core.env import rank, world_size


if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")


def _state() -> "PartialState":
    import torch
    from accelerate import PartialState

    # accelerate counts processes on CPUs only when it is told that this is a run on CPUs; else nobody would wait.
    return PartialState(cpu=not torch.cuda.is_available())


def barrier() -> None:
    """Waits until every process of the launcher has come here; nothing without a launcher."""
    if world_size() > 1:
        _state().wait_for_everyone()


def my_share(jobs: Sequence[T]) -> list[T]:
    """The jobs of this process: every `world_size`-th."""
    return list(jobs[rank() :: world_size()])


def from_main(value: T) -> T:
    """The first process's `value`, on every process: what it decides, all do."""
    if world_size() > 1:
        from accelerate.utils import broadcast_object_list

        _state()
        values = [value]
        broadcast_object_list(values)
        return values[0]
    return value
