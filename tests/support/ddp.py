"""Started by the launcher: gradients of the first two steps of every alignment-stage defense."""

from pathlib import Path

import torch

from tests.support.defense_cases import NAMES, build, streams
from tests.support.training_toy import Watch, options, randomise_lora_b, rows, setting, sft, trainer, write_gradients


def gradients(model: Path, output: Path, size: int) -> dict[str, torch.Tensor]:
    """Name of defense, accumulation, step and parameter -> gradient.

    Args:
        model: Folder of the tiny model.
        output: Where the Trainer may write.
        size: Rows per process and update, of the alignment set and of a batch of every stream.
    """
    found: dict[str, torch.Tensor] = {}
    for accumulation in (1, 2):
        batch = size // accumulation
        given = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        for name in ["sft", *NAMES]:
            own = setting(options(model, output, max_steps=2, learning_rate=1e-4, **given), rows(16))
            watch = Watch()
            own.model.double()
            randomise_lora_b(own.model)
            strategy = sft() if name == "sft" else build(name)
            trainer(own, strategy, watch, streams=streams(own, batch), strategy_seed=5).train()
            for step, grads in enumerate(watch.grads):
                found |= {f"{name}.{accumulation}.{step}.{key}": grad for key, grad in grads.items()}
    return found


if __name__ == "__main__":
    write_gradients(gradients)
