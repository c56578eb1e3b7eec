"""Started by the launcher: gradients and metrics of the first two steps of every alignment-stage defense."""

from pathlib import Path

import torch

from tests.support.defense_cases import NAMES, build, streams
from tests.support.training_toy import Watch, options, randomise_lora_b, rows, setting, sft, trainer, write_gradients


STOCK = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
"""What the stock Trainer logs."""


def gradients(model: Path, output: Path, size: int) -> dict[str, torch.Tensor]:
    """Name of defense, accumulation, step and parameter -> gradient; ``metrics`` before all that -> logged number.

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
            training = trainer(own, strategy, watch, streams=streams(own, batch), strategy_seed=5)
            training.train()
            for step, (grads, line) in enumerate(zip(watch.grads, training.state.log_history, strict=False)):
                where = f"{name}.{accumulation}.{step}"
                found |= {f"{where}.{key}": grad for key, grad in grads.items()}
                logged = {key: torch.tensor(line[key], dtype=torch.float64) for key in line.keys() - STOCK}
                found |= {f"metrics.{where}.{key}": value for key, value in logged.items()}
    return found


if __name__ == "__main__":
    write_gradients(gradients)
