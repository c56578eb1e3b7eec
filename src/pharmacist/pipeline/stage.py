"""What a stage is: its options, what they name, what identifies a run of it, and how a run begins and ends."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pkgutil import resolve_name
from typing import Any

from pharmacist.core.errors import PharmacistError
from pharmacist.core.options import RunOptions
from pharmacist.core.progress import say
from pharmacist.core.rundir import RunDir
from pharmacist.nn.distributed import from_main


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage, from files to files; command line, benchmarks, Python and docs are made from its declaration.

    Attributes:
        name: Of its command, and in manifests.
        options: Class of its options, whose doc says what each means.
        run: ``"module:function"`` that does the work, imported when it is asked for; by default what is called like
            the stage, function and module.
        summary: What it does, in a line of the command line's usage.
        example: A command line.
        page: Name of its how-to page, where that is not its own.
        version: Raised by hand whenever its results change, so that old folders are not taken for new.
        files: Options that name rows.
        models: Options that name models.
        folders: Options that name other folders or Hub ids, such as encoders.
        unidentifying: Options that change no result, besides those of which this is true in every run.
        final: Options that no partial state depends on; an unfinished run goes on when they change.
        final_inputs: Inputs of which the same is true, and of the further files of each (``safe 2``).
        reopens: A finished run goes on too when only these change; the stage finds in its results what it need not
            compute again.
        read_again: Outputs that it reads where the run is finished already.
        costly: Patterns of partial state for whose sake a run that fails keeps its folder.
        early: Outputs that are written before any of it.
        again: What ``--overwrite`` does with a finished run, for the message; empty where nothing is said.
        by_axes: Options that the axes of a benchmark decide.
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
        """Does the work."""
        return self.function(options)

    def identity(self, options: Any, methods: Mapping[str, Any]) -> Any:
        """The options that identify a run: what changes no result at its default, methods with all their own options.

        Args:
            options: Of the run.
            methods: Option -> the method that it names, whose options count whether given or left at their defaults.
        """
        defaults = {
            item.name: item.default if item.default_factory is MISSING else item.default_factory()
            for item in fields(options)
            if item.name in self.unidentifying
        }
        chosen = {
            name: {
                "name": getattr(options, name)["name"],
                **(method.identity() if hasattr(method, "identity") else vars(method.config)),
            }
            for name, method in methods.items()
        }
        return replace(options, **defaults, **chosen)

    @contextmanager
    def open(
        self, options: RunOptions, *, inputs: Mapping[str, str], methods: Mapping[str, Any] | None = None
    ) -> Iterator[RunDir]:
        """Takes possession of the output folder for as long as the stage works in it, and says if it is complete.

        A run that fails on bad input frees its folder for one with corrected input, unless it holds costly results.

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
            read_again=self.read_again,
        )
        try:
            run.manifest = from_main(run.manifest)
            if run.temporary is not None:  # all processes share the first's
                run.root = from_main(run.root)
            if run.complete and self.again:
                say(f"{run.root}: already complete; --overwrite {self.again}")
            yield run
        except PharmacistError:
            if not any(run.holds(pattern) for pattern in self.costly):
                run.discard(*self.early)
            raise
        finally:
            run.close()
