"""Gradient strategies: what a defense adds to plain supervised fine-tuning, independent of a training loop.

A strategy sees a step through a `StepContext`; the Trainer (or a test with a hand-written model) calls its hooks:

1. `draw`, `begin_update` once per optimizer step,
2. `auxiliary` per micro-batch: a further gradient, computed at restored weights and isolated from ``.grad``,
3. `around`: active during forward and backward of the main pass,
4. `objective`: the main loss with the strategy's terms,
5. `after_backward`: for gradients that must not be applied.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from pharmacist.core.env import world_size
from pharmacist.core.errors import DivergedError
from pharmacist.core.method import Method
from pharmacist.nn.distributed import total
from pharmacist.nn.grads import Gradient, gradient, trainable
from pharmacist.nn.hooks import head_at, replayed_rng
from pharmacist.nn.locate import output_head
from pharmacist.nn.losses import batch_loss, targets


Batch = Mapping[str, torch.Tensor]
"""``input_ids``, ``attention_mask`` and ``labels``, each of shape [rows, length]."""
STREAMS = {"harmful": "harmful", "held_out": "harmful", "paired": "harmful", "retain": "data", "safe": "safe"}
"""Auxiliary streams and the sets of rows that they draw from: ``data`` is the set that is trained on."""


@dataclass
class StrategyState:
    """State of a strategy in a checkpoint: tensors (safetensors) and plain values (JSON)."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


