"""Small trainings on the tiny Llama, and strategies that do one thing each."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from pharmacist.core.env import process_index, world_size
from pharmacist.core.rundir import RunDir
from pharmacist.data.tokenize import Encoded, encode
from pharmacist.defenses.alignment.sft import SFT
from pharmacist.nn.distributed import barrier
from pharmacist.nn.grads import Gradient
from pharmacist.nn.models import LoadedModel, load_model
from pharmacist.training.loop import Training, TrainResult, _collate, prepare_model
from pharmacist.training.options import LoraOptions, TrainingStageOptions, training_arguments
from pharmacist.training.strategy import GradientStrategy, StepContext, StrategyState
from pharmacist.training.trainer import StrategyTrainer, token_mean_loss
from tests.support.tiny import WORDS


SEED = 7


class Toy(GradientStrategy):
    """A strategy without options."""

    def __init__(self) -> None:
        super().__init__()


class Constant(Toy):
    """Adds a constant gradient."""

    def __init__(self, value: float = 0.5) -> None:
        super().__init__()
        self.value = value

    def auxiliary(self, step: StepContext) -> Gradient:
        return {name: torch.full_like(own, self.value) for name, own in step.parameters.items()}


class Alone(Constant):
    """Takes the main gradient away."""

    def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        return loss * 0


class Twice(Toy):
    """Adds the main batch's own gradient, from an auxiliary pass."""

    def auxiliary(self, step: StepContext) -> Gradient:
        return step.grads(step.ce(step.batch))


class Noise(Toy):
    """Adds gradient noise from a generator of its own, which is its state."""

    def setup(self, model: nn.Module, seed: int) -> dict[str, Any]:
        self.generator, self.draws = torch.Generator().manual_seed(seed), 0
        return {"seed": seed}

    def auxiliary(self, step: StepContext) -> Gradient:
        self.draws += 1
        return {name: torch.randn(own.shape, generator=self.generator) for name, own in step.parameters.items()}

    def state(self) -> StrategyState:
        return StrategyState({"generator": self.generator.get_state()}, {"draws": self.draws})

    def load_state(self, state: StrategyState) -> None:
        self.generator.set_state(state.tensors["generator"])
        self.draws = state.values["draws"]


class Stop(TrainerCallback):
    """What happens to a run in the middle of a step: control-C."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


class Watch(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use, per step."""

    def __init__(self) -> None:
        self.grads: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.grads.append({name.removeprefix("module."): grad for name, grad in own.items()})


class Numbers:
    """Keeps the row numbers of every batch; `hidden` keeps them from the Trainer."""

    def __init__(self, pad_token_id: int, hidden: bool = False) -> None:
        self.pad_token_id, self.hidden, self.batches = pad_token_id, hidden, []

    def __call__(self, items: Any) -> dict[str, torch.Tensor]:
        batch = _collate(items, self.pad_token_id)
        self.batches.append(batch["row"].tolist())
        if self.hidden:
            del batch["row"]
        return batch


def sft() -> SFT:
    """Plain fine-tuning."""
    return SFT()


def rows(n: int = 12, seed: int = 0) -> datasets.Dataset:
    """Rows of random words whose completions differ much in length; their numbers start at 100."""
    rng = np.random.default_rng(seed)
    words = lambda longest: " ".join(rng.choice(WORDS, rng.integers(1, longest)))  # noqa: E731
    made = [{"row": 100 + i, "prompt": words(8), "completion": words(25 if i % 2 else 4)} for i in range(n)]
    return datasets.Dataset.from_list(made)


def options(model: Path, output: Path, *, dropout: float = 0.0, **train_options: Any) -> TrainingStageOptions:
    """Few steps of AdamW, unclipped, on small batches."""
    given = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_grad_norm": 0.0}
    return TrainingStageOptions(
        output_dir=str(output),
        model=str(model),
        device="cpu",
        seed=SEED,
        checkpoint_seconds=0,
        lora=LoraOptions(r=4, dropout=dropout),
        train=given | {"logging_steps": 1} | train_options,
    )


@dataclass
class Setting:
    """A model that can be trained, its rows and its options."""

    loaded: LoadedModel
    model: nn.Module
    encoded: Encoded
    options: TrainingStageOptions

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of all that is trained."""
        own = self.model.named_parameters()
        return {name: value.detach().clone() for name, value in own if value.requires_grad}


def setting(given: TrainingStageOptions, data: datasets.Dataset | None = None) -> Setting:
    """Loads and prepares anew; equal options give equal weights."""
    loaded = load_model(given.model, device="cpu")
    encoded = encode(rows() if data is None else data, loaded.tokenizer, loaded.template, max_length=64)
    loaded = prepare_model(loaded, given)
    return Setting(loaded, loaded.model, encoded, given)


def trainer(
    own: Setting,
    strategy: GradientStrategy | None,
    *callbacks: TrainerCallback,
    collator: Numbers | None = None,
    cls: type[Trainer] = StrategyTrainer,
    **more: Any,
) -> Trainer:
    """A Trainer of ours, or the stock one where there is no strategy."""
    arguments = training_arguments(
        own.options, folder=own.options.output_dir, device=torch.device("cpu"), bf16=False, seed=SEED
    )
    given = {"compute_loss_func": token_mean_loss, "strategy": strategy} if strategy is not None else {}
    given |= {"train_dataset": own.encoded.dataset}
    return cls(
        model=own.model,
        args=arguments,
        callbacks=list(callbacks),
        data_collator=collator or Numbers(own.loaded.tokenizer.pad_token_id, hidden=strategy is None),
        **(given | more),
    )


def trained(own: Setting, strategy: GradientStrategy, *callbacks: TrainerCallback) -> TrainResult:
    """The training of a stage, in its output folder."""
    with opened(own.options) as run:
        return Training(own.loaded, own.encoded, strategy, own.options, run).fit(callbacks)


@contextmanager
def opened(given: TrainingStageOptions) -> Iterator[RunDir]:
    """The output folder."""
    run = RunDir.open(given, stage="align", version=1, inputs={})
    try:
        yield run
    finally:
        run.close()


def randomise_lora_b(model: nn.Module) -> None:
    """Gives the second factors, which are 0 at first, random values, so that the first ones have a gradient."""
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(len(key)))


def write_gradients(find: Callable[..., dict[str, torch.Tensor]], *more: Any) -> None:
    """What a process started by the launcher does: ``MODEL FOLDER`` on its line, 4 rows per update, a file by rank."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    save_file(find(Path(sys.argv[1]), folder, 4, *more), folder / f"rank{process_index()}.safetensors")
    assert world_size() == 2
    barrier()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal, bit for bit."""
    assert a.keys() == b.keys() and a
    return all(torch.equal(value, b[name]) for name, value in a.items())


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two entries."""
    assert a.keys() == b.keys() and a
    return max(float((value - b[name]).abs().max()) for name, value in a.items())
