"""The training of a stage: a loaded model on tokenised rows with a gradient strategy, resumable, and its output."""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback

from pharmacist.core.env import process_index
from pharmacist.core.errors import CompatibilityError, ConfigError, DataError, NoMatchError, one_line
from pharmacist.core.files import write_text
from pharmacist.core.progress import Bar, bar
from pharmacist.core.rundir import RunDir
from pharmacist.core.seeding import derive
from pharmacist.data.batches import collate
from pharmacist.data.tokenize import Encoded
from pharmacist.nn.devices import resolve_dtype
from pharmacist.nn.distributed import barrier
from pharmacist.nn.hooks import replayed_rng
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
    """Figures of a training.

    Attributes:
        log: One dict per log line: step, loss, learning rate, gradient norm and the strategy's own metrics.
        steps: Optimizer steps in all.
        tokens: Tokens of all rows times epochs, padding not counted; within an epoch by the mean length of a row.
        found: Modules or tensors on which the strategy acts.
    """

    log: list[dict[str, Any]]
    steps: int
    tokens: int
    found: dict[str, Any] = field(default_factory=dict)


def _collate(items: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    batch = collate(items, pad_token_id) | {"row": torch.tensor([item["row"] for item in items])}
    if "weight" in items[0]:
        batch["weight"] = torch.tensor([item["weight"] for item in items], dtype=torch.float32)
    return batch


def prepare_model(loaded: LoadedModel, options: TrainingStageOptions, *stage: str) -> LoadedModel:
    """Makes a model trainable, in place: a new LoRA adapter on frozen weights, the adapter it has, or all weights.

    With the name of a later `stage`, a new adapter starts from other weights than the one of the stage before with the
    same seed: no attacker knows the directions in which a model was aligned.
    """
    model: Any = loaded.model
    adapted = isinstance(model, PeftModel)
    if not adapted and any(isinstance(layer, BaseTunerLayer) for layer in model.modules()):
        raise CompatibilityError(
            f"{options.model}: has an adapter by transformers' add_adapter, which cannot be trained on; load it with "
            "PeftModel.from_pretrained"
        )
    if options.tuning == "full":
        if not all(parameter.is_floating_point() for parameter in model.parameters()):
            raise CompatibilityError(f"{options.model}: its weights are quantised, so only an adapter can be trained")
        return replace(loaded, model=(deepcopy(model) if loaded.shared else model).float().requires_grad_(True))
    if adapted:  # loaded with `merge=False`, to be continued
        return loaded
    config = options.lora.config()
    if loaded.shared and (str(config.init_lora_weights).lower() == "olora" or config.bias != "none"):
        model = deepcopy(model)  # the base model's own weights change in place: by PEFT, or as biases are trained
    with torch.random.fork_rng():
        torch.manual_seed(derive(options.seed, "lora", "init", *stage))
        try:
            model = get_peft_model(model, config)
        except ValueError as error:
            names = ", ".join(options.lora.target_modules or ["all linear layers"])
            raise NoMatchError(
                f"lora.target_modules: PEFT attaches no adapter to {names} of {options.model} "
                f"({one_line(error, 100)}); name linear layers"
            ) from error
    for name, layer in model.named_modules():
        if getattr(layer, "lora_bias", {}).get("default") and layer.get_base_layer().bias is None:
            raise CompatibilityError(
                f"peft_config: lora_bias has nothing that it could be merged into, as {name} has no bias; leave it out"
            )
    # An adapter finds its base by this name, from whatever folder it is loaded.
    model.peft_config["default"].base_model_name_or_path = loaded.base.name
    return replace(loaded, model=model)


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Restores the random states that a Trainer seeds: the caller's are as before."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with replayed_rng(device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


class _Progress(TrainerCallback):  # type: ignore[misc]
    """A progress bar instead of the library's, removed when the block `shown` ends."""

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
    """Saves the model after some numbers of steps, for curves over an attack."""

    def __init__(self, steps: Sequence[int], save: Callable[[int], None]) -> None:
        self.steps, self.save = frozenset(steps), save

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuses numbers of steps that the training does not reach."""
        beyond = [step for step in sorted(self.steps) if step > state.max_steps]
        if beyond:
            raise ConfigError(f"--snapshots {beyond[0]}: the training has only {state.max_steps} steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Saves after these steps."""
        if state.global_step in self.steps:
            self.save(state.global_step)


@dataclass
class Training:
    """The training of a stage; interrupted, it continues from its last checkpoint, bit for bit on a CPU.

    The model is one from `prepare_model`. Checkpoints go to ``work/train`` in the folder of the run. `streams` are
    further batches for the strategy (`data.streams`), and `weights` factors of the rows' main losses by the number of
    the row; None where all weigh alike.
    """

    loaded: LoadedModel
    encoded: Encoded
    strategy: GradientStrategy
    options: Any
    run: RunDir
    streams: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[int, float] | None = None

    def fit(self, callbacks: Sequence[TrainerCallback] = ()) -> TrainResult:
        """Trains the model in place, with further `callbacks` of the Trainer.

        Raises:
            DataError: Loss or gradient is not finite.
            ConfigError, CompatibilityError: Settings that cannot be.
        """
        loaded, options, strategy = self.loaded, self.options, self.strategy
        seed = derive(options.seed, "train") % 2**31
        folder = self.run.work("train", "checkpoints")
        # Full tuning keeps its weights in float32; the passes run in the number format that was asked for.
        bf16 = torch.bfloat16 in (loaded.dtype, resolve_dtype(options.dtype, loaded.device))
        progress, rows = _Progress(f"{self.run.manifest.stage} ({strategy.name})"), self.encoded.dataset
        if self.weights is not None:
            rows = rows.add_column("weight", [self.weights[number] for number in rows["row"][:]])
        trainer = StrategyTrainer(
            model=loaded.model,
            args=training_arguments(options, folder=str(folder), device=loaded.device, bf16=bf16, seed=seed),
            train_dataset=rows,
            compute_loss_func=token_mean_loss,
            data_collator=partial(_collate, pad_token_id=loaded.tokenizer.pad_token_id),
            strategy=strategy,
            streams=self.streams,
            strategy_seed=derive(options.seed, "strategy"),
            callbacks=[Checkpoints(strategy, options.checkpoint_seconds, self.streams), progress, *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = newest_checkpoint(folder)
        try:
            with progress.shown, silent_library():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except (UnpicklingError, EOFError, SafetensorError) as error:
            if checkpoint is None or progress.began:
                raise
            # All its files have the recorded hashes, but this program did not write them.
            raise DataError(f"{checkpoint}: cannot be resumed from ({one_line(error)}); delete this folder") from error
        # As models are loaded: the Trainer leaves dropout on, and its number format of the passes.
        trainer.accelerator.unwrap_model(loaded.model, keep_fp32_wrapper=False).eval()
        steps = int(trainer.state.global_step)
        log = [line for line in trainer.state.log_history if "loss" in line]
        tokens = round(float(trainer.state.epoch or 0) * int(self.encoded.lengths.sum()))
        return TrainResult(log, steps, tokens, trainer.found)

    def fit_and_save(
        self, card: Card, counts: Mapping[str, int], *, snapshots: Sequence[int] = (), outputs: Sequence[str] = ()
    ) -> int:
        """Trains, writes weights, log, card and manifest, and returns the number of optimizer steps.

        Settings and figures of the training are added to the card. `counts` of rows are for the manifest. After the
        numbers of steps in `snapshots` the model is saved too. `outputs` are what the stage has written already.
        """
        options, run, trained_on = self.options, self.run, self.run.manifest.inputs["model"]
        settings = {"train": options.effective_train, "lora": asdict(options.lora)}
        defense = {"name": options.defense["name"], **vars(self.strategy.config)}
        shown = {"defense": defense, "train": settings["train"], "tuning": options.tuning, "lora": settings["lora"]}
        card = replace(card, settings=shown)

        def with_steps(steps: int, **facts: Any) -> Card:
            return replace(card, facts=card.facts | {"steps": steps, "seed": options.seed} | facts)

        def save(step: int) -> None:
            folder = run.path("snapshots", f"step-{step}")
            save_model(self.loaded, folder, with_steps(step), trained_on=trained_on, last=False)

        with run.phase("train") as phase:
            memory = PeakMemory(self.loaded.device)
            with _own_random_state(self.loaded.device):
                result = self.fit([Snapshots(snapshots, save)])
            phase.tokens = result.tokens
            phase.extra["peak_memory"] = max(memory.megabytes(), phase.extra.get("peak_memory", 0.0))
        barrier()
        if process_index() == 0:
            write_text(run.path("log.jsonl"), "".join(json.dumps(line) + "\n" for line in result.log))
            final = result.log[-1]["loss"] if result.log else None
            loss = {"final training loss": "not logged" if final is None else f"{final:.4f}"}
            finish(
                run,
                options,
                self.loaded,
                with_steps(result.steps, **loss),
                trained_on=trained_on,
                outputs=["log.jsonl", *outputs, *(["snapshots"] if snapshots else [])],
                counts=counts,
                metrics={"steps": result.steps, "final_loss": final},
                extra=settings | {"strategy": result.found},
            )
        barrier()
        return result.steps
