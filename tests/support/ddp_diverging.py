"""Started by the launcher: trainings in which the second process alone meets a number that is not finite."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from pharmacist.core.env import process_index
from pharmacist.core.errors import DivergedError
from pharmacist.nn.distributed import barrier, from_main
from pharmacist.nn.grads import Gradient
from pharmacist.training.strategy import StepContext
from tests.support.training_toy import Toy, options, setting, trainer


def broken(step: StepContext, value: torch.Tensor) -> torch.Tensor:
    return value * float("nan") if process_index() == 1 and step.update == 1 else value


class Main(Toy):
    """In the main loss."""

    def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        return broken(step, loss)


class Auxiliary(Toy):
    """In the loss of an auxiliary pass."""

    def auxiliary(self, step: StepContext) -> Gradient:
        return step.grads(broken(step, step.ce(step.batch)))


class Checked(Toy):
    """In what a strategy checks itself."""

    def auxiliary(self, step: StepContext) -> None:
        step.check(broken(step, torch.ones(())))


STRATEGIES = (Main, Auxiliary, Checked)

if __name__ == "__main__":
    model, folder, found = Path(sys.argv[1]), Path(sys.argv[2]), dict[str, Any]()
    for strategy in STRATEGIES:
        own = trainer(setting(options(model, folder / "training")), strategy())
        try:
            own.train()
        except DivergedError as error:
            # What the first process says next, as where a sweep goes on with its next attack.
            found[strategy.__name__] = {"message": str(error), "then": from_main("together"), "rows": own._rows}
    (folder / f"rank{process_index()}.json").write_text(json.dumps(found))
    barrier()
