"""TAR: meta-learn weights that resist an attacker's training run."""

import copy
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Lt
from torch import nn

from pharmacist.core.errors import ConfigError
from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast0, AtLeast1, Checked, NotNegative
from pharmacist.nn.grads import Gradient, norm, preserved
from pharmacist.nn.hooks import Activations, capture, evaluating, plain_states
from pharmacist.nn.locate import decoder_layers, final_norm
from pharmacist.nn.losses import negative_entropy, precise, targets
from pharmacist.training.strategy import Batch, GradientStrategy, StepContext


_ADVERSARIES = ("harmful", "switch")
# The original's settings for weaponisation knowledge (its code, not all of which the paper states), and the baseline
# that T-Vaccine's authors intended: one plain gradient step, and the alignment loss after it.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "lam": {"original": 4.0, "one-step": 2.0},
    "inner_steps": {"original": 64, "one-step": 1},
    "inner_optimizer": {"original": "adamw", "one-step": "sgd"},
    "inner_learning_rates": {"original": [2e-6, 2e-5, 4e-5], "one-step": [0.01]},
    "every": {"original": 4, "one-step": 1},
    "adversaries": {"original": ["harmful", "switch"], "one-step": ["harmful"]},
    "objective": {"original": "entropy", "one-step": "alignment"},
    "representation": {"original": 1.0, "one-step": 0.0},
}


@dataclass
class TARConfig(Checked):
    """Options of TAR; the form decides about those left out."""

    form: Literal["original", "one-step"] = "original"
    """original: each step simulates an attack of many AdamW steps; one-step: of a single gradient step."""
    lam: NotNegative | None = None
    """Weight of tamper resistance at the end of the attack: 4, one-step 2; with 0 for lam and representation it is
    sft."""
    inner_steps: AtLeast0 | None = None
    """Steps of the simulated attack: 64, one-step 1; with 0 the loss is computed without an attack."""
    inner_optimizer: Literal["adamw", "sgd"] | None = None
    """The attacker's optimizer, fresh in every attack: adamw, one-step sgd."""
    inner_learning_rates: list[NotNegative] | None = None
    """Learning rates, one of which is drawn for each attack: [2e-6, 2e-5, 4e-5], made for full tuning; one-step
    [0.01]."""
    every: AtLeast1 | None = None
    """Attack steps between two evaluations of tamper resistance: 4, one-step 1."""
    schedule: Literal["exponential", "uniform"] = "exponential"
    """Weights of the evaluations: rising to lam at the end of the attack, or lam / inner_steps each."""
    schedule_rate: NotNegative = 0.0625
    """Rate of the exponential schedule per attack step."""
    tasks: AtLeast1 = 1
    """Simulated attacks per step."""
    adversaries: list[str] | None = None
    """Kinds of attack, one of which is drawn for each attack: [harmful, switch], one-step [harmful]. harmful: harmful
    rows. switch: alignment rows first. A name that occurs twice is twice as likely."""
    objective: Literal["entropy", "alignment"] | None = None
    """Tamper resistance: entropy of answers to held-out harmful rows, or (default of one-step) the alignment loss."""
    entropy_positions: Literal["response", "all"] = "response"
    """Positions whose entropy counts; all includes prompt and padding, as in the published code."""
    representation: NotNegative | None = None
    """Weight of the distance of the hidden states from those of the initial model: 1, one-step 0."""
    held_out: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Share of the harmful prompts that attacks never train on, for the entropy objective."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value_of in _DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, copy.copy(value_of[self.form]))
        rates, kinds = self.inner_learning_rates or [], self.adversaries or []
        if not rates:
            raise ConfigError("inner_learning_rates: needs at least one number")
        if not kinds or not set(kinds) <= set(_ADVERSARIES):
            raise ConfigError(f"adversaries must be some of {', '.join(_ADVERSARIES)}, not {kinds}")
        if 0 < (self.inner_steps or 0) < (self.every or 1):
            raise ConfigError(f"every {self.every}: the attack has only {self.inner_steps} steps")
        if self.schedule == "uniform":
            self.refuse_unused("schedule_rate", because="schedule")
        if self.objective == "alignment":
            self.refuse_unused("held_out", "entropy_positions", because="objective")


def evaluation_weights(
    steps: int, every: int, lam: float, schedule: str = "exponential", rate: float = 0.0625
) -> dict[int, float]:
    """Weights of the gradients of tamper resistance, by the attack step after which it is evaluated.

    Args:
        steps: Length K of the attack.
        every: Evaluations come after the steps i (from 0) with (i + 1) divisible by this.
        lam: Weight after the last step.
        schedule: ``exponential``: lam * exp(rate * (i - (K - 1))); ``uniform``: lam / K.
        rate: Of the exponential schedule.
    """
    return {
        i: lam * math.exp(rate * (i - (steps - 1))) if schedule == "exponential" else lam / steps
        for i in range(every - 1, steps, every)
    }


