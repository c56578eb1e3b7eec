"""T-Vaccine: Vaccine on the layers that harmful data moves most, the others frozen."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pharmacist.core.env import world_size
from pharmacist.core.errors import ConfigError, DataError, NoMatchError
from pharmacist.core.progress import say
from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast1, Checked, NotNegative
from pharmacist.defenses.alignment.vaccine import Perturbing, perturbed, vector_norm
from pharmacist.nn.distributed import from_main, total
from pharmacist.nn.hooks import activation_gradients
from pharmacist.nn.locate import attention_modules, decoder_layers
from pharmacist.nn.losses import target_losses, targets
from pharmacist.training.strategy import StepContext, StrategyState


_LAYERS = 8


@dataclass
class TVaccineConfig(Checked):
    """Options of T-Vaccine."""

    rho: NotNegative = 3.0
    """Norm of the perturbation of a micro-batch, over the sampled layers and all its rows, tokens and channels."""
    layers: AtLeast1 | None = None
    """Number of layers that are sampled, trained and perturbed at a time; by default 8, or all layers if there are
    fewer."""
    sample_every: AtLeast1 = 20
    """Steps between two samplings of layers."""
    score_every: AtLeast1 = 200
    """Steps between two measurements of the layers' probabilities; these precede a sampling in the same step."""
    score_rows: AtLeast1 = 100
    """Harmful rows per measurement, in whole batches; the published code uses a single row."""
    freeze: Literal["layer", "attention"] = "layer"
    """Which part of the other layers is frozen: the whole layer, as in the paper, or its self-attention, as in the
    published code."""


def sample_layers(p: torch.Tensor, count: int, seed: int) -> list[int]:
    """Draws layers one after the other without replacement, each with probability proportional to `p`, shape [layers].

    Their numbers come back in ascending order.
    """
    if (known := int((p > 0).sum())) < count:
        raise DataError(
            f"only {known} layers have a harmful gradient, so {count} cannot be sampled; lower defense.layers or give "
            "other harmful rows"
        )
    generator = torch.Generator().manual_seed(seed)
    # Drawn on the CPU, so that the same layers come on every device.
    return sorted(torch.multinomial(p.double().cpu(), count, replacement=False, generator=generator).tolist())


class TVaccine(Perturbing):
    """Vaccine on a few layers, sampled by the norm of their harmful gradient, while the others are frozen.

    Paper: Liu et al., "Targeted Vaccine: Safety Alignment for Large Language Models against Harmful Fine-Tuning via
    Layer-wise Perturbation", 2024, algorithm 1.
    """

    Config = TVaccineConfig
    name = "t-vaccine"
    streams = ("harmful",)
    paper = "arXiv 2410.09760"
    config: TVaccineConfig

    def setup(self, model: nn.Module, seed: int) -> dict[str, Any]:
        self.modules = attention_modules(model)
        depth = len(self.modules)
        self.count = min(_LAYERS, depth) if self.config.layers is None else self.config.layers
        if self.count > depth:
            raise ConfigError(f"defense.layers {self.count}: the model has {depth} layers; give at most that")
        if self.config.layers is None and depth <= _LAYERS:
            say(f"t-vaccine: the model has {depth} layers, and all of them are trained and perturbed")
        frozen = decoder_layers(model) if self.config.freeze == "layer" else self.modules
        # Weights outside the decoder layers (under full tuning) are always trained.
        self.owned = [[p for p in module.parameters() if p.requires_grad] for module in frozen.values()]
        without = [name for name, owned in zip(frozen, self.owned, strict=True) if not owned]
        if without:
            raise NoMatchError(
                f"{without[0]} has no trained weights, so it cannot be trained in its turn; include it in "
                "lora.target_modules"
            )
        self.seed, self.p = seed, torch.zeros(depth)
        self.active: list[int] = []
        return {"attention_modules": list(self.modules), "sampled_at_a_time": self.count}

    def auxiliary(self, step: StepContext) -> None:
        """Measures the layers' probabilities and samples layers, in the steps that are due."""
        if step.micro:
            return
        first = not self.active  # not always in update 0, which is left out where it has no target
        if first or step.update % self.config.score_every == 0:
            scores = self.scores(step)
            self.p = (scores / scores.sum()).cpu()
        if first or step.update % self.config.sample_every == 0:
            drawn = sample_layers(self.p, self.count, derive(self.seed, "layers", step.update))
            self.active = from_main(drawn)

    def scores(self, step: StepContext) -> torch.Tensor:
        """Mean over harmful rows of the norm of a row's gradient at each layer, shape [layers]."""
        summed, count = torch.zeros((), dtype=torch.float64), 0
        while count < self.config.score_rows:
            batch = step.next("harmful")
            rows = len(batch["input_ids"])
            keep, tokens = targets(batch["labels"])
            owner = keep.nonzero()[:, 0]
            share = 1.0 / keep.sum(1).clamp(min=1)[owner]

            # A row's activations affect its loss alone, so one pass gives the gradients of all rows.
            with step.replay():
                value, gradients = activation_gradients(
                    self.modules,
                    lambda: (target_losses(step.logits(batch, keep), tokens) * share).sum(),  # noqa: B023
                )
            norms = torch.stack([vector_norm(gradients[name].flatten(1), dim=1) for name in self.modules])
            step.check(value, norms.sum())
            summed = summed.to(norms.device) + norms.double().sum(1)
            count += rows * world_size()
        return total(summed) / count

    @contextmanager
    def around(self, step: StepContext) -> Iterator[None]:
        """Perturbs the sampled layers in the main pass, in which the others are constants."""
        modules = {name: module for number, (name, module) in enumerate(self.modules.items()) if number in self.active}
        # Under data parallelism the wrapper waits for every gradient, so there they are computed and thrown away.
        frozen = self._frozen() if world_size() == 1 else []
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            with perturbed(step, modules, self.config.rho):
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def after_backward(self, step: StepContext) -> None:
        """Frozen weights have no gradient at all: neither decay nor momentum moves them."""
        for parameter in self._frozen():
            parameter.grad = None
        step.log(lowest_sampled_layer=float(min(self.active)))

    def _frozen(self) -> list[nn.Parameter]:
        return [p for number, owned in enumerate(self.owned) if number not in self.active for p in owned]

    def state(self) -> StrategyState:
        return StrategyState(tensors={"p": self.p}, values={"active": self.active})

    def load_state(self, state: StrategyState) -> None:
        self.p, self.active = state.tensors["p"], list(state.values["active"])
