"""Calls of transformers and PEFT: without their output, and with their exceptions as errors of one line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging as transformers_logging

from pharmacist.core.errors import PharmacistError


@contextmanager
def silent_library() -> Iterator[None]:
    """Keeps transformers' progress bars, reports and advice out of the output, whatever they are set to."""
    enabled, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if enabled:
            transformers_logging.enable_progress_bar()


@contextmanager
def failures_as(kind: type[PharmacistError], message: Callable[[Exception], str]) -> Iterator[None]:
    """Turns any exception of a library in the block into a `PharmacistError`, except that it runs out of memory.

    Libraries raise anything on damaged files and unknown models, so the block should hold nothing but their calls.
    `message` turns the library's exception into the error's message.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise kind(message(error)) from error