def hidden_distance(states: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> torch.Tensor:
    """Euclidean distance of each token's hidden states from their reference, mean over depths, shape [rows, length].

    Per depth there is one tensor of shape [rows, length, width].
    """
    pairs = zip(states, reference, strict=True)
    distances = [torch.linalg.vector_norm(precise(state) - precise(other), dim=-1) for state, other in pairs]
    return torch.stack(distances).mean(0)


class TAR(GradientStrategy):
    """Adds gradients of a tamper-resistance loss, computed along simulated attacks, to the main gradient.

    Paper: Tamirisa et al., "Tamper-Resistant Safeguards for Open-Weight LLMs", ICLR 2025, algorithm 1.
    """

    Config = TARConfig
    streams: tuple[str, ...] = ("harmful", "held_out", "retain")
    paper = "arXiv 2408.00761"
    reads_outputs = False
    config: TARConfig

    def __post_init__(self) -> None:
        config = self.config
        self.held_out = config.held_out
        kinds = config.adversaries or []
        used = {"harmful": True, "held_out": config.objective == "entropy", "retain": "switch" in kinds}
        self.streams = tuple(name for name in type(self).streams if used.get(name))
        self._reference: list[Activations] = []
        self._states: list[Activations] = []

    def setup(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """Keeps the initial model for the representation term: the base of a LoRA model, else a copy."""
        self.seed, self.start = seed, None
        if not self.config.representation:
            return {}
        if not hasattr(model, "disable_adapter"):
            self.start = copy.deepcopy(model).requires_grad_(False).eval()
        return {"hidden_states": len(decoder_layers(model)) + 1}

    def auxiliary(self, step: StepContext) -> Gradient:
        """Attacks the model, collects tamper-resistance gradients on the way, and restores the weights."""
        config, parameters = self.config, step.parameters
        steps, lam = config.inner_steps or 0, config.lam or 0.0
        weights = evaluation_weights(steps, config.every or 1, lam, config.schedule, config.schedule_rate)
        found = {name: precise(torch.zeros_like(p)) for name, p in parameters.items()}
        for task in range(config.tasks):
            draw = random.Random(derive(self.seed, "attack", step.update, step.micro, task))
            held_out = step.next("held_out") if config.objective == "entropy" else None
            with step.replay(), preserved(parameters):
                if not steps:
                    self._add(step, held_out, lam / config.tasks, found)
                for i in self._attack(step, draw):
                    if i in weights:
                        self._add(step, held_out, weights[i] / config.tasks, found)
        step.log(tamper_gradient_norm=norm(found))
        return found

    def _attack(self, step: StepContext, draw: random.Random) -> Iterator[int]:
        """Takes the attacker's steps one by one, in place; yields each step's number."""
        steps = self.config.inner_steps or 0
        kind, rate = draw.choice(self.config.adversaries or []), draw.choice(self.config.inner_learning_rates or [])
        benign = draw.betavariate(6, 3) * steps if kind == "switch" else 0
        # Small steps add up in float32, where rounding to bfloat16 would swallow each; else they are the weights.
        exact = {name: precise(parameter.detach()) for name, parameter in step.parameters.items()}
        make: Any = torch.optim.AdamW if self.config.inner_optimizer == "adamw" else torch.optim.SGD
        optimizer = make(exact.values(), lr=rate)
        for i in range(steps):
            loss = step.ce(step.next("retain" if i < benign else "harmful"))
            for name, g in step.grads(loss).items():
                exact[name].grad = g
            optimizer.step()
            with torch.no_grad():
                for name, value in exact.items():
                    step.parameters[name].copy_(value)
            step.log(**{f"attack_loss_{'first' if i == 0 else 'last'}": step.value(loss)})
            yield i

    def _add(self, step: StepContext, held_out: Batch | None, weight: float, found: Gradient) -> None:
        loss = self.tamper_loss(step, held_out)
        for name, g in step.grads(loss).items():
            found[name] += weight * g
        step.log(tamper_loss=step.value(loss))

    def tamper_loss(self, step: StepContext, held_out: Batch | None) -> torch.Tensor:
        """The loss that should stay low under attack, a scalar."""
        if held_out is None:
            return step.main_ce()
        keep, _ = targets(held_out["labels"])
        if self.config.entropy_positions == "all":
            keep = torch.ones_like(keep)
        return step.mean(negative_entropy(step.logits(held_out, keep)), int(keep.sum()))

    @contextmanager
    def around(self, step: StepContext) -> Iterator[None]:
        """Collects the hidden states of the main pass and of the initial model."""
        if not self.config.representation:
            yield
            return
        with step.replay(), torch.no_grad(), self._initial(step.model) as model:
            with _hidden_states(model) as self._reference:
                step.output(step.batch, model)
        try:
            with _hidden_states(step.model) as self._states:
                yield
        finally:
            self._reference, self._states = [], []

    @contextmanager
    def _initial(self, model: Any) -> Iterator[nn.Module]:
        if self.start is not None:
            yield self.start
            return
        with evaluating(model), model.disable_adapter():
            yield model

    def objective(self, step: StepContext, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        """The alignment loss plus the distance of the hidden states from the initial model's."""
        if not self.config.representation:
            return loss
        mask = step.batch["attention_mask"]
        distance = hidden_distance(_in_order(self._states), _in_order(self._reference))
        drift = step.mean_over_update((distance * mask).sum(), int(mask.sum()), step.tokens)
        step.log(representation_distance=step.value(drift))
        return loss + self.config.representation * step.scale * drift


@contextmanager
def _hidden_states(model: nn.Module) -> Iterator[list[Activations]]:
    """Collects embeddings and the outputs of all layers, the last layer's after the final normalisation."""
    layers = decoder_layers(model)
    first, last = next(iter(layers)), next(reversed(layers))
    with capture({first: layers[first]}, inputs=True) as embedded, capture(layers | {last: final_norm(model)}) as rest:
        yield [embedded, rest]


def _in_order(parts: Sequence[Activations]) -> list[torch.Tensor]:
    return plain_states(value for part in parts for value in part.values())
