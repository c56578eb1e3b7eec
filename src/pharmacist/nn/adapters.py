"""Several LoRA adapters on one frozen base model, with common initial weights and a training that resumes exactly."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pharmacist.core.errors import DataError
from pharmacist.core.files import atomic_path, write_json
from pharmacist.core.mappings import under
from pharmacist.core.seeding import derive
from pharmacist.data.arrays import IntArray
from pharmacist.nn.batching import Batch, Sequences, make_batch
from pharmacist.nn.hooks import quick_attention
from pharmacist.nn.locate import linear_names
from pharmacist.nn.options import AdapterOptions as AdapterOptions
from pharmacist.nn.reading import read_row_losses


Tensors = Mapping[str, torch.Tensor]
Names = str | tuple[str, ...] | None
"""An adapter, several whose updates add up, or none."""


@dataclass(frozen=True)
class TrainingState:
    """What a training of adapters is made of after so many updates; tensors are called ``adapter/weight``.

    Attributes:
        step: Updates so far.
        weight: The adapters' weights.
        m: Adam's first moments.
        v: Its second moments.
        extra: Further tensors that change in the training, by name.
    """

    step: int
    weight: Tensors
    m: Tensors
    v: Tensors
    extra: Tensors

    @classmethod
    def after(cls, step: int, optimizer: torch.optim.AdamW, weight: Tensors, extra: Tensors) -> "TrainingState":
        """The state of a training whose weights AdamW has updated that many times; moments without gradient are 0."""
        moments = {key: optimizer.state.get(value, {}) for key, value in weight.items()}
        m, v = (
            {key: own.get(name, torch.zeros_like(weight[key])) for key, own in moments.items()}
            for name in ("exp_avg", "exp_avg_sq")
        )
        return cls(step, weight, m, v, extra)

    @torch.no_grad()
    def restore(self, optimizer: torch.optim.AdamW, weight: Tensors, extra: Tensors) -> None:
        """Brings a training of the same tensors back to this state, in place."""
        for key, value in weight.items():
            value.copy_(self.weight[key])
            m, v = (moments[key].to(value.device) for moments in (self.m, self.v))
            optimizer.state[value] = {"step": torch.tensor(float(self.step)), "exp_avg": m, "exp_avg_sq": v}
        for key, value in extra.items():
            value.copy_(self.extra[key])

    def of(self, adapter: str) -> "TrainingState":
        """The part of one adapter, its tensors by the names of the weights."""
        weight, m, v = (under(f"{adapter}/", part) for part in (self.weight, self.m, self.v))
        return replace(self, weight=weight, m=m, v=v)

    def save(self, path: Path) -> None:
        """Writes it as safetensors."""
        tensors = {
            f"{part.name}/{key}": value.detach().cpu().contiguous()
            for part in fields(self)[1:]
            for key, value in getattr(self, part.name).items()
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"step": str(self.step)})

    @classmethod
    def load(cls, path: Path) -> "TrainingState":
        """Reads what `save` wrote."""
        with safe_open(path, "pt") as file:
            step = int(file.metadata()["step"])
        tensors = load_file(path)
        return cls(step, *(under(f"{part.name}/", tensors) for part in fields(cls)[1:]))


class AdapterBank:
    """Named LoRA adapters on one frozen model; all start from the same weights (common random numbers).

    The weights of the model, a causal language model, are frozen; `seed` is that of the common initial weights.
    """

    def __init__(self, model: nn.Module, options: AdapterOptions, seed: int, checkpoint_seconds: float = 30.0) -> None:
        config = LoraConfig(
            r=options.r, lora_alpha=options.alpha, lora_dropout=0.0, target_modules=linear_names(model), bias="none"
        )
        self.options, self._config, self._checkpoint_seconds = options, config, checkpoint_seconds
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "adapter", "init") % 2**63)
            self.model: PeftModel = get_peft_model(model, config, adapter_name="start")
        # PEFT's switches of adapters walk the whole model each time: on small models longer than the forward pass.
        self._layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        self._parameters: dict[str, dict[str, nn.Parameter]] = {"start": self._find("start")}
        self._training: tuple[str, ...] = ()
        self.tokens = 0
        """Tokens read by `row_losses` so far, padding not counted."""
        self._start = self.state("start")
        self.model.requires_grad_(False)
        self.model.eval()

    @property
    def device(self) -> torch.device:
        """Device of the adapters."""
        return next(iter(self._start.values())).device

    def add(self, name: str, state: Tensors | None = None) -> None:
        """Adds an adapter with the common initial weights, or with `state`; resets one that exists."""
        if name not in self._parameters:
            with torch.random.fork_rng(devices=[]):
                self.model.add_adapter(name, self._config)
            self._parameters[name] = self._find(name)
            self.model.requires_grad_(False)
        parameters, state = self.parameters(name), self._start if state is None else state
        if parameters.keys() != state.keys():
            raise DataError(f"adapter '{name}': its tensors do not fit this model; it was made for another base")
        for key, parameter in parameters.items():
            if parameter.shape != state[key].shape:
                raise DataError(f"adapter '{name}': tensor {key} has another shape; it was made for another base")
            with torch.no_grad():
                parameter.copy_(state[key])

    def _find(self, name: str) -> dict[str, nn.Parameter]:
        mark = f".{name}."
        return {n.replace(mark, "."): p for n, p in self.model.named_parameters() if "lora_" in n and mark in n}

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Trainable tensors of an adapter by name, without the adapter's name, as PEFT saves them."""
        return self._parameters[name]

    def linears(self, name: str) -> dict[str, nn.Module]:
        """The linear layers of an adapter by the names of their weights (as in `parameters`)."""
        find = self.model.get_submodule
        return {key: find(f"{key.removesuffix('.weight')}.{name}") for key in self.parameters(name)}

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """A copy of an adapter's tensors."""
        return {n: p.detach().clone().contiguous() for n, p in self.parameters(name).items()}

    def save(self, name: str, folder: Path) -> None:
        """Writes an adapter as a PEFT folder (safetensors and JSON)."""
        # PEFT's names of tensors, which PeftModel.from_pretrained expects.
        with atomic_path(folder / "adapter_model.safetensors") as path:
            save_file({key: value.cpu() for key, value in self.state(name).items()}, path, metadata={"format": "pt"})
        config = {key: value for key, value in self._config.to_dict().items() if value is not None}
        config["target_modules"] = sorted(self._config.target_modules)
        write_json(folder / "adapter_config.json", config | {"inference_mode": True})

    def load(self, name: str, folder: Path) -> None:
        """Reads an adapter written by `save`."""
        path = folder / "adapter_model.safetensors"
        if not path.is_file():
            raise DataError(f"{path}: missing; the saved selector is incomplete, run curate again")
        self.add(name, load_file(path))

    @contextmanager
    def using(self, name: Names) -> Iterator[nn.Module]:
        """Activates one adapter, several whose updates add up, or none (the base model alone), for the block."""
        names = [name] if isinstance(name, str) else list(name or ())
        for layer in self._layers:
            if name is None:
                layer.enable_adapters(False)
            elif layer.active_adapters != names:
                layer.set_adapter(names, inference_mode=True)
        self._mark_trained()
        try:
            yield self.model
        finally:
            if name is None:
                for layer in self._layers:
                    layer.enable_adapters(True)
                self._mark_trained()

    def _mark_trained(self) -> None:
        # PEFT's switches also set requires_grad; here `differentiable` alone decides about it.
        for name, parameters in self._parameters.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name in self._training)

    @contextmanager
    def differentiable(self, *names: str) -> Iterator[None]:
        """Lets adapters have gradients for the block, and no others."""
        self._training = names
        self._mark_trained()
        try:
            yield
        finally:
            self._training = ()
            self._mark_trained()

    def row_losses(self, name: Names, batch: Batch) -> torch.Tensor:
        """Mean completion loss of each row under adapters, or the base model alone, in nats; shape [rows]."""
        self.tokens += batch.tokens
        with self.using(name) as model, quick_attention(model, batch.input_ids.shape[1]):
            return read_row_losses(model, batch)

    def losses(self, name: Names, sequences: Sequences, rows: IntArray) -> torch.Tensor:
        """The `row_losses` of some rows."""
        return self.row_losses(name, make_batch(sequences, rows, self.device))

    def train(
        self,
        names: tuple[str, ...],
        loss: Callable[[int], torch.Tensor],
        *,
        steps: int,
        checkpoint: Path,
        advance: Callable[[], object] = lambda: None,
        extra: Tensors = MappingProxyType({}),
        keep: Mapping[int, Path] = MappingProxyType({}),
    ) -> None:
        """Trains adapters by AdamW for a fixed number of steps; killed at any moment, it continues bit for bit.

        Args:
            names: Adapters that are trained together.
            loss: step -> scalar; everything random in it must be a function of the step alone.
            steps: Updates.
            checkpoint: Partial state goes to this file (safetensors).
            advance: Called after each step, for a progress bar.
            extra: Further tensors that `loss` changes in place, such as the logits of row weights; checkpoints hold
                them too.
            keep: Number of updates -> file in which the `TrainingState` after them is kept.

        Raises:
            DataError: Loss or gradient is not finite; that step updates nothing.
        """
        parameters = {f"{name}/{key}": p for name in names for key, p in self.parameters(name).items()}
        optimizer = torch.optim.AdamW(parameters.values(), lr=self.options.learning_rate, weight_decay=0.0)
        first = 0
        if checkpoint.is_file():
            begun = TrainingState.load(checkpoint)
            begun.restore(optimizer, parameters, extra)
            first = begun.step
        with self.differentiable(*names):
            last_saved = time.monotonic()
            for step in range(steps):
                if step >= first:
                    optimizer.param_groups[0]["lr"] = self.options.learning_rate * learning_rate_factor(step, steps)
                    self.step(step, loss, optimizer)
                    if step + 1 in keep:
                        TrainingState.after(step + 1, optimizer, parameters, extra).save(keep[step + 1])
                    if time.monotonic() - last_saved > self._checkpoint_seconds and step + 1 < steps:
                        TrainingState.after(step + 1, optimizer, parameters, extra).save(checkpoint)
                        last_saved = time.monotonic()
                advance()
        optimizer.zero_grad(set_to_none=True)

    def step(self, step: int, loss: Callable[[int], torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        """One step of the training in `train`, with the gradient of each adapter clipped to length 1."""
        optimizer.zero_grad(set_to_none=True)
        value = loss(step)
        value.backward()  # type: ignore[no-untyped-call]
        # Each adapter by itself: training together must not couple them.
        norms = [nn.utils.clip_grad_norm_(self.parameters(name).values(), 1.0) for name in self._training]
        for what, number in (("loss", value), ("gradient", torch.stack(norms).sum())):
            if not torch.isfinite(number):
                raise DataError(f"selector training: the {what} is not finite at step {step}; lower the learning rate")
        optimizer.step()


def learning_rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up over a tenth of the steps, then linear decay."""
    warmup = max(1, steps // 10)
    return min(1.0, (step + 1) / warmup) * min(1.0, (steps - step) / max(1, steps - warmup))
