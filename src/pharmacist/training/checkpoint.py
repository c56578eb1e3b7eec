"""Checkpoints at intervals of time, written whole, with the state of strategy and streams besides the Trainer's."""

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from pharmacist.core.env import process_index, world_size
from pharmacist.core.errors import CompatibilityError, DataError
from pharmacist.core.files import read_json, remove, sync, write_json
from pharmacist.core.progress import say
from pharmacist.nn.distributed import barrier, from_main, on_main
from pharmacist.training.strategy import GradientStrategy, StrategyState


_COMPLETE = "strategy.json"


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Saves a strategy's state with every checkpoint of the Trainer, and marks it complete when it is on the disk.

    There are `seconds` between checkpoints, and the last step is logged; None leaves both to the Trainer's arguments.
    Of the strategy's auxiliary `streams` those with a ``position`` have it saved.
    """

    def __init__(
        self, strategy: GradientStrategy, seconds: float | None = None, streams: Mapping[str, Any] | None = None
    ) -> None:
        self.strategy, self.seconds, self.streams = strategy, seconds, streams or {}
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Lets the first process decide for all when a checkpoint is due; logs the last step in any case."""
        if self.seconds is None:
            return
        control.should_log |= state.global_step >= state.max_steps
        due = from_main(time.monotonic() - self._last >= self.seconds)
        if due and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Adds the strategy's state; ``strategy.json`` is written last and marks a complete checkpoint."""
        barrier()  # every process has written its part
        self._last = time.monotonic()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            own = self.strategy.state()
            save_file({k: v.contiguous() for k, v in own.tensors.items()}, folder / "strategy.safetensors")
            sync(folder)
            positions = {n: stream.position for n, stream in self.streams.items() if hasattr(stream, "position")}
            paths = (path for path in folder.rglob("*") if path.is_file())  # adapters of other names lie in folders
            files = {path.relative_to(folder).as_posix(): _digest(path) for path in paths}
            write_json(folder / _COMPLETE, {"strategy": own.values, "streams": positions, "files": files})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def _is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is as it was written."""
    try:
        files = read_json(folder / _COMPLETE)["files"]
        return all(_digest(folder / name) == digest for name, digest in files.items())
    except (DataError, OSError, KeyError, TypeError, AttributeError):
        return False


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder; None where none was ever completed.

    Those that a kill left incomplete, and damaged ones where there is a whole one, are deleted: among the ones that
    the Trainer keeps, they would push out whole ones.

    Raises:
        DataError: There are checkpoints, and all are damaged.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    complete = [path for path in found if (path / _COMPLETE).is_file()]
    whole = on_main(lambda: next((path for path in complete if _is_whole(path)), None))
    if complete and whole is None:
        raise DataError(
            f"{folder}: no checkpoint in it is intact, {complete[0].name} and all before it are damaged; delete this "
            "folder, and the same command begins the training again"
        )
    if process_index() == 0:
        damaged = complete[: complete.index(whole)] if whole is not None else []
        for path in damaged:
            say(f"{path}: is damaged; the training continues from the checkpoint before it")
        for path in {*found} - {*complete} | {*damaged}:
            remove(path)
    barrier()
    return whole


def load_strategy_state(folder: Path, strategy: GradientStrategy, streams: Mapping[str, Any]) -> None:
    """Restores the state of the strategy and the positions of its streams from a checkpoint.

    Raises:
        DataError: The checkpoint is incomplete, of a Trainer without a strategy, or of one with other streams.
        CompatibilityError: Another number of processes wrote it, whose batches and random states were others.
    """
    if not (folder / _COMPLETE).is_file():
        raise DataError(
            f"{folder}: has no {_COMPLETE}, so it is incomplete, or of a Trainer without a strategy; delete it to "
            "continue from the checkpoint before it"
        )
    values = read_json(folder / _COMPLETE)
    # The Trainer writes the random state of every process, unless it is told to save the model only.
    processes = len(list(folder.glob("rng_state*.pth")))
    if processes not in (0, world_size()):
        raise CompatibilityError(
            f"{folder}: was written by another number of processes ({processes}, now {world_size()}), whose batches "
            "and random numbers were others; start that many, or delete the checkpoints to begin again"
        )
    for name in values["streams"]:
        if not hasattr(streams.get(name), "position"):
            raise DataError(f"{folder}: was trained with a stream '{name}' that can resume, and now there is none")
    strategy.load_state(StrategyState(load_file(folder / "strategy.safetensors"), values["strategy"]))
    for name, position in values["streams"].items():
        streams[name].position = position
