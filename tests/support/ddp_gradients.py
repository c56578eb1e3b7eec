"""Started by the launcher: the first gradient of some strategies, as the optimizer is about to use it."""

from pathlib import Path
from typing import Any

import torch

from pharmacist.core.env import process_index, world_size
from pharmacist.nn.grads import Gradient, norm, shifted
from pharmacist.training.strategy import StepContext
from tests.support.training_toy import (
    Constant,
    Numbers,
    Toy,
    Twice,
    Watch,
    options,
    randomise_lora_b,
    setting,
    sft,
    trainer,
    write_gradients,
)


class Sharp(Toy):
    """The gradient where the weights are moved along the gradient of unit length: not linear in its parts."""

    def auxiliary(self, step: StepContext) -> Gradient:
        own = step.grads(step.ce(step.batch))
        with shifted(step.parameters, own, 0.2 / float(norm(own))):
            return step.grads(step.ce(step.batch))


def carried() -> Constant:
    """What one process alone adds reaches all: the synchronising backward takes along what is in ``.grad``."""
    return Constant(1.0 + process_index() if world_size() == 2 else 1.5)


STRATEGIES: dict[str, Any] = {"sft": sft, "carried": carried, "twice": Twice, "sharp": Sharp}


def first_gradients(model: Path, output: Path, size: int) -> dict[str, torch.Tensor]:
    """Name of strategy, accumulation and parameter -> gradient, and the rows that it is of."""
    found: dict[str, torch.Tensor] = {}
    for accumulation in (1, 2):
        given = {"per_device_train_batch_size": size // accumulation, "gradient_accumulation_steps": accumulation}
        for name, strategy in STRATEGIES.items():
            own, watch = setting(options(model, output, max_steps=1, **given)), Watch()
            randomise_lora_b(own.model)
            numbers = Numbers(0)
            trainer(own, strategy(), watch, collator=numbers).train()
            found |= {f"{name}.{accumulation}.{key}": grad for key, grad in watch.grads[0].items()}
            found[f"{name}.{accumulation}.rows"] = torch.tensor(sum(numbers.batches[:accumulation], []))
    return found


if __name__ == "__main__":
    write_gradients(first_gradients)
