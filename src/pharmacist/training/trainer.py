"""A Trainer for gradient strategies: it overrides the training step, and leaves the main pass to the stock Trainer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.other import has_compiled_regions
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint, has_length

from pharmacist.core.console import named
from pharmacist.core.env import world_size
from pharmacist.core.errors import CompatibilityError, ConfigError, DataError, DivergedError, one_line
from pharmacist.core.seeding import derive
from pharmacist.data.streams import EndlessRows
from pharmacist.nn.distributed import from_all, total
from pharmacist.nn.grads import add_to_grad
from pharmacist.nn.hooks import head_at, quick_attention
from pharmacist.nn.losses import batch_loss, targets
from pharmacist.nn.reading import large_head
from pharmacist.training.checkpoint import Checkpoints, load_strategy_state
from pharmacist.training.strategy import GradientStrategy, StepContext


_COLUMNS = frozenset({"input_ids", "attention_mask", "labels", "completion_mask"})
"""Columns of an auxiliary stream's rows that a collator gets."""
_TRAINING_ONLY = frozenset({"row", "weight"})
"""Columns of a batch that the model does not get."""


def token_mean_loss(
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy summed over a micro-batch's target tokens, divided by those of the whole accumulated batch.

    So k accumulated micro-batches give the gradient of one batch k times as large.

    Args:
        outputs: Outputs of the model, with ``logits`` as in `batch_loss`.
        labels: Shape [rows, length]; -100 where there is no target.
        num_items_in_batch: Number of target tokens of all micro-batches and processes.
        weights: Factor of each row's loss, shape [rows]; does not change the divisor of the sum.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    return batch_loss(logits, labels, num_items_in_batch, weights)


@contextmanager
def _refusing_options() -> Iterator[None]:
    """Turns errors of transformers about its arguments into a `ConfigError`."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "to be installed" not in str(error):  # of integrations that log runs
            raise
        raise ConfigError(f"train: {one_line(error, 300)}") from error


def _is_reentrant(model: nn.Module) -> bool:
    """Whether a model repeats forward passes by torch's reentrant gradient checkpointing."""
    saving = (module for module in model.modules() if getattr(module, "gradient_checkpointing", False))
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in saving)
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)


_Trainer: Any = object
"""Base of the mix-in for type checkers: the classes that it is mixed into have a Trainer's attributes."""