@dataclass
class StepContext:
    """A micro-batch of the training, and the passes and gradients that a strategy may compute during it.

    Attributes:
        model: The model itself, never its data-parallel wrapper.
        batch: The main batch.
        rows: Row numbers of the batch in the alignment set, if known.
        update: Number of optimizer steps before this one.
        micro: Number of the micro-batch within its update.
        scale: Share of a micro-batch in its update, 1 / accumulation steps; the Trainer applies it.
        autocast: The training's autocast context, for parts of the model that are run separately; `output` uses it.
        streams: Name -> endless iterator of batches, or `data.streams.PairedRows`.
        metrics: Metrics of the step, filled by `log`.
        targets: Number of target tokens of the whole update, over all its micro-batches and all processes.
        tokens: Likewise the number of all tokens, without padding.
        weights: Weight of each row's loss in the main pass, shape [rows]; None if all weights are equal.
    """

    model: nn.Module
    batch: Batch
    update: int = 0
    micro: int = 0
    scale: float = 1.0
    streams: Mapping[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    rows: Sequence[int] = ()
    targets: torch.Tensor | int | None = None
    tokens: torch.Tensor | int | None = None
    weights: torch.Tensor | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, determined on first use."""
        return trainable(self.model)

    def next(self, stream: str) -> Batch:
        """The next batch of an auxiliary stream."""
        batch: Batch = next(self.streams[stream])
        return batch

    def output(self, batch: Batch, model: nn.Module | None = None) -> Any:
        """Output of a plain forward pass of the model, or of another one."""
        model = self.model if model is None else model
        with self.autocast():
            return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    def logits(self, batch: Batch, keep: torch.Tensor) -> torch.Tensor:
        """Logits where `keep`, bool of shape [rows, length], is true; shape [positions, vocabulary]."""
        with head_at(output_head(self.model), keep):
            logits: torch.Tensor = self.output(batch).logits
        return logits

    def summed_ce(self, batch: Batch, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        """Cross-entropy summed over the target tokens of a batch, with row weights, and the number of these tokens."""
        keep, tokens = targets(batch["labels"])
        return batch_loss(self.logits(batch, keep), batch["labels"], 1, weights), len(tokens)

    def ce(self, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy over the target tokens of a batch, a scalar; of all processes' batches, see `mean`."""
        return self.mean(*self.summed_ce(batch))

    def main_ce(self) -> torch.Tensor:
        """The main loss of this micro-batch, with row weights, from an extra forward pass; see `mean_over_update`."""
        return self.mean_over_update(*self.summed_ce(self.batch, self.weights), self.targets)

    def mean(self, summed: torch.Tensor, count: int) -> torch.Tensor:
        """Converts a sum over this process's tokens (or rows) into its part of the mean over all processes.

        The mean of the parts is this value, so that a gradient averaged over the processes equals the gradient that a
        single process would get from all batches. It is 0 if there is nothing to count.
        """
        everywhere = total(torch.tensor(float(count), dtype=torch.float64, device=summed.device))
        return summed * (world_size() / max(float(everywhere), 1.0))

    def mean_over_update(self, summed: torch.Tensor, count: int, whole: torch.Tensor | int | None) -> torch.Tensor:
        """Converts a sum over this micro-batch's tokens into its part of the mean over the update.

        The mean of the parts over micro-batches and processes is the mean over all tokens, whatever the sizes of the
        micro-batches; the mean of the micro-batches' means would be a different number.

        Args:
            summed: Sum over this micro-batch's tokens on this process.
            count: Number of these tokens.
            whole: Number of tokens in the update, such as `targets` or `tokens`; None for those of this micro-batch.
        """
        if whole is None:
            return self.mean(summed, count)
        return summed * world_size() / whole / self.scale

    def value(self, part: torch.Tensor) -> float:
        """The value of a `mean` or a `mean_over_update` over all processes, from this process's part."""
        return float(total(part)) / world_size()

    def replay(self) -> AbstractContextManager[None]:
        """A context that restores the random state, so that passes that are compared use the same dropout masks."""
        return replayed_rng(self.batch["input_ids"].device)

    @staticmethod
    def check(*values: torch.Tensor) -> None:
        """Raises `DivergedError` if an auxiliary pass gave NaN or infinity, before it changes anything.

        All processes of a data-parallel run must call this, and all raise if one has such a value.
        """
        if not all(bool(torch.isfinite(total(value))) for value in values):
            raise DivergedError("an auxiliary pass is not finite; lower the learning rate or the method's strength")

    def grads(self, loss: torch.Tensor) -> Gradient:
        """Gradient of a loss with respect to the trainable parameters; see `nn.grads.gradient`."""
        return gradient(loss, self.parameters)

    def log(self, **values: float | torch.Tensor) -> None:
        """Logs metrics of this step; the Trainer averages them between two log lines."""
        for name, value in values.items():
            self.metrics[name] = float(value.detach() if isinstance(value, torch.Tensor) else value)


class GradientStrategy(Method):
    """A training-time defense. Every hook does nothing unless it is overridden.

    Attributes:
        stages: Stages in which it can be used: ``align``, ``finetune``.
        streams: Auxiliary streams from which it draws, keys of `STREAMS`.
        reads_outputs: Whether `objective` reads the model's outputs, which costs a further forward pass in TRL.
        held_out: Share of the harmful prompts that go to the stream ``held_out`` instead of ``harmful``.
        start: What `setup` keeps of the initial model. It is not part of a checkpoint: a Trainer that resumes its own
            training passes on what the first `setup` kept, and another process loads the initial model again.
    """

    stages: ClassVar[frozenset[str]] = frozenset({"align"})
    streams: tuple[str, ...] = ()
    reads_outputs: ClassVar[bool] = True
    held_out: float = 0.0
    start: Any = None

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The sets of rows from which its streams draw, besides the training rows."""
        return frozenset(STREAMS.get(stream, stream) for stream in self.streams) - {"data"}

    def setup(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """Finds the modules and tensors to act on, once before training.

        Args:
            model: The model, with its trainable parameters chosen.
            seed: Seed of the strategy's random numbers.

        Returns:
            Their names or number (JSON), for the manifest.

        Raises:
            NoMatchError: There is nothing to act on.
        """
        return {}

    def mixed_in(self, rows: int) -> tuple[int, bool]:
        """How many safe rows are mixed into `rows` rows of the user, and whether they replace benign rows."""
        return 0, False

    def draw(self, update: int, window: int, streams: Mapping[str, Any]) -> list[Batch] | None:
        """The `window` micro-batches of an optimizer step; None means those of the user's rows."""
        return None

    def begin_update(self, update: int) -> None:
        """Called before the first micro-batch of each optimizer step."""

    def auxiliary(self, step: StepContext) -> Gradient | None:
        """A gradient to add to the main gradient; must not change weights, training mode and random state."""
        return None

    def around(self, step: StepContext) -> AbstractContextManager[Any]:
        """A context manager around forward and backward of the main pass."""
        return nullcontext()

    def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        """The loss that is differentiated, computed from the main loss; `outputs` is None unless `reads_outputs`."""
        return loss

    def after_backward(self, step: StepContext) -> None:
        """Called when the main gradient is in ``.grad``, before it is clipped and applied."""

    def state(self) -> StrategyState:
        """State to save in a checkpoint."""
        return StrategyState()

    def load_state(self, state: StrategyState) -> None:
        """Restores the state of a checkpoint, after `setup`."""

    def close(self) -> None:
        """Called once after training, even after an exception."""
