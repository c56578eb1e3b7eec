"""Started by the launcher: gradients of the first two steps of every alignment-stage defense."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils import logging

from pharmacist.core.env import rank, world_size
from pharmacist.nn.distributed import barrier
from tests.support.defense_cases import NAMES, build, streams
from tests.support.training_toy import Watch, options, rows, setting, sft, trainer


def gradients(model: Path, output: Path, size: int) -> dict[str, torch.Tensor]:
    """Name of defense, accumulation, step and parameter -> gradient.

    Args:
        model: Folder of the tiny model.
        output: Where the Trainer may write.
        size: Rows per process and update, of the alignment set and of each side stream's batch.
    """
    found: dict[str, torch.Tensor] = {}
    for accumulation in (1, 2):
        batch = size // accumulation
        given = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        for name in ["sft", *NAMES]:
            own = setting(options(model, output, max_steps=2, learning_rate=1e-4, **given), rows(16))
            watch = Watch()
            own.model.double()
            with torch.no_grad():
                for key, weight in own.model.named_parameters():
                    if "lora_B" in key:  # which are 0, so that those before them would have no gradient
                        weight.normal_(std=0.1, generator=torch.Generator().manual_seed(len(key)))
            strategy = sft() if name == "sft" else build(name)
            trainer(own, strategy, watch, streams=streams(own, batch), strategy_seed=5).train()
            for step, grads in enumerate(watch.grads):
                found |= {f"{name}.{accumulation}.{step}.{key}": grad for key, grad in grads.items()}
    return found


if __name__ == "__main__":
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    save_file(gradients(Path(sys.argv[1]), folder, 4), folder / f"rank{rank()}.safetensors")
    assert world_size() == 2
    barrier()
