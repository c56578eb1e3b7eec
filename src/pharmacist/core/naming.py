"""How options are named: as on the command line, which messages are written for, or as arguments of a function."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pharmacist.core.errors import PharmacistError


_OPTION = re.compile(r"(pharmacist [a-z]+ --.*)|(?<![^\s('\"])--([a-z][a-z-]*)")
"""A whole command, which stays as it is, or the name of an option."""
_BY_ARGUMENTS = ContextVar("by_arguments", default=False)


def flag(name: str) -> str:
    """The option of a field: ``output_dir`` is ``--output-dir``; underscores after a dot stay."""
    head, dot, rest = name.partition(".")
    return f"--{head.replace('_', '-')}{dot}{rest}"


def by_arguments(text: str) -> str:
    """A text about options of the command line, about the arguments of a function instead.

    >>> by_arguments("--top-k 9: there are 8 rows; next: pharmacist align --data rows.jsonl")
    'top_k 9: there are 8 rows; next: pharmacist align --data rows.jsonl'
    """
    return _OPTION.sub(lambda found: found[1] or found[2].replace("-", "_"), text)


def worded(text: str) -> str:
    """A message in the notation of whoever called."""
    return by_arguments(text) if _BY_ARGUMENTS.get() else text


@contextmanager
def naming_arguments() -> Iterator[None]:
    """In the block (or a function that this decorates), messages and errors name arguments instead of options."""
    before = _BY_ARGUMENTS.set(True)
    try:
        yield
    except PharmacistError as error:
        error.args = (by_arguments(str(error)),)
        raise
    finally:
        _BY_ARGUMENTS.reset(before)
