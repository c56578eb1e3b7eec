"""The whole Trainer side of a gradient strategy: one override that hands the main pass to the stock Trainer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from pharmacist.core.errors import CompatibilityError, ConfigError, DataError, DivergedError
from pharmacist.core.seeding import derive
from pharmacist.data.streams import EndlessRows
from pharmacist.nn.attention import quick_attention
from pharmacist.nn.distributed import total
from pharmacist.nn.grads import add_to_grad
from pharmacist.nn.hooks import head_at
from pharmacist.nn.losses import batch_loss, targets
from pharmacist.nn.reading import large_head
from pharmacist.training.checkpoint import Checkpoints, load_side_state
from pharmacist.training.strategy import GradientStrategy, StepContext


_NAMED = 20
_COLUMNS = frozenset({"input_ids", "attention_mask", "labels", "completion_mask"})
"""What a collator is given of the rows of a side stream."""


def token_mean_loss(
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy summed over a micro-batch's target tokens, divided by those of the whole accumulated batch.

    So k accumulated micro-batches give the gradient of one batch k times as large.

    Args:
        outputs: With ``logits`` as in `batch_loss`.
        labels: Shape [rows, length]; -100 where there is no target.
        num_items_in_batch: Target tokens of all micro-batches of all processes.
        weights: Factor of each row's loss, shape [rows]; they do not change what the sum is divided by.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    return batch_loss(logits, labels, num_items_in_batch, weights)


@contextmanager
def _options_told() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "to be installed" not in str(error):  # of what reports to a service
            raise
        raise ConfigError(f"train: {' '.join(str(error).split())[:300]}") from error


_Trainer: Any = object
"""What the mix-in is mixed into has the attributes of a Trainer."""


class StrategyMixin(_Trainer):  # type: ignore[misc]
    """Makes a `transformers.Trainer`, or a subclass such as TRL's ``SFTTrainer``, run a `GradientStrategy`.

    ``class MyTrainer(StrategyMixin, SFTTrainer): pass`` is all that is needed. Batches must hold ``input_ids``,
    ``attention_mask`` and ``labels``; the strategy's state is part of every checkpoint.

    Order of a micro-batch: auxiliary passes first, on the bare model and without communication; then the main pass,
    whose backward is the only one that synchronises a data-parallel run and carries the auxiliary gradient along.

    Args:
        strategy: The method, such as ``pharmacist.Vaccine(rho=2)``.
        streams: Name -> what the strategy draws from besides the training rows (`GradientStrategy.streams`): a dataset
            of tokenised rows (`pharmacist.tokenize`), which the Trainer's own collator makes batches of its own size
            from; or an endless iterator of batches, or `data.streams.PairedRows`.
        strategy_seed: Of the strategy's random streams; by default the Trainer's seed.
        **kwargs: Of the Trainer.

    Attributes:
        found: What the strategy found to act on, when training has begun.
        without_targets: Micro-batches so far that had no target token; they moved nothing.

    Raises:
        CompatibilityError: Settings under which gradients are not the strategy's to see.
    """

    def __init__(
        self,
        *args: Any,
        strategy: GradientStrategy,
        streams: Mapping[str, Any] | None = None,
        strategy_seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        with _options_told():
            super().__init__(*args, **kwargs)
        self.strategy, self.found = strategy, dict[str, Any]()
        self.strategy_seed = self.args.seed if strategy_seed is None else strategy_seed
        given = streams or {}
        self.streams = {name: self._stream(name, given[name]) for name in given}
        self._step: StepContext | None = None
        self._update, self._micro = -1, 0
        self._tokens: torch.Tensor | None = None  # of the update, padding not counted
        self._rows: list[int] = []  # of the update so far
        self._sums: dict[str, list[float]] = {}
        self.without_targets = 0
        name = strategy.name
        for missing in set(strategy.streams) - self.streams.keys():
            raise CompatibilityError(f"{name} draws from '{missing}' rows; give streams={{'{missing}': ROWS}}")
        if self.args.n_gpu > 1:
            raise CompatibilityError("several GPUs without a launcher: use `accelerate launch -m pharmacist ...`")
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise CompatibilityError("DeepSpeed and FSDP own the gradients that a strategy needs; use DDP")
        if self.args.fp16:
            raise CompatibilityError("fp16 scales the main gradient and not the strategy's; use bf16")
        if not any(isinstance(callback, Checkpoints) for callback in self.callback_handler.callbacks):
            self.add_callback(Checkpoints(strategy, streams=self.streams))

    def _stream(self, name: str, rows: Any) -> Any:
        if not hasattr(rows, "__getitem__"):
            return rows
        if not len(rows) or "input_ids" not in rows[0]:
            raise DataError(f"streams: '{name}' holds no tokenised rows; pharmacist.tokenize makes them from text")

        def batch(numbers: Sequence[int]) -> dict[str, torch.Tensor]:
            items = [{key: rows[number][key] for key in rows[number] if key in _COLUMNS} for number in numbers]
            return {key: value.to(self.args.device) for key, value in self.data_collator(items).items()}

        size, seed = self.args.per_device_train_batch_size, derive(self.strategy_seed, "stream", name)
        return EndlessRows(len(rows), size, batch, seed=seed)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The stock training, between the strategy's `setup` and `close`."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        try:
            self.found = self.strategy.setup(self.model, self.strategy_seed)
            if folder:
                load_side_state(Path(folder), self.strategy, self.streams)
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.strategy.close()

    @_options_told()
    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The stock optimizer; values of ``train.`` that it refuses are the user's to mend, unlike later errors."""
        return super().create_optimizer(*args, **kwargs)

    @_options_told()
    def get_train_dataloader(self) -> Any:
        """The stock data loader, likewise."""
        return super().get_train_dataloader()

    @_options_told()
    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The stock scheduler, likewise."""
        return super().create_scheduler(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The window of an optimizer step: the user's, or what the strategy puts in its place, tokens counted."""
        window, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        drawn = self.strategy.draw(int(self.state.global_step), len(window), self.streams) if window else None
        if drawn is not None:
            window, count = drawn, self._get_num_items_in_batch(drawn, device)
        if window and "attention_mask" in window[0]:
            own = sum(int(batch["attention_mask"].sum()) for batch in window)
            self._tokens = total(torch.tensor(own, device=device))
        return window, count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch: auxiliary gradient, main pass inside `around`, `after_backward`."""
        update = int(self.state.global_step)
        self._micro = self._micro + 1 if update == self._update else 0
        self._update = update
        rows, weights = inputs.pop("row", None), inputs.pop("weight", None)
        self._rows = (self._rows if self._micro else []) + ([] if rows is None else rows.tolist())
        inputs = self._prepare_inputs(inputs)
        self.without_targets += int(not bool(targets(inputs["labels"])[0].any()))
        if num_items_in_batch is not None and int(num_items_in_batch) == 0:
            # An update without any target, on all processes alike: no pass, so no gradient, decay or momentum either.
            return torch.zeros((), device=inputs["labels"].device)
        model.train()
        step = StepContext(
            model=self.model,
            batch=inputs,
            update=update,
            micro=self._micro,
            scale=1.0 / self.current_gradient_accumulation_steps,
            streams=self.streams,
            rows=() if rows is None else rows.tolist(),
            targets=num_items_in_batch,
            tokens=self._tokens,
            weights=None if weights is None else weights.to(inputs["labels"].device),
            autocast=self.accelerator.autocast,
        )
        if self._micro == 0:
            self.strategy.begin_update(update)
        with quick_attention(self.model, inputs["input_ids"].shape[1]):
            extra = self.strategy.auxiliary(step)
            if extra is not None:
                add_to_grad(step.parameters, extra, step.scale)
            self._step = step  # from here on the stock Trainer's loss is the strategy's too
            try:
                with self.strategy.around(step):
                    loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            finally:
                self._step = None
            self.strategy.after_backward(step)
        if self.accelerator.sync_gradients:
            # Before the clipping, which would turn a norm that overflows into a gradient of zeros.
            self._check("gradient", get_total_norm([p.grad for p in step.parameters.values() if p.grad is not None]))
        for key, value in step.metrics.items():
            self._sums.setdefault(key, []).append(value)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stock loss, then the strategy's objective; a loss that is not finite stops the training."""
        step = self._step
        if step is not None and step.weights is not None:
            self.compute_loss_func = partial(token_mean_loss, weights=step.weights)
        # Outputs are asked for only where they are used: TRL pays for them with a further forward pass.
        own = type(self.strategy).objective is not GradientStrategy.objective and self.strategy.reads_outputs
        wanted = own or return_outputs
        # A large output head gives logits to our loss where there are targets alone.
        function, head = self.compute_loss_func, large_head(self.model)
        ours = getattr(function, "func", function) is token_mean_loss
        few = head is not None and ours and not wanted
        with head_at(head, targets(inputs["labels"])[0]) if few else nullcontext():
            found = super().compute_loss(
                model, dict(inputs), return_outputs=wanted, num_items_in_batch=num_items_in_batch
            )
        loss, outputs = found if wanted else (found, None)
        if step is not None:
            loss = self.strategy.objective(step, loss, outputs)
            self._check("loss", loss)
        return (loss, outputs) if return_outputs else loss

    def _check(self, what: str, value: torch.Tensor) -> None:
        if not torch.isfinite(value):
            named = ", ".join(map(str, self._rows[:_NAMED])) + (", ..." if len(self._rows) > _NAMED else "")
            rows = f" (rows {named})" if named else ""
            raise DivergedError(
                f"the {what} is {value.item()} at step {self._update + 1}{rows}; the weights were not touched: look "
                "at these rows, or lower train.learning_rate or the method's strength"
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
