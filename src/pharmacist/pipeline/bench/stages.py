"""A stage of the graph: one run of one command, in a folder that is named by all that its result depends on."""

import copy
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pharmacist.core.env import rank, world_size
from pharmacist.core.errors import BusyError, DivergedError, OtherRunError
from pharmacist.core.files import atomic_folder
from pharmacist.core.hashing import sha256_json
from pharmacist.core.manifest import RunManifest, missing_output, read_manifest
from pharmacist.core.options import RunOptions, as_json, identifying
from pharmacist.core.progress import hushed
from pharmacist.core.registry import imported
from pharmacist.core.rundir import made_from
from pharmacist.nn.distributed import barrier
from pharmacist.pipeline.stage import Stage as Declaration
from pharmacist.pipeline.stages.align import ALIGN
from pharmacist.pipeline.stages.attack import ATTACK
from pharmacist.pipeline.stages.curate import CURATE, KNOWN_LABELS, SELECT
from pharmacist.pipeline.stages.evaluate import EVALUATE
from pharmacist.pipeline.stages.repair import REPAIR


Options = TypeVar("Options", bound=RunOptions)


KINDS: dict[str, Declaration] = {
    "rank": CURATE,
    "label": KNOWN_LABELS,
    "select": SELECT,
    "align": ALIGN,
    "attack": ATTACK,
    "repair": REPAIR,
    "evaluate": EVALUATE,
}
"""Kinds of stages, as folders and tables name them."""
EVERYWHERE = frozenset({"output_dir", "seed", "device", "dtype", "quiet", "overwrite", "checkpoint_seconds", "model"})
"""Options that no section has: the grid's own hold for all stages."""


@dataclass(frozen=True)
class Input:
    """What a stage reads: its path or hub id, the hash or key of its content, and the stage that makes it."""

    place: str
    content: str
    maker: str | None = None


@dataclass(frozen=True)
class Stage:
    """One run of one command.

    Its key is a hash of the options that matter, the content of the inputs (keys of the stages that make them) and the
    version of the stage; its method is what is special about it, for tables: the selector, the defense, the attack.
    """

    kind: str
    function: str
    """``"module:function"`` that runs it, the same on every machine."""
    key: str
    options: Any
    """With all paths filled in."""
    parents: tuple[str, ...]
    """Names of the stages whose results it reads."""
    method: str
    like: str | None = None
    """The one among its parents, if any, that asks the same model the same for another judge."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the stages without whose results it cannot run."""
        return tuple(name for name in self.parents if name != self.like)

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.kind}-{self.key[:16]}"

    @property
    def folder(self) -> Path:
        """Where its result lies."""
        return Path(self.options.output_dir)

    def output(self, place: str = "") -> Input:
        """What it writes, for the stage that reads it: its folder, or something in it."""
        return Input(str(self.folder / place), f"{self.key}/{place}", self.name)

    @property
    def manifest(self) -> RunManifest | None:
        """What lies in its folder."""
        return read_manifest(self.folder) if (self.folder / "manifest.json").is_file() else None


def with_options(options: Options, **changes: Any) -> Options:
    """Options that were checked before with other paths or another seed; unlike `replace`, without a check."""
    changed = copy.copy(options)
    changed.__dict__.update(changes)
    return changed


def make_stage(
    root: Path,
    kind: str,
    options: RunOptions,
    method: str,
    inputs: Mapping[str, Input | list[Input]],
    *,
    parents: Sequence[str] = (),
    folder: Path | None = None,
) -> Stage:
    """A stage whose folder is named by all that its result depends on.

    Args:
        root: Of the benchmark.
        kind: Key of `KINDS`.
        options: All but the inputs and the folder.
        method: For tables.
        inputs: Option -> what it names.
        parents: Names of stages that must run before, besides those that make the inputs.
        folder: Instead of one below `root` that is named by the key.
    """

    def of_inputs(name: str) -> dict[str, Any]:
        return {
            option: [getattr(one, name) for one in own] if isinstance(own, list) else getattr(own, name)
            for option, own in inputs.items()
        }

    known, makers = KINDS[kind], [own.maker for own in inputs.values() if isinstance(own, Input) and own.maker]
    config = identifying(as_json(options)) | of_inputs("content")
    key = sha256_json({"stage": kind, "version": known.version, "config": config})
    place = str(folder or root / "stages" / f"{kind}-{key[:16]}")
    filled = with_options(options, **of_inputs("place"), output_dir=place)
    return Stage(kind, known.run, key, filled, tuple(dict.fromkeys([*makers, *parents])), method)


