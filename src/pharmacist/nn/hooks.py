"""Context managers around passes of a model; no hook, mode or setting stays on it after the block.

Hooks return new tensors instead of changing any, and act once where non-reentrant gradient checkpointing repeats a
forward pass during backward.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from pharmacist.core.errors import CompatibilityError


Activations = dict[str, torch.Tensor]
"""Module name -> the first tensor of its output, usually of shape [rows, length, width]."""
_SHORT = 256
"""Tokens of a row up to which the attention weights of a batch, which are kept for the backward pass, are small."""


@contextmanager
def hooked(modules: Mapping[str, nn.Module], hook: Callable[..., Any], *, before: bool = False) -> Iterator[None]:
    """Registers a forward hook on modules for the block, which gets the module's name as a first argument.

    The hook is called as ``(name, module, args, kwargs, output)`` and may return another output; with `before` it is
    called before the module runs, as ``(name, module, args, kwargs)``, and may return other args and kwargs.
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            register: Any = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(partial(hook, name), with_kwargs=True).remove)
        yield


def _first(output: Any) -> torch.Tensor:
    value = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(value, torch.Tensor):
        raise CompatibilityError(f"a module returns {type(value).__name__} where a tensor was expected")
    return value


def _with_first(output: Any, value: torch.Tensor) -> Any:
    return value if isinstance(output, torch.Tensor) else type(output)((value, *output[1:]))


@contextmanager
def capture(modules: Mapping[str, nn.Module], *, inputs: bool = False) -> Iterator[Activations]:
    """Collects each module's output, or its input, the first time that it runs in the block.

    Yields:
        Filled as the modules run; the tensors are part of the graph.
    """
    found: Activations = {}

    def read(name: str, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if name not in found:
            found[name] = _first(output[0] if output else args or kwargs["hidden_states"])

    with hooked(modules, read, before=inputs):
        yield found


def plain_states(found: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The hidden states of several depths; refuses others than of shape [rows, length, width], as Gemma 3n has."""
    states = list(found)
    if odd := [tuple(state.shape) for state in states if state.dim() != 3]:
        raise CompatibilityError(
            f"the model's layers give hidden states of shape {odd[0]}, several per token (as in Gemma 3n); "
            "this method cannot act on them"
        )
    return states


def add_offsets(modules: Mapping[str, nn.Module], offsets: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
    """Adds a constant to each module's output; the block must include the backward pass.

    An offset has the shape of the module's output and is cast to its dtype; modules without one are left alone.
    """

    def add(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        value, offset = _first(output), offsets[name]
        if value.shape != offset.shape:
            raise CompatibilityError(f"an offset of shape {tuple(offset.shape)} meets {tuple(value.shape)}")
        return _with_first(output, value + offset.to(value.dtype))

    return hooked({name: modules[name] for name in offsets}, add)


def activation_gradients(
    modules: Mapping[str, nn.Module], loss: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, Activations]:
    """The derivative of a loss with respect to the outputs of modules.

    `loss` runs the model once and returns a scalar. No parameter gets a gradient, and up to the first module that runs
    no graph is built at all.

    Returns:
        The loss, detached, and the derivative per module, in the dtype of its output.
    """
    found: Activations = {}

    def read(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if name in found:
            return None
        value = _first(output)
        if not found:
            value = value.detach().requires_grad_()
            torch.set_grad_enabled(True)  # from here on; no_grad around the pass resets it
        found[name] = value
        return _with_first(output, value)

    with hooked(modules, read), torch.no_grad():
        value = loss()
        missed = [name for name in modules if name not in found]
        if missed:
            raise CompatibilityError(f"{missed[0]}: did not run in the forward pass")
        grads = torch.autograd.grad(value, list(found.values()))
    return value.detach(), dict(zip(found, grads, strict=True))


def head_at(head: nn.Module | None, keep: torch.Tensor) -> AbstractContextManager[None]:
    """Restricts the output head to some positions for the block, as logits without a target are costly and not needed.

    `keep` is a bool tensor of shape [rows, length]; logits then have the shape [positions kept, vocabulary].
    """
    return head_gets(head, lambda states: states[keep])


def head_gets(head: nn.Module | None, other: Callable[[torch.Tensor], torch.Tensor]) -> AbstractContextManager[None]:
    """Gives the output head what `other` makes of its input, for the block."""
    if head is None:
        raise CompatibilityError("the model does not name its output head")

    def replace(name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (other(args[0]), *args[1:]), kwargs

    return hooked({"head": head}, replace, before=True)


def replayed_rng(device: torch.device) -> AbstractContextManager[None]:
    """Restores the random state after the block, so that the next pass draws the same dropout masks."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for the block; every module's mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def quick_attention(model: nn.Module, length: int) -> Iterator[None]:
    """Computes attention without torch's fused kernel in the block, where rows of `length` tokens train faster so.

    On a CPU in bfloat16 the backward pass of the fused attention is a quarter of a training step on short rows; a step
    of SmolLM2-135M on 8 rows of up to 200 tokens takes 20 % less without it. Long rows, single precision and GPUs keep
    the implementation that the model was loaded with, with or without adapters.
    """
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    fused = getattr(getattr(inner, "config", None), "_attn_implementation", None) == "sdpa"
    quicker = torch.is_grad_enabled() and length <= _SHORT and fused
    if not (quicker and inner.device.type == "cpu" and inner.dtype == torch.bfloat16):
        yield
        return
    inner.set_attn_implementation("eager")
    try:
        yield
    finally:
        inner.set_attn_implementation("sdpa")
