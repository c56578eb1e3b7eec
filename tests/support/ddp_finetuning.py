"""Started by the launcher: gradients of the first steps of every fine-tuning-stage defense, and EWC's information."""

import sys
from pathlib import Path

import torch

from pharmacist.data.streams import SideStream
from pharmacist.data.tokenize import encode
from tests.support.defense_cases import FINETUNING, build
from tests.support.training_toy import Watch, options, randomise_lora_b, rows, setting, sft, trainer, write_gradients


STEPS = 3
FISHER = {
    f"ewc {per} {norm}": {"lam": 1.0, "rows": 10, "per": per, "normalize": norm}
    for per in ("row", "batch")
    for norm in ("mean", "sum")
}


def gradients(model: Path, output: Path, size: int, accumulation: int) -> dict[str, torch.Tensor]:
    """Name of defense, accumulation, step and parameter -> gradient; of EWC's forms, parameter -> information.

    Args:
        model: Folder of the tiny model.
        output: Where the Trainer may write.
        size: Rows per process and update, of the user's rows and of the safe ones.
        accumulation: Micro-batches of an update.
    """
    found: dict[str, torch.Tensor] = {}
    batch = size // accumulation
    # Plain descent: Adam's first steps have one length, whatever the gradient, and would hide what it does.
    given = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.5,
    }
    for name, config in ({"sft": {}} | FINETUNING | FISHER).items():
        steps = 1 if name in FISHER else STEPS
        own = setting(options(model, output, max_steps=steps, **given), rows(24))
        own.model.double()
        randomise_lora_b(own.model)
        strategy = sft() if name == "sft" else build(name.split()[0], config)
        loaded, watch = own.loaded, Watch()
        safe = encode(rows(9, seed=5), loaded.tokenizer, loaded.template, max_length=64)
        streams = {"safe": SideStream(safe, batch, seed=1, pad_token_id=loaded.tokenizer.pad_token_id)}
        trainer(own, strategy, watch, streams=streams, strategy_seed=5).train()
        if name in FISHER:
            found |= {f"{name}.{key}": value for key, value in strategy.fisher.items()}
            continue
        for step, grads in enumerate(watch.grads):
            found |= {f"{name}.{accumulation}.{step}.{key}": grad for key, grad in grads.items()}
    return found


if __name__ == "__main__":
    write_gradients(gradients, int(sys.argv[3]))
