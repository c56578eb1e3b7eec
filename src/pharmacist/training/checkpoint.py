"""Checkpoints by the clock, complete or not there; the strategy's state beside the Trainer's."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from pharmacist.core.env import rank
from pharmacist.core.files import write_json
from pharmacist.nn.distributed import barrier, from_main
from pharmacist.training.strategy import GradientStrategy, StrategyState


_COMPLETE = "strategy.json"


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint every so many seconds, and marks it complete when all of it is on the disk.

    Args:
        strategy: Its state is saved too.
        seconds: Between two checkpoints.
        streams: Side streams; where each stands (its ``position``, if it has one) is saved too.
    """

    def __init__(
        self, strategy: GradientStrategy, seconds: float, streams: Mapping[str, Any] | None = None
    ) -> None:  # fmt: skip
        self.strategy, self.seconds, self.streams = strategy, seconds, streams or {}
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decides on the first process, for all; the last step is logged, however few there are."""
        control.should_log |= state.global_step >= state.max_steps
        due = from_main(time.monotonic() - self._last >= self.seconds)
        if due and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Adds the strategy's state; ``strategy.json`` comes last and means complete."""
        barrier()  # every process has written its part
        self._last = time.monotonic()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            own = self.strategy.state()
            save_file({k: v.contiguous() for k, v in own.tensors.items()}, folder / "strategy.safetensors")
            for path in folder.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            positions = {n: stream.position for n, stream in self.streams.items() if hasattr(stream, "position")}
            write_json(folder / _COMPLETE, {"strategy": own.values, "streams": positions})


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder.

    Those that a kill left incomplete are deleted: among the ones that the Trainer keeps, they would push out complete
    ones.
    """
    if rank() == 0:
        for path in folder.glob("checkpoint-*"):
            if not (path / _COMPLETE).is_file():
                shutil.rmtree(path)
    barrier()
    found = [path.parent for path in folder.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def load_side_state(folder: Path, strategy: GradientStrategy, streams: Mapping[str, Any]) -> None:
    """Brings strategy and side streams to where they stood at a checkpoint."""
    values = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
    strategy.load_state(StrategyState(load_file(folder / "strategy.safetensors"), values["strategy"]))
    for name, position in values["streams"].items():
        streams[name].position = position
