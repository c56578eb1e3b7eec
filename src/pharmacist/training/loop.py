"""Trains a loaded model on encoded rows with a strategy, resumably, and writes what came out."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pickle import UnpicklingError
from typing import Any

import torch
from peft import get_peft_model
from safetensors import SafetensorError
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from pharmacist.core.env import rank
from pharmacist.core.errors import ConfigError, DataError, NoMatchError
from pharmacist.core.files import write_text
from pharmacist.core.progress import Bar, bar
from pharmacist.core.rundir import RunDir
from pharmacist.core.seeding import derive
from pharmacist.data.batches import collate
from pharmacist.data.tokenize import Encoded
from pharmacist.nn.devices import resolve_dtype
from pharmacist.nn.distributed import barrier
from pharmacist.nn.libraries import silent_library
from pharmacist.nn.memory import PeakMemory
from pharmacist.nn.models import LoadedModel
from pharmacist.training.checkpoint import Checkpoints, newest_checkpoint
from pharmacist.training.options import TrainingStageOptions, training_arguments
from pharmacist.training.saving import Card, finish, save_model
from pharmacist.training.strategy import GradientStrategy
from pharmacist.training.trainer import StrategyTrainer, token_mean_loss


@dataclass
class TrainResult:
    """What a training did.

    Attributes:
        log: One dict per log line: step, loss, learning rate, gradient norm and the strategy's own metrics.
        steps: Optimizer steps in all.
        tokens: Tokens that the main pass read, padding not counted.
        found: What the strategy found to act on.
    """

    log: list[dict[str, Any]]
    steps: int
    tokens: int
    found: dict[str, Any] = field(default_factory=dict)


class _Rows(Dataset[dict[str, Any]]):
    def __init__(self, encoded: Encoded, weights: Mapping[int, float] | None = None) -> None:
        self.encoded, self.weights = encoded, weights
        self.numbers = encoded.dataset["row"]

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, position: int) -> dict[str, Any]:
        item = {
            "input_ids": self.encoded.token_ids([position])[0],
            "n_prompt": int(self.encoded.prompt_lengths[position]),
            "row": self.numbers[position],
        }
        return item if self.weights is None else item | {"weight": self.weights[self.numbers[position]]}


class _Collator:
    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(items, self.pad_token_id) | {"row": torch.tensor([item["row"] for item in items])}
        if "weight" in items[0]:
            batch["weight"] = torch.tensor([item["weight"] for item in items], dtype=torch.float32)
        return batch


def prepare_model(loaded: LoadedModel, options: TrainingStageOptions) -> LoadedModel:
    """Makes a model trainable, in place: a new LoRA adapter on frozen weights, the one that it has, or all weights."""
    model: Any = loaded.model
    if options.tuning == "full":
        return replace(loaded, model=(deepcopy(model) if loaded.shared else model).float().requires_grad_(True))
    if hasattr(model, "peft_config"):  # loaded with `merge=False`, to be continued
        return loaded
    with torch.random.fork_rng():
        torch.manual_seed(derive(options.seed, "lora", "init"))
        try:
            model = get_peft_model(model, options.lora.config())
        except ValueError as error:
            if "target modules" not in str(error).lower():
                raise
            wanted = ", ".join(options.lora.target_modules or ["all linear layers"])
            raise NoMatchError(f"lora.target_modules: {options.model} has no module named {wanted}") from error
    # An adapter finds its base by this name, from whatever folder it is loaded.
    model.peft_config["default"].base_model_name_or_path = loaded.base.name
    return replace(loaded, model=model)


def train(
    loaded: LoadedModel,
    encoded: Encoded,
    strategy: GradientStrategy,
    options: TrainingStageOptions,
    run: RunDir,
    *,
    streams: Mapping[str, Any] | None = None,
    weights: Mapping[int, float] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    description: str = "train",
) -> TrainResult:
    """Trains; an interrupted call continues from its last checkpoint to the same weights, bit for bit on a CPU.

    Args:
        loaded: The model, from `prepare_model`.
        encoded: The rows.
        strategy: The method.
        options: The stage's.
        run: Its folder; checkpoints go to ``work/train``.
        streams: Further batches for the strategy (`data.streams`).
        weights: Factor of each row's main loss, by the row's number; all 1 by default.
        callbacks: Further ones for the Trainer.
        description: For the progress bar.

    Raises:
        DataError: Loss or gradient is not finite.
        ConfigError, CompatibilityError: Settings that cannot be.
    """
    seed = derive(options.seed, "train") % 2**31
    folder = run.work("train", "checkpoints")
    # Full tuning keeps its weights in float32; the passes run in the number format that was asked for.
    halved = torch.bfloat16 in (loaded.dtype, resolve_dtype(options.dtype, loaded.device))
    dtype = torch.bfloat16 if halved else torch.float32
    arguments = training_arguments(options, folder=str(folder), device=loaded.device, dtype=dtype, seed=seed)
    progress = _Progress(description)
    trainer = StrategyTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=_Rows(encoded, weights),
        compute_loss_func=token_mean_loss,
        data_collator=_Collator(loaded.tokenizer.pad_token_id),
        strategy=strategy,
        streams=streams,
        strategy_seed=derive(options.seed, "strategy"),
        callbacks=[Checkpoints(strategy, options.checkpoint_seconds, streams), progress, *callbacks],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    checkpoint = newest_checkpoint(folder)
    try:
        with progress.shown, silent_library():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (UnpicklingError, EOFError, SafetensorError) as error:
        if checkpoint is None or progress.began:
            raise
        # Whole by its own account, but nothing that this program wrote.
        raise DataError(
            f"{checkpoint}: cannot be resumed from ({' '.join(str(error).split())[:200]}); delete this folder"
        ) from error
    steps = int(trainer.state.global_step)
    log = [line for line in trainer.state.log_history if "loss" in line]
    tokens = round(float(trainer.state.epoch or 0) * int(encoded.lengths.sum()))
    return TrainResult(log, steps, tokens, trainer.found)


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Our bar in place of the library's, taken away when the block `shown` ends."""

    def __init__(self, description: str) -> None:
        self.description, self.began, self.shown = description, False, ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar: Bar = self.shown.enter_context(bar(self.description, state.max_steps))
        self._bar.advance(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.advance()


class Snapshots(TrainerCallback):  # type: ignore[misc]
    """Saves the model after given numbers of steps, for curves over an attack."""

    def __init__(self, steps: Sequence[int], save: Callable[[int], None]) -> None:
        self.steps, self.save = frozenset(steps), save

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuses steps that will not come."""
        late = [step for step in sorted(self.steps) if step > state.max_steps]
        if late:
            raise ConfigError(f"--snapshots {late[0]}: the training has only {state.max_steps} steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Saves where it is time."""
        if state.global_step in self.steps:
            self.save(state.global_step)


def run_training(
    loaded: LoadedModel,
    encoded: Encoded,
    strategy: GradientStrategy,
    options: Any,
    run: RunDir,
    *,
    card: Card,
    counts: Mapping[str, int],
    streams: Mapping[str, Any],
    weights: Mapping[int, float] | None = None,
    snapshots: Sequence[int] = (),
    outputs: Sequence[str] = (),
) -> int:
    """What `align` and `attack` do once rows and model are there: trains, and writes weights, log, card and manifest.

    Arguments are those of `train`; besides, the card, to which settings and figures of the training are added, counts
    for the manifest, numbers of steps after which the model is saved too, and outputs that the stage has written.

    Returns:
        Optimizer steps.
    """
    name, trained_on = options.defense["name"], run.manifest.inputs["model"]
    settings = {
        "defense": {"name": name, **vars(strategy.config)},
        "train": options.effective_train,
        "tuning": options.tuning,
        "lora": asdict(options.lora),
    }
    card = replace(card, settings=settings)

    def save(step: int) -> None:
        own = replace(card, facts=card.facts | {"steps": step, "seed": options.seed})
        save_model(loaded, run.path("snapshots", f"step-{step}"), own, trained_on=trained_on, last=False)

    with run.phase("train") as phase:
        memory = PeakMemory(loaded.device)
        result = train(
            loaded,
            encoded,
            strategy,
            options,
            run,
            streams=streams,
            weights=weights,
            callbacks=[Snapshots(snapshots, save)],
            description=f"{run.manifest.stage} ({name})",
        )
        phase.tokens = result.tokens
        phase.extra["peak_memory"] = max(memory.megabytes(), phase.extra.get("peak_memory", 0.0))
    barrier()
    if rank() == 0:
        write_text(run.path("log.jsonl"), "".join(json.dumps(line) + "\n" for line in result.log))
        final = result.log[-1]["loss"] if result.log else None
        facts = {"steps": result.steps, "seed": options.seed}
        facts |= {"final training loss": "not logged" if final is None else f"{final:.4f}"}
        finish(
            run,
            options,
            loaded,
            replace(card, facts=card.facts | facts),
            trained_on=trained_on,
            outputs=["log.jsonl", *outputs],
            counts=counts,
            metrics={"steps": result.steps, "final_loss": final},
            extra={"train": options.effective_train, "lora": asdict(options.lora), "strategy": result.found},
        )
    barrier()
    return result.steps