class StrategyMixin(_Trainer):  # type: ignore[misc]
    """Makes a `transformers.Trainer`, or a subclass such as TRL's ``SFTTrainer``, run a `GradientStrategy`.

    ``class MyTrainer(StrategyMixin, SFTTrainer): pass`` is all that is needed. Batches must contain ``input_ids``,
    ``attention_mask`` and ``labels``; the strategy's state is part of every checkpoint.

    Order within a micro-batch: first the auxiliary passes, on the unwrapped model and without communication; then the
    main pass, whose backward pass is the only one that synchronises a data-parallel run and includes the auxiliary
    gradient.

    Args:
        strategy: The method, such as ``pharmacist.Vaccine(rho=2)``.
        streams: Name -> rows that the strategy draws besides the training rows (`GradientStrategy.streams`): a dataset
            of tokenised rows (`pharmacist.tokenize`), from which the Trainer's collator makes batches of its usual
            size; or an endless iterator of batches, or `data.streams.PairedRows`.
        strategy_seed: Seed of the strategy's random numbers; by default the Trainer's seed.
        **kwargs: Arguments of the Trainer.

    Attributes:
        found: Modules or tensors on which the strategy acts, once training has begun.
        without_targets: Number of micro-batches so far that had no target token, and therefore no effect.

    Raises:
        CompatibilityError: The strategy cannot see gradients with these settings.
    """

    compute_loss_func: Any  # the Trainer's

    def __init__(
        self,
        *args: Any,
        strategy: GradientStrategy,
        streams: Mapping[str, Any] | None = None,
        strategy_seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        with _refusing_options():
            super().__init__(*args, **kwargs)
        if not isinstance(strategy, GradientStrategy):
            raise ConfigError(f"strategy: must be a method such as pharmacist.Vaccine(rho=2), not {strategy!r}")
        if not isinstance(streams, Mapping | None):
            raise ConfigError(f"streams: must be a mapping such as {{'harmful': ROWS}}, not {type(streams).__name__}")
        self.strategy, self.found = strategy, dict[str, Any]()
        self.strategy_seed = self.args.seed if strategy_seed is None else strategy_seed
        self.streams = {name: self._stream(name, rows) for name, rows in (streams or {}).items()}
        self._step: StepContext | None = None
        self._reached: StepContext | None = None  # the last one whose loss came through `compute_loss`
        self._start: Any = None  # of the strategy, when this Trainer first began
        self._forget()
        name = strategy.name
        for missing in set(strategy.streams) - self.streams.keys():
            raise CompatibilityError(f"{name} draws from '{missing}' rows; give streams={{'{missing}': ROWS}}")
        if self.model_init is not None:
            raise CompatibilityError("model_init makes another model when training begins; give model=MODEL instead")
        if self.args.n_gpu > 1:
            raise CompatibilityError("several GPUs without a launcher: use `accelerate launch -m pharmacist ...`")
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise CompatibilityError("DeepSpeed and FSDP own the gradients that a strategy needs; use DDP")
        if len({parameter.device for parameter in self.model.parameters()}) > 1:
            raise CompatibilityError(
                "the model's weights lie on several devices, where no strategy can act; load it without device_map"
            )
        if self.args.auto_find_batch_size:
            raise CompatibilityError(
                "auto_find_batch_size would begin again with half a batch and all that the strategy has drawn so far; "
                "give a smaller per_device_train_batch_size"
            )
        if self.args.fp16:
            raise CompatibilityError("fp16 scales the main gradient and not the strategy's; use bf16")
        if world_size() > 1 and not self.args.average_tokens_across_devices:
            raise CompatibilityError(
                "average_tokens_across_devices=False gives the processes' tokens unequal weights, unlike a strategy's "
                "terms; leave it out"
            )
        if not any(isinstance(callback, Checkpoints) for callback in self.callback_handler.callbacks):
            self.add_callback(Checkpoints(strategy, streams=self.streams))

    def _stream(self, name: str, rows: Any) -> Any:
        """Endless batches of a dataset of tokenised rows; an iterator and pairs of rows are streams already."""
        if name == "paired" and hasattr(rows, "__getitem__"):
            raise DataError(f"streams: '{name}' rows need their partners; give pharmacist.data.streams.PairedRows")
        if hasattr(rows, "__next__") or name == "paired":
            return rows
        if not hasattr(rows, "__getitem__") or not has_length(rows):
            raise DataError(
                f"streams: '{name}' ({type(rows).__name__}) holds no rows by number; give a datasets.Dataset of them"
            )
        if not len(rows) or "input_ids" not in rows[0]:
            raise DataError(f"streams: '{name}' holds no tokenised rows; pharmacist.tokenize makes them from text")
        if name == "safe" and self.strategy.mixed_in(10**6)[0]:
            raise CompatibilityError(
                f"{self.strategy!r} only mixes the safe rows into the training set, before any training: concatenate "
                "the two and train with SFT, or choose a mode that draws them in every step"
            )

        def batch(numbers: Sequence[int]) -> dict[str, torch.Tensor]:
            items = [{key: value for key, value in rows[number].items() if key in _COLUMNS} for number in numbers]
            return {key: value.to(self.args.device) for key, value in self.data_collator(items).items()}

        size, seed = self.args.per_device_train_batch_size, derive(self.strategy_seed, "stream", name)
        return EndlessRows(len(rows), size, batch, seed=seed)

    def _forget(self) -> None:
        """Counts and sums of a training as they are before its first step."""
        self._update, self._micro = -1, 0
        self._tokens: torch.Tensor | None = None  # of the update, padding not counted
        self._rows: list[int] = []  # of the update so far
        self._sums: dict[str, list[float]] = {}
        self.without_targets = 0

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The stock training, between the strategy's `setup` and `close`."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        self._forget()
        try:
            self.found = self.strategy.setup(self.model, self.strategy_seed)
            # What this Trainer has trained and now resumes is half trained, and no longer what it began with.
            if folder and self._start is not None:
                self.strategy.start = self._start
            self._start = self.strategy.start
            if folder:
                load_strategy_state(Path(folder), self.strategy, self.streams)
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.strategy.close()

    @_refusing_options()
    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The stock optimizer; values of ``train.`` that it refuses are a `ConfigError`, unlike errors in training."""
        return super().create_optimizer(*args, **kwargs)

    @_refusing_options()
    def get_train_dataloader(self) -> Any:
        """The stock data loader, likewise."""
        loader = super().get_train_dataloader()
        if has_length(loader) and not len(loader):
            raise ConfigError(
                "train.dataloader_drop_last: there are fewer rows than a batch has, so all would be dropped; leave it "
                "out, or lower train.per_device_train_batch_size"
            )
        return loader

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """The stock sampler; one that groups rows by length draws the order of an epoch from seed and epoch alone.

        A training that resumes in a later epoch would read rows twice, and others never, in an order that follows from
        all random numbers before.
        """
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler.generator = torch.Generator()
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(derive(seed, "order", epoch) % 2**63)
        return sampler

    @_refusing_options()
    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The stock scheduler, likewise."""
        return super().create_scheduler(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of an optimizer step, the user's or the strategy's instead, with their tokens counted."""
        window, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        drawn = self.strategy.draw(int(self.state.global_step), len(window), self.streams) if window else None
        if drawn is not None:
            window, count = drawn, self._get_num_items_in_batch(drawn, device)
        if window and "attention_mask" in window[0]:
            tokens = sum(int(batch["attention_mask"].sum()) for batch in window)
            self._tokens = total(torch.tensor(tokens, device=device))
        return window, count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch: auxiliary gradient, main pass inside `around`, `after_backward`."""
        update = int(self.state.global_step)
        self._micro = self._micro + 1 if update == self._update else 0
        self._update = update
        rows, weights = inputs.pop("row", None), inputs.pop("weight", None)
        numbers = [] if rows is None else rows.tolist()
        self._rows = (self._rows if self._micro else []) + numbers
        inputs = self._prepare_inputs(inputs)
        if self._micro == 0:
            self.strategy.begin_update(update)
        if inputs.get("labels") is None:
            raise DataError(
                "batches have no labels; give rows of pharmacist.tokenize and a collator that keeps their labels"
            )
        self.without_targets += int(not bool(targets(inputs["labels"])[0].any()))
        if num_items_in_batch is not None and int(num_items_in_batch) == 0:
            # An update without any target, on all processes alike: no pass, so no gradient, decay or momentum either.
            return torch.zeros((), device=inputs["labels"].device)
        model.train()
        self._check_passes(inputs)
        step = StepContext(
            model=self.model,
            batch=inputs,
            update=update,
            micro=self._micro,
            scale=1.0 / self.current_gradient_accumulation_steps,
            streams=self.streams,
            rows=numbers,
            targets=num_items_in_batch,
            tokens=self._tokens,
            weights=None if weights is None else weights.to(inputs["labels"].device),
            autocast=self.accelerator.autocast,
        )
        with quick_attention(self.model, inputs["input_ids"].shape[1]):
            extra = self.strategy.auxiliary(step)
            if extra is not None:
                add_to_grad(step.parameters, extra, step.scale)
            self._step = step  # until it is reset, `compute_loss` applies the strategy's objective
            try:
                with self._around(step, model):
                    loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            finally:
                self._step = None
            self._check_objective(step)
            self.strategy.after_backward(step)
        if self.accelerator.sync_gradients:
            # Before the clipping, which would turn a norm that overflows into a gradient of zeros.
            self._check("gradient", get_total_norm([p.grad for p in step.parameters.values() if p.grad is not None]))
        for key, value in step.metrics.items():
            self._sums.setdefault(key, []).append(value)
        return loss

    def _around(self, step: StepContext, model: nn.Module) -> AbstractContextManager[Any]:
        """The strategy's context around the main pass; refuses one whose hooks a compiled model would pass over."""
        around = self.strategy.around(step)
        if self._micro == 0 and not isinstance(around, nullcontext) and has_compiled_regions(model):
            raise CompatibilityError(
                f"a compiled model passes over what {self.strategy.name} does; drop torch_compile"
            )
        return around

    def _check_passes(self, inputs: Mapping[str, Any]) -> None:
        """Refuses what a strategy's own passes over the batch cannot work with."""
        kind = type(self.strategy)
        if kind.auxiliary is GradientStrategy.auxiliary and kind.around is GradientStrategy.around:
            return
        if "attention_mask" not in inputs:
            raise CompatibilityError(
                f"{self.strategy.name} needs batches with an attention_mask, and padding_free has none; leave it out, "
                "and packing too, or give packing_strategy='wrapped'"
            )
        if self._micro == 0 and _is_reentrant(self.model):
            raise CompatibilityError(
                f"{self.strategy.name} cannot see gradients under reentrant gradient checkpointing; give "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )

    def _check_objective(self, step: StepContext) -> None:
        """Refuses a loss from which a strategy's terms, or the rows' weights, are missing."""
        overridden = type(self.strategy).objective is not GradientStrategy.objective
        if self._reached is not step and (overridden or step.weights is not None):
            kind, what = type(self).__name__, self.strategy.name if overridden else "weights of rows"
            raise CompatibilityError(
                f"{kind}.compute_loss does not call super().compute_loss, which applies {what}; override it in a "
                f"Trainer's class instead, and mix StrategyMixin into that: class {kind}(StrategyMixin, MyTrainer)"
            )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stock loss, then the strategy's objective; a loss that is not finite stops the training."""
        step = self._step
        # Outputs are asked for only where they are used: TRL pays for them with a further forward pass.
        overridden = type(self.strategy).objective is not GradientStrategy.objective
        with_outputs = (overridden and self.strategy.reads_outputs) or return_outputs
        # For `token_mean_loss` a large output head computes logits at targets alone.
        own, head = self.compute_loss_func, large_head(self.model)
        weights = None if step is None else step.weights
        function = own if weights is None else partial(token_mean_loss, weights=weights)
        at_targets = getattr(function, "func", function) is token_mean_loss and head is not None and not with_outputs
        self.compute_loss_func = function
        try:
            with head_at(head, targets(inputs["labels"])[0]) if at_targets else nullcontext():
                found = super().compute_loss(
                    model, dict(inputs), return_outputs=with_outputs, num_items_in_batch=num_items_in_batch
                )
        finally:
            self.compute_loss_func = own
        loss, outputs = found if with_outputs else (found, None)
        if step is not None:
            self._reached = step
            if outputs is not None and not outputs["logits"].requires_grad:
                outputs = step.output(inputs)  # TRL's own outputs are without a graph
            # An objective gets and gives the micro-batch's part of the update, also where the Trainer divides later.
            share = step.scale if self._divides(num_items_in_batch) else 1.0
            loss = self.strategy.objective(step, loss * share, outputs) / share
            self._check("loss", loss)
        return (loss, outputs) if return_outputs else loss

    def _divides(self, num_items_in_batch: Any) -> bool:
        """Whether the stock training step divides the loss by the accumulation steps, by its own rule."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # what a Trainer says of its losses, in newer versions
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        return not scaled

    def prediction_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The stock step of an evaluation, on a batch without the columns that are for the training."""
        own = {name: value for name, value in inputs.items() if name not in _TRAINING_ONLY}
        return super().prediction_step(model, own, *args, **kwargs)

    def _check(self, what: str, value: torch.Tensor) -> None:
        """Raises `DivergedError` on all processes where the value of one is not finite: none waits for another."""
        if not torch.isfinite(everywhere := total(value)):
            parts = from_all((bool(torch.isfinite(value)), self._rows))
            found = [row for finite, rows in parts if not finite for row in rows]
            rows = f" ({named(found)})" if found else ""
            raise DivergedError(
                f"the {what} is {everywhere.item()} at step {self._update + 1}{rows}; the weights were not touched: "
                "look at these rows, or lower train.learning_rate or the method's strength"
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the strategy's metrics, averaged since the last log line."""
        if "loss" in logs:
            logs = {**logs, **{key: sum(values) / len(values) for key, values in self._sums.items()}}
            self._sums = {}
            if self.without_targets:
                logs["batches_without_targets"] = self.without_targets
        super().log(logs, *args, **kwargs)


class StrategyTrainer(StrategyMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with a gradient strategy; with `SFT` it is the stock Trainer."""