@dataclass(frozen=True)
class Outcome:
    """How the stage of this name went; it is skipped where a stage failed that it needs."""

    stage: str
    error: Exception | None = None
    skipped: bool = False

    @property
    def done(self) -> bool:
        """Whether the stage's result is there."""
        return self.error is None and not self.skipped


def attempt(stage: Stage, stages: Mapping[str, Stage], *parents: Outcome) -> Outcome:
    """Runs a stage, or goes on with it, unless a stage before it failed; what it raises becomes the outcome.

    Only under a launcher it is raised, unless all processes find it alike: others may be waiting in the stage, and the
    launcher must end them.
    """
    if not all(parent.done for parent in parents if parent.stage in stage.needs):
        return Outcome(stage.name, skipped=True)
    try:
        with hushed():
            run_stage(stage, stages)
    except Exception as error:
        if world_size() > 1 and not isinstance(error, DivergedError):
            raise
        return Outcome(stage.name, error=error)
    return Outcome(stage.name)


def run_stage(stage: Stage, stages: Mapping[str, Stage]) -> None:
    """Runs a stage in this process, from the beginning where its inputs were made anew since it began."""
    function = imported(stage.function)
    options = with_options(stage.options, overwrite=is_stale(stage, stages))
    if stage.like is not None and stage.like in stages and stage.manifest is None:
        _take_answers(stages[stage.like], stage)
    results = {name: made.content for name in stage.needs if name in stages and (made := stages[name].manifest)}
    while True:
        try:
            with made_from(results):
                function(options)
            barrier()  # only then has the first process written all that the next stage reads
            return
        except BusyError:  # a worker that outlived its driver is still at it
            time.sleep(1)
        except OtherRunError:
            # A folder named by all options and inputs can be another run's only where an input was made anew.
            if options.overwrite or stage.folder.name != stage.name:
                raise
            options = with_options(options, overwrite=True)


def _take_answers(other: Stage, stage: Stage) -> None:
    """Begins an evaluation with the answers of another one, so that none is generated twice."""
    found = other.manifest
    if rank() != 0 or found is None or found.status != "success":
        return
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with atomic_folder(stage.folder) as folder:
        shutil.copyfile(other.folder / "items.jsonl", folder / "items.jsonl")
        begun = {"status": "started", "created": now, "finished": "", "outputs": [], "files": {}}
        found.model_copy(update=begun).write(folder)


def is_stale(stage: Stage, stages: Mapping[str, Stage]) -> bool:
    """Whether an input was made anew, with other content, since the stage began: somebody has deleted a folder.

    Told by the content that the stage has noted, and not by times, which clocks of several machines, or one that is
    set back, put in any order. Of a result that notes no content nothing can be told.
    """
    own = stage.manifest
    if own is None:
        return False
    made = {name: stages[name].manifest for name in own.made_from.keys() & stages.keys()}
    finished = {name: other.content for name, other in made.items() if other is not None and other.status == "success"}
    return any(content not in ("", own.made_from[name]) for name, content in finished.items())


def is_finished(stage: Stage, stages: Mapping[str, Stage]) -> bool:
    """Whether a stage's result is there, and is of its inputs as they are."""
    manifest = stage.manifest
    if manifest is None or manifest.status != "success" or is_stale(stage, stages):
        return False
    return missing_output(stage.folder, manifest) is None
