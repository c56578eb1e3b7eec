"""Trains a loaded model on encoded rows with a strategy, resumably, and saves what came out."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from pharmacist.core.env import rank
from pharmacist.core.errors import ConfigError, DataError, NoMatchError
from pharmacist.core.files import atomic_folder, show_in, write_text
from pharmacist.core.progress import Bar, bar, console
from pharmacist.core.rundir import RunDir
from pharmacist.core.seeding import derive
from pharmacist.data.batches import collate
from pharmacist.data.templates import save_template
from pharmacist.data.tokenize import Encoded
from pharmacist.nn.distributed import barrier
from pharmacist.nn.merge import is_lora, merge_adapter, save_stacked
from pharmacist.nn.models import LoadedModel, resolve_dtype, silent_library
from pharmacist.training.checkpoint import Checkpoints, newest_checkpoint
from pharmacist.training.options import TrainingStageOptions, training_arguments
from pharmacist.training.strategy import GradientStrategy
from pharmacist.training.trainer import StrategyTrainer, token_mean_loss


@dataclass
class TrainResult:
    """What a training did.

    Attributes:
        model: The trained model (a PEFT model under LoRA).
        log: One dict per log line: step, loss, learning rate, gradient norm and the strategy's own metrics.
        steps: Optimizer steps in all.
        tokens: Tokens that the main pass read, padding not counted.
        found: What the strategy found to act on.
    """

    model: nn.Module
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


def prepare_model(loaded: LoadedModel, options: TrainingStageOptions) -> nn.Module:
    """Makes a model trainable: a fresh LoRA adapter on frozen weights, the one that it has, or all weights.

    Args:
        loaded: The model; its weights are shared with the result.
        options: Tuning, adapter and seed.

    Raises:
        NoMatchError: No module has one of the wanted names.
    """
    model: nn.Module = loaded.model
    if options.tuning == "full":
        model = deepcopy(model) if loaded.shared else model
        return model.float().requires_grad_(True)
    if hasattr(model, "peft_config"):  # loaded with `merge=False`, to be continued
        return model
    lora = options.lora
    config = lora.given or LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=lora.target_modules or "all-linear",
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive(options.seed, "lora", "init"))
        try:
            model = get_peft_model(loaded.model, config)
        except ValueError as error:
            if "target modules" not in str(error).lower():
                raise
            wanted = ", ".join(lora.target_modules or ["all linear layers"])
            raise NoMatchError(f"lora.target_modules: {options.model} has no module named {wanted}") from error
    # An adapter finds its base again by this name, from whatever folder it is loaded.
    peft: Any = model
    peft.peft_config["default"].base_model_name_or_path = loaded.beneath.base
    return model


def train(
    model: nn.Module,
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
        model: From `prepare_model`.
        loaded: Where it came from.
        encoded: The rows.
        strategy: The method.
        options: The stage's.
        run: Its folder; checkpoints go to ``work/train``.
        streams: Side batches for the strategy (`data.streams`).
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
        model=model,
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
        with progress.shown(), silent_library():
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
    return TrainResult(
        model, log, steps, round(float(trainer.state.epoch or 0) * int(encoded.lengths.sum())), trainer.found
    )


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Our bar in place of the library's."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.began = False
        self._bar: Bar | None = None
        self._stack: list[Any] = []

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Takes the bar away at the end, whatever happens."""
        try:
            yield
        finally:
            while self._stack:
                self._stack.pop().__exit__(None, None, None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        shown = bar(self.description, state.max_steps)
        self._bar = shown.__enter__()
        self._stack.append(shown)
        self._bar.advance(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.advance()


class Snapshots(TrainerCallback):  # type: ignore[misc]
    """Saves the model after given numbers of steps, for curves over an attack.

    Args:
        steps: After these.
        save: step -> None.
    """

    def __init__(self, steps: Sequence[int], save: Any) -> None:
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


def writes_adapter(model: Any, loaded: LoadedModel) -> bool:
    """Whether a trained model can be written as an adapter that any tool can load: it is one, on a plain base."""
    if not hasattr(model, "peft_config") or loaded.beneath.base is None:
        return False
    return not loaded.beneath.factors or is_lora(model)


def save_trained(
    model: Any, loaded: LoadedModel, root: Path, card: str, *, trained_on: str, merge: bool = False, last: bool = True
) -> list[str]:
    """Writes ``adapter/`` or ``model/``, each whole or not at all, with tokenizer, template and card.

    The adapter rests on a plain base model; what earlier stages have added to that base is stacked into it. Where no
    adapter can say it all (full tuning, a base of whole weights that an earlier run trained), it is the whole model.
    Links in `root` make it what transformers and PEFT load from there.

    Args:
        model: The trained model.
        loaded: Where it came from.
        root: Where the folder is made.
        card: Text of its README.md.
        trained_on: Fingerprint of the model that it was trained on.
        merge: Also write ``model/`` with the adapter merged into the weights.
        last: The model is used no more, so that it may be merged itself and not a copy.

    Returns:
        Names of the folders.
    """
    if rank() != 0:
        return []
    written = []
    if writes_adapter(model, loaded):
        with atomic_folder(root / "adapter") as folder:
            if loaded.beneath.factors:
                save_stacked(model, loaded.beneath, folder, loaded.beneath.content or trained_on)
            else:
                model.save_pretrained(folder, save_embedding_layers=False)
            _save_beside(folder, loaded, card)
        written.append("adapter")
    if merge or not written:
        with atomic_folder(root / "model") as folder, silent_library():
            whole = model
            if hasattr(model, "peft_config"):
                whole = merge_adapter((model if last else deepcopy(model)).eval(), loaded.name)
            whole.save_pretrained(folder)
            _save_beside(folder, loaded, card)
        written.append("model")
    show_in(root, sorted((root / written[-1]).iterdir()))
    return written


def _save_beside(folder: Path, loaded: LoadedModel, card: str) -> None:
    if loaded.template.kind == "chat":
        loaded.tokenizer.chat_template = loaded.template.chat_template
    loaded.tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", card)
    save_template(folder, loaded.template)


def finish_training(
    result: TrainResult,
    loaded: LoadedModel,
    options: TrainingStageOptions,
    run: RunDir,
    *,
    card: str,
    outputs: Sequence[str] = (),
    counts: Mapping[str, int] | None = None,
) -> None:
    """Writes weights, ``log.jsonl``, model card and manifest of a training stage."""
    barrier()
    if rank() == 0:
        folders: list[str] = []
        if run.temporary is None:
            folders = save_trained(
                result.model,
                loaded,
                run.root,
                card,
                trained_on=run.manifest.inputs["model"],
                merge=options.merge,
                last=not isinstance(options.model, LoadedModel),  # who gives a model gets one back
            )
        write_text(run.path("log.jsonl"), "".join(json.dumps(line) + "\n" for line in result.log))
        run.finish(
            outputs=[*folders, "log.jsonl", *(["README.md"] if folders else []), *outputs],
            counts=counts,
            device=str(loaded.device),
            metrics={"steps": result.steps, "final_loss": result.log[-1]["loss"] if result.log else None},
            extra={
                "train": options.effective_train,
                "lora": asdict(options.lora),
                **loaded.facts,
                "strategy": result.found,
            },
        )
        console().print(f"prompts are rendered by {loaded.template_origin}", markup=False, soft_wrap=True)
    barrier()
