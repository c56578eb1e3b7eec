"""Float64 models, batches and a training step without any Trainer, for the mathematics of the defenses."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from pharmacist.data.batches import collate
from pharmacist.nn.grads import Gradient, add_to_grad, trainable
from pharmacist.nn.losses import batch_loss
from pharmacist.training.strategy import Batch, GradientStrategy, StepContext
from tests.support.tiny import TinyDecoder, TokenRows


VOCABULARY = 12


def model(layers: int = 3, seed: int = 0, **options: Any) -> TinyDecoder:
    """A decoder whose linear layers are trained, but neither embeddings nor head (as under LoRA)."""
    found = TinyDecoder(VOCABULARY, width=8, layers=layers, seed=seed, **options).train()
    for layer in found.layers:
        layer.requires_grad_(True)
    return found


def rows(n: int, seed: int, longest: int = 5) -> TokenRows:
    """Random rows with prompts of at least two tokens."""
    rng = np.random.default_rng(seed)
    tokens = lambda least: rng.integers(1, VOCABULARY, size=rng.integers(least, longest + 1)).tolist()  # noqa: E731
    return TokenRows([(tokens(2), tokens(1)) for _ in range(n)])


def batch(sequences: TokenRows, which: Any = None, pad: int = 0) -> dict[str, torch.Tensor]:
    """Some rows as a batch, with `pad` columns of padding more than needed."""
    which = range(len(sequences)) if which is None else which
    items = [{"input_ids": sequences.ids[i], "n_prompt": int(sequences.prompt_lengths[i])} for i in which]
    found = collate(items, 0)
    fill = {"input_ids": 3, "attention_mask": 0, "labels": -100}
    return {key: nn.functional.pad(value, (0, pad), value=fill[key]) for key, value in found.items()}


def endless(*batches: Batch) -> Iterator[Batch]:
    while True:
        yield from batches


def loss_of(net: nn.Module, data: Batch) -> torch.Tensor:
    """Mean cross-entropy, computed plainly."""
    return batch_loss(net(data["input_ids"], data["attention_mask"]).logits, data["labels"])


def gradient_of(net: nn.Module, loss: torch.Tensor) -> Gradient:
    """Gradient by the trained parameters."""
    parameters = trainable(net)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def micro_step(
    strategy: GradientStrategy,
    net: nn.Module,
    data: Batch,
    *,
    streams: Any = None,
    update: int = 0,
    micro: int = 0,
    scale: float = 1.0,
    rows: Any = (),
    **whole: Any,
) -> StepContext:
    """What the Trainer does with a micro-batch; gradients end in ``.grad``.

    `whole`: ``targets`` and ``tokens`` of the update, where this is one of several micro-batches, and ``weights``.
    """
    step = StepContext(
        model=net, batch=data, update=update, micro=micro, scale=scale, streams=streams or {}, rows=rows, **whole
    )
    if micro == 0:
        strategy.begin_update(update)
    extra = strategy.auxiliary(step)
    if extra is not None:
        add_to_grad(step.parameters, extra, scale)
    with strategy.around(step):
        out = net(data["input_ids"], data["attention_mask"])
        main = batch_loss(out.logits, data["labels"], step.targets, step.weights)
        loss = strategy.objective(step, main if step.targets is not None else main * scale, out)
        loss.backward()
    strategy.after_backward(step)
    return step


def method_gradient(strategy: GradientStrategy, net: nn.Module, data: Batch, **options: Any) -> Gradient:
    """The gradient of one step, with ``.grad`` cleared before and after."""
    net.zero_grad()
    micro_step(strategy, net, data, **options)
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trainable(net).items()}
    net.zero_grad()
    return found


def accumulated(
    strategy: GradientStrategy, net: nn.Module, parts: list[Batch], *, known: bool = True, **options: Any
) -> tuple[Gradient, dict[str, float]]:
    """Gradient of an update of several micro-batches, and what it logs: the mean over them, as in the Trainer's log.

    Not `known`: each takes itself for the update, so that its mean counts as much as that of any other.
    """
    whole = {
        "targets": sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts),
        "tokens": sum(int(part["attention_mask"].sum()) for part in parts),
    }
    whole = whole if known else {}
    net.zero_grad()
    steps = [
        micro_step(strategy, net, part, micro=micro, scale=1 / len(parts), **whole, **options)
        for micro, part in enumerate(parts)
    ]
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trainable(net).items()}
    net.zero_grad()
    return found, {key: sum(step.metrics[key] for step in steps) / len(steps) for key in steps[0].metrics}


def unequal_parts() -> list[list[int]]:
    """Eight micro-batches of 1 to 5 of 23 rows."""
    sizes = (1, 5, 2, 4, 1, 3, 5, 2)
    assert len(sizes) == 8 and sum(sizes) == 23
    starts = [sum(sizes[:i]) for i in range(8)]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def difference(a: Gradient, b: Gradient) -> float:
    """Largest absolute difference."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def combined(*terms: tuple[float, Gradient]) -> Gradient:
    """A linear combination."""
    return {name: sum(factor * grads[name] for factor, grads in terms) for name in terms[0][1]}


def directional(net: nn.Module, value: Callable[[], float], direction: Gradient, h: float = 1e-6) -> float:
    """Central finite difference of a value along a direction in the weights."""
    parameters, found = trainable(net), []
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(saved[name] + sign * h * direction[name])
        found.append(float(torch.as_tensor(value()).detach()))
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(saved[name])
    return (found[0] - found[1]) / (2 * h)


def random_direction(net: nn.Module, seed: int = 0) -> Gradient:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in trainable(net).items()}


def along(grads: Gradient, direction: Gradient) -> float:
    return float(sum((grads[name] * direction[name]).sum() for name in grads))


def fingerprint(net: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers, copied."""
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def hooks(net: nn.Module) -> int:
    """Number of forward, forward-pre and backward hooks on all modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in net.modules() for kind in kinds)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
