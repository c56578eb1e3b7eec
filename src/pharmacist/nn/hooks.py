"""Reading and shifting what modules put out, for the time of a block; nothing stays on the model.

Hooks return new tensors instead of changing any, and ignore that non-reentrant gradient checkpointing runs a forward
again during backward.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from pharmacist.core.errors import CompatibilityError


Activations = dict[str, torch.Tensor]
"""Module name -> the first tensor that it puts out, usually of shape [rows, length, width]."""


@contextmanager
def hooked(modules: Mapping[str, nn.Module], hook: Callable[..., Any], *, before: bool = False) -> Iterator[None]:
    """Calls a hook for each module that runs in the block, as torch's own with the module's name in front.

    Args:
        modules: By name.
        hook: ``(name, module, args, kwargs, output)``; what it returns, if anything, takes the output's place.
        before: Before the module runs, as ``(name, module, args, kwargs)``; what it returns are new args and kwargs.
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            register: Any = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(partial(hook, name), with_kwargs=True).remove)
        yield


def _first(output: Any) -> torch.Tensor:
    value = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(value, torch.Tensor):
        raise CompatibilityError(f"a module puts out {type(value).__name__} where a tensor was expected")
    return value


def _with_first(output: Any, value: torch.Tensor) -> Any:
    return value if isinstance(output, torch.Tensor) else type(output)((value, *output[1:]))


@contextmanager
def capture(modules: Mapping[str, nn.Module], *, inputs: bool = False) -> Iterator[Activations]:
    """Collects what each module puts out, or is given, the first time that it runs in the block.

    Yields:
        Filled as the modules run; the tensors are part of the graph.
    """
    found: Activations = {}

    def read(name: str, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if name not in found:
            found[name] = _first(output[0] if output else args or kwargs["hidden_states"])

    with hooked(modules, read, before=inputs):
        yield found


@contextmanager
def add_offsets(modules: Mapping[str, nn.Module], offsets: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Adds a constant to what each module puts out; keep the block open until backward is done.

    Args:
        modules: By name; those without an offset are left alone.
        offsets: Same shape as the module's output; cast to its dtype.
    """

    def add(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        value, offset = _first(output), offsets[name]
        if value.shape != offset.shape:
            raise CompatibilityError(f"an offset of shape {tuple(offset.shape)} meets {tuple(value.shape)}")
        return _with_first(output, value + offset.to(value.dtype))

    with hooked({name: modules[name] for name in offsets}, add):
        yield


def activation_gradients(
    modules: Mapping[str, nn.Module], loss: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, Activations]:
    """The derivative of a loss by an offset added to what modules put out, and by nothing else.

    No parameter gets a gradient, and below the first module that runs no graph is built at all.

    Args:
        modules: By name.
        loss: Runs the model once and returns a scalar.

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
            torch.set_grad_enabled(True)  # from here on; the block below sets it back
        found[name] = value
        return _with_first(output, value)

    with hooked(modules, read), torch.no_grad():
        value = loss()
        missed = [name for name in modules if name not in found]
        if missed:
            raise CompatibilityError(f"{missed[0]}: did not run in the forward pass")
        grads = torch.autograd.grad(value, list(found.values()))
    return value.detach(), dict(zip(found, grads, strict=True))


@contextmanager
def head_at(head: nn.Module | None, keep: torch.Tensor) -> Iterator[None]:
    """Lets the output head see some positions only, since logits without a target cost much and change no loss.

    Args:
        head: The output head.
        keep: Shape [rows, length], bool. Logits then have the shape [positions kept, vocabulary].
    """
    if head is None:
        raise CompatibilityError("the model does not name its output head")

    def select(name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args[0][keep], *args[1:]), kwargs

    with hooked({"head": head}, select, before=True):
        yield


@contextmanager
def replayed_rng(device: torch.device) -> Iterator[None]:
    """Leaves the random state as it was, so that the next pass draws the same dropout masks."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for the block; every module's own mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
