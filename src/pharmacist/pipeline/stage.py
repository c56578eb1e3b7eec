"""What a stage is: its options, what they name, what identifies a run of it, and how a run begins and ends."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pkgutil import resolve_name
from threading import RLock
from typing import Any

from pharmacist.core.errors import PharmacistError
from pharmacist.core.options import RunOptions
from pharmacist.core.progress import kept_warnings, say, silenced
from pharmacist.core.rundir import RunDir
from pharmacist.core.typed import default_of
from pharmacist.nn.distributed import from_main


_ONE_AT_A_TIME = RLock()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Declaration of a stage, from which command line, benchmarks, Python interface and docs are derived.

    Attributes:
        name: Name of the command, also in manifests.
        options: Dataclass of its options, whose docstrings describe them.
        run: ``"module:function"`` that does the work, imported on first use; by default the function and module with
            the name of the stage.
        summary: One line for the usage message of the command line.
        example: A command line.
        page: Name of its how-to page, if it differs from the name.
        version: Raised by hand whenever its results change, so that old folders are not taken for current ones.
        files: Options that refer to rows.
        models: Options that refer to models.
        folders: Options that refer to other folders or Hub ids, such as encoders.
        unidentifying: Options that change no result, besides those that never do.
        final: Options on which no partial state depends; an unfinished run continues when they change.
        final_inputs: Inputs for which the same is true, including the further files of each (``safe 2``).
        reopens: Whether a finished run continues when only these change; the stage takes from its results what need
            not be computed again.
        keeps: Whether its results so far are kept then, in ``earlier/``.
        read_again: Outputs that it reads if the run is already finished.
        costly: Patterns of partial state that is worth keeping; a failed run with such files keeps its folder.
        early: Outputs that are written before any of this.
        again: What ``--overwrite`` does with a finished run, for the message; empty for no message.
        by_axes: Options that are set by the axes of a benchmark.
    """

    name: str
    options: type[Any]
    run: str = ""
    summary: str = ""
    example: str = ""
    page: str | None = None
    version: int = 0
    files: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    unidentifying: frozenset[str] = frozenset()
    final: frozenset[str] = frozenset()
    final_inputs: frozenset[str] = frozenset()
    reopens: bool = False
    keeps: bool = False
    read_again: tuple[str, ...] = ()
    costly: tuple[str, ...] = ()
    early: tuple[str, ...] = ()
    again: str = "runs it again"
    by_axes: frozenset[str] = frozenset()

    @property
    def function(self) -> Any:
        """What does the work."""
        return resolve_name(self.run or f"pharmacist.pipeline.{self.name}:{self.name}")

    def __call__(self, options: Any) -> Any:
        """Does the work; with ``quiet`` among the options without messages and progress bars.

        A call from another thread waits for its end: random states, warnings and the console are the process's.
        """
        with _ONE_AT_A_TIME, silenced(getattr(options, "quiet", False)):
            return self.function(options)

    def identity(self, options: Any, methods: Mapping[str, Any]) -> Any:
        """The options that identify a run: what changes no result at its default, methods with all their own options.

        Args:
            options: Of the run.
            methods: Option -> the method that it names, whose options count whether given or left at their defaults.
        """
        defaults = {item.name: default_of(item) for item in fields(options) if item.name in self.unidentifying}
        chosen = {name: {"name": getattr(options, name)["name"], **one.identity()} for name, one in methods.items()}
        return replace(options, **defaults, **chosen)

    @contextmanager
    def open(
        self, options: RunOptions, *, inputs: Mapping[str, str], methods: Mapping[str, Any] | None = None
    ) -> Iterator[RunDir]:
        """Takes possession of the output folder for as long as the stage works in it, and says if it is complete.

        A run that fails on bad input frees its folder for one with corrected input, unless it holds costly results.
        The manifest of one that goes on keeps the warnings that are printed.

        Args:
            options: Of the run.
            inputs: Fingerprint per input.
            methods: As in `identity`.

        Yields:
            The folder; `RunDir.complete` and the manifest are the first process's, on every process.

        Raises:
            PharmacistError: The folder holds something else, or what is raised within.
        """
        run = RunDir.open(
            self.identity(options, methods or {}),
            stage=self.name,
            version=self.version,
            inputs=inputs,
            final=self.final,
            final_inputs=frozenset(name for name in inputs if {name, name.split()[0]} & self.final_inputs),
            reopen=self.reopens,
            keep=self.keeps,
            read_again=self.read_again,
        )
        try:
            run.manifest = from_main(run.manifest)
            if run.temporary is not None:  # all processes share the first's
                run.root = from_main(run.root)
            if run.complete and self.again:
                say(f"{run.root}: already complete; --overwrite {self.again}")
            with kept_warnings() as warnings:
                if not run.complete:
                    run.manifest.warnings = warnings
                yield run
        except PharmacistError:
            if not any(run.holds(pattern) for pattern in self.costly):
                run.discard(*self.early)
            raise
        finally:
            run.close()
