"""Progress bars and console on standard error (rich); one switch makes both silent."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, TypeVar

from rich.console import Console
from rich.control import Control
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pharmacist.core.console import plain
from pharmacist.core.env import process_index
from pharmacist.core.naming import worded


T = TypeVar("T")


class _Console(Console):
    """A console that shows text as it is, neither as markup nor as control sequences.

    Its messages can be held back while bars go on being drawn.
    """

    hushed = False

    def render_str(self, text: str, **options: Any) -> Text:
        """Whatever becomes visible comes through here: messages, titles and cells of tables."""
        return super().render_str(plain(text, lines=True), **options | {"markup": False, "emoji": False})

    def print(self, *objects: Any, **options: Any) -> None:
        if not self.hushed or all(isinstance(thing, Control) for thing in objects):
            super().print(*objects, **options)


@cache
def console() -> _Console:
    """The console for messages to people: standard error, so that standard output stays machine-readable.

    Silent on every process but the first under a launcher.
    """
    return _Console(stderr=True, quiet=process_index() != 0, highlight=False, markup=False, emoji=False)


@contextmanager
def _switched(**switches: bool) -> Iterator[None]:
    """Sets switches of the console for the block."""
    out = console()
    before = {name: getattr(out, name) for name in switches}
    vars(out).update(switches)
    try:
        yield
    finally:
        vars(out).update(before)


def silenced(quiet: bool = True) -> AbstractContextManager[None]:
    """Turns messages and bars off in the block, if `quiet`; where they are off already, they stay so."""
    return _switched(quiet=console().quiet or quiet)


def hushed() -> AbstractContextManager[None]:
    """Suppresses messages in the block, for stages that run many others; bars are still drawn."""
    return _switched(hushed=True)


def say(text: str) -> None:
    """Prints a message; its lines are not broken where the terminal is narrow, so that paths can be copied."""
    console().print(worded(text), soft_wrap=True)


def print_table(
    title: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text: Sequence[int] = (0,),
    wrap: bool = True,
    total: Sequence[str] = (),
) -> None:
    """Prints a table; cells that a row lacks at its end are empty.

    Columns at the positions `text` start at the left, all others hold numbers, which without `wrap` are not broken
    over lines where the terminal is narrow. `total` is a last row, below a line.
    """
    table = Table(title=title)
    for at, name in enumerate(head):
        is_text = at in text
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not (wrap or is_text))
    for row in rows:
        table.add_row(*row)
    if total:
        table.add_section()
        table.add_row(*total)
    out = console()
    # Where the terminal is narrow, lines become too long for it; no word or number is cut, and no column lost.
    found = Measurement.get(out, out.options.update(max_width=10_000), table)
    least = found.minimum if wrap else found.maximum
    if least > out.width:
        table.width = least
    out.print(table, crop=False)


_KEPT: list[list[str]] = []


def warn(text: str) -> None:
    """Prints a line that begins with ``warning``, under ``--quiet`` too, which silences progress and summaries."""
    text = worded(plain(text))
    if _KEPT and text not in _KEPT[-1]:
        _KEPT[-1].append(text)
    with _switched(quiet=process_index() != 0):
        say(f"warning: {text}")


@contextmanager
def kept_warnings() -> Iterator[list[str]]:
    """Collects the warnings that are printed in the block, each once, without those of blocks within it."""
    _KEPT.append([])
    try:
        yield _KEPT[-1]
    finally:
        _KEPT.pop()


@cache
def _progress() -> Progress:
    # One live display for all bars: rich allows a single one per console, and phases nest.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console(), transient=True, refresh_per_second=4)


class Bar:
    """A bar that is drawn; `bar` makes one."""

    def __init__(self, description: str, total: float | None) -> None:
        self.task = _progress().add_task(plain(worded(description)), total=total)

    def advance(self, n: float = 1) -> None:
        """Moves the bar by `n` units."""
        _progress().advance(self.task, n)


@contextmanager
def bar(description: str, total: float | None = None) -> Iterator[Bar]:
    """A progress bar with elapsed and remaining time.

    Bars may nest. Nothing is drawn where standard error is no terminal.
    """
    progress = _progress()
    outermost = not progress.task_ids
    shown = Bar(description, total)
    if outermost and console().is_terminal and not console().quiet:
        progress.start()
    try:
        yield shown
    finally:
        progress.remove_task(shown.task)
        if progress.live.is_started and outermost:  # rich prints an empty line when it stops what never started
            progress.stop()


def track(iterable: Iterable[T], description: str) -> Iterator[T]:
    """Yields from `iterable` under a progress bar."""
    with bar(description, len(iterable) if isinstance(iterable, Sized) else None) as shown:
        for item in iterable:
            yield item
            shown.advance()
