"""Communication of data-parallel runs: barriers, shares of independent jobs, sums and concatenated rows."""

import atexit
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from pharmacist.core.env import process_index, world_size
from pharmacist.core.errors import PharmacistError


if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@cache
def _operations() -> Any:
    """The functions of accelerate, for processes that have found each other."""
    import torch
    import torch.distributed as dist
    from accelerate import PartialState, utils

    # A process that exits with open connections can be aborted by their threads, after all its work is done.
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    # Without cpu=True accelerate sees a single process on CPUs, so none would wait.
    # The first process may ask an endpoint for hours, for which the others wait.
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    return utils


def barrier() -> None:
    """Waits until every process of the launcher has reached this call; does nothing without a launcher."""
    if world_size() > 1:
        _operations().wait_for_everyone()


def my_share(jobs: Sequence[T]) -> list[T]:
    """The jobs of this process: every `world_size`-th of them."""
    return list(jobs[process_index() :: world_size()])


def from_main(value: T) -> T:
    """The first process's `value`, broadcast to every process."""
    if world_size() > 1:
        values = [value]
        _operations().broadcast_object_list(values)
        return values[0]
    return value


def on_main(job: Callable[[], T]) -> T:
    """What the first process's `job` returns, on every process; what it raises is raised on every process too."""
    if world_size() == 1:
        return job()
    found: list[T] = []
    failure: Exception | None = None
    if process_index() == 0:
        try:
            found = [job()]
        except Exception as error:  # the others would wait for ever
            failure = error
    told = failure is None or isinstance(failure, PharmacistError)
    found, raised = from_main((found, failure if told else RuntimeError(f"the first process failed: {failure!r}")))
    failure = failure or raised
    if failure is not None:
        raise failure
    return found[0]


def from_all(value: T) -> list[T]:
    """Every process's `value`, in the order of the processes; the same on each."""
    return [value] if world_size() == 1 else list(_operations().gather_object([value]))


def total(tensor: "torch.Tensor") -> "torch.Tensor":
    """Sum of a tensor over all processes, detached; the same on each."""
    if world_size() == 1:
        return tensor.detach()
    summed: torch.Tensor = _operations().reduce(tensor.detach().clone(), reduction="sum")
    return summed


def all_rows(tensor: "torch.Tensor") -> "tuple[torch.Tensor, int]":
    """Concatenates the rows of all processes, detached; their number and length may differ between processes.

    A tensor of shape [rows, length, ...] becomes one of shape [all rows, greatest length, ...], padded with zeros; the
    number of this process's first row comes with it.
    """
    if world_size() == 1:
        return tensor.detach(), 0
    import torch

    gather = _operations().gather
    sizes = gather(torch.tensor([tensor.shape[:2]], device=tensor.device))
    rows, length = sizes.max(0).values.tolist()
    padded = tensor.new_zeros((1, rows, length, *tensor.shape[2:]))
    padded[0, : tensor.shape[0], : tensor.shape[1]] = tensor.detach()
    gathered = gather(padded)
    counts = sizes[:, 0].tolist()
    parts = [part[:count] for part, count in zip(gathered, counts, strict=True)]
    return torch.cat(parts), sum(counts[: process_index()])
