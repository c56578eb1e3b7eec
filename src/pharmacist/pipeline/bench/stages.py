"""A stage of the graph: one run of one command, in a folder named by a hash of all that its result depends on."""

import copy
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pharmacist.core.env import process_index, world_size
from pharmacist.core.errors import BusyError, DivergedError, OtherRunError
from pharmacist.core.files import atomic_folder, read_json_lines
from pharmacist.core.hashing import sha256_json
from pharmacist.core.manifest import RunManifest, missing_output, read_manifest
from pharmacist.core.options import RunOptions, as_json, identifying
from pharmacist.core.progress import hushed
from pharmacist.core.rundir import made_from
from pharmacist.nn.distributed import barrier
from pharmacist.pipeline.stage import Stage
from pharmacist.pipeline.stages.align import ALIGN
from pharmacist.pipeline.stages.attack import ATTACK
from pharmacist.pipeline.stages.curate import CURATE, KNOWN_LABELS, SELECT
from pharmacist.pipeline.stages.evaluate import EVALUATE
from pharmacist.pipeline.stages.repair import REPAIR


Options = TypeVar("Options", bound=RunOptions)


KINDS: dict[str, Stage] = {
    "rank": CURATE,
    "label": KNOWN_LABELS,
    "select": SELECT,
    "align": ALIGN,
    "attack": ATTACK,
    "repair": REPAIR,
    "evaluate": EVALUATE,
}
"""Kinds of stages, by the names that folders and tables give them."""
EVERYWHERE = frozenset({"output_dir", "seed", "device", "dtype", "quiet", "overwrite", "checkpoint_seconds", "model"})
"""Options that no section of a grid may have: those of the grid apply to all stages."""


@dataclass(frozen=True)
class Input:
    """An input of a stage."""

    source: str
    """Path or Hub id."""
    content: str
    """Hash of its content, or the key of the stage that writes it."""
    maker: str | None = None
    """Name of the stage that writes it."""


@dataclass(frozen=True)
class StageRun:
    """One run of one command.

    Its key is a hash of the options that identify the run, the content of the inputs (keys of the stages that write
    them) and the version of the command.
    """

    kind: str
    """Key of `KINDS`."""
    command: Stage
    """Declaration of the command, which a worker takes from here and not from its own `KINDS`."""
    key: str
    options: Any
    """Options of the command, with all paths filled in."""
    parents: tuple[str, ...]
    """Names of the stages whose results it reads."""
    method: str
    """The selector, defense, attack, repair or judge, for tables."""
    like: str | None = None
    """Among its parents the evaluation of the same model on the same prompts for another judge, if there is one."""
    verdict_files: Mapping[str, str] = field(default_factory=dict)
    """Input -> fingerprint of what its judges and grader read, which is no part of the key: an evaluation judges again
    where one has changed, and keeps its answers."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the stages that must have finished before it can run."""
        return tuple(name for name in self.parents if name != self.like)

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.kind}-{self.key[:16]}"

    @property
    def folder(self) -> Path:
        """Path of its results."""
        return Path(self.options.output_dir)

    def output(self, file: str = "") -> Input:
        """Its folder, or a file or folder in it, as the input of another stage."""
        return Input(str(self.folder / file), f"{self.key}/{file}", self.name)

    @property
    def manifest(self) -> RunManifest | None:
        """The manifest in its folder, if there is one."""
        return read_manifest(self.folder) if (self.folder / "manifest.json").is_file() else None


def with_options(options: Options, **changes: Any) -> Options:
    """A copy of checked options with other paths or another seed; unlike `replace`, it checks nothing again."""
    changed = copy.copy(options)
    changed.__dict__.update(changes)
    return changed


@dataclass(frozen=True)
class Draft:
    """What stages have in common that differ only in the results of other stages that they read."""

    kind: str
    """Key of `KINDS`."""
    options: RunOptions
    """Options of the command, without inputs and folder."""
    method: str
    """The selector, defense, attack, repair or judge, for tables."""
    inputs: Mapping[str, Input | list[Input]] = field(default_factory=dict)
    """Option -> the input that it names."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its part of what identifies the stages."""
        return identifying(as_json(self.options)) | _of_each("content", self.inputs)


def _of_each(attribute: str, inputs: Mapping[str, Input | list[Input]]) -> dict[str, Any]:
    return {
        option: [getattr(one, attribute) for one in value] if isinstance(value, list) else getattr(value, attribute)
        for option, value in inputs.items()
    }


def make_stage(
    root: Path, draft: Draft, made: Mapping[str, Input], *, parents: Sequence[str] = (), folder: Path | None = None
) -> StageRun:
    """Makes a stage and its key.

    Args:
        root: Folder of the benchmark.
        draft: The stage without results of others.
        made: Option -> the result of another stage that it names.
        parents: Names of stages that must run before, besides those that write these.
        folder: Folder of the results, by default one in `root` that is named by the key.
    """
    kind, config = draft.kind, draft.config | _of_each("content", made)
    key = sha256_json({"stage": kind, "version": KINDS[kind].version, "config": config})
    output_dir = str(folder or root / "stages" / f"{kind}-{key[:16]}")
    filled = with_options(draft.options, **_of_each("source", {**draft.inputs, **made}), output_dir=output_dir)
    makers = [one.maker for one in made.values() if one.maker]
    return StageRun(kind, KINDS[kind], key, filled, tuple(dict.fromkeys([*makers, *parents])), draft.method)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended; it is skipped where a stage failed that it needs."""

    stage: str
    error: Exception | None = None
    skipped: bool = False

    @property
    def done(self) -> bool:
        """Whether the stage has finished."""
        return self.error is None and not self.skipped


def attempt(stage: StageRun, stages: Mapping[str, StageRun], *parents: Outcome) -> Outcome:
    """Runs or resumes a stage unless one that it needs has failed; an exception becomes the outcome.

    Under a launcher exceptions are raised, so that it ends the other processes, which may be waiting in the stage;
    except divergence, which all processes notice alike.
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


def run_stage(stage: StageRun, stages: Mapping[str, StageRun]) -> None:
    """Runs a stage in this process; from the beginning where its inputs have changed since it began."""
    options = with_options(stage.options, overwrite=is_stale(stage, stages))
    like = stages.get(stage.like or "")
    if like is not None and stage.manifest is None and has_answers(like, stages):
        take_answers(like, stage)
    results = {name: made.content for name in stage.needs if name in stages and (made := stages[name].manifest)}
    while True:
        try:
            with made_from(results):
                stage.command(options)
            barrier()  # only then has the first process written all that the next stage reads
            return
        except BusyError:  # a worker that outlived its driver is still at it
            time.sleep(1)
        except OtherRunError:
            # A folder named by all options and inputs can only be another run's where an input was computed again; one
            # with a readable name, as in a sweep, is made again where that costs no training.
            if options.overwrite or (stage.folder.name != stage.name and stage.kind != "evaluate"):
                raise
            options = with_options(options, overwrite=True)


def has_answers(stage: StageRun, stages: Mapping[str, StageRun]) -> bool:
    """Whether an evaluation has all answers of its model as it is now; an endpoint may have failed to judge some."""
    manifest, items = stage.manifest, stage.folder / "items.jsonl"
    if manifest is None or manifest.status == "started" or not items.is_file() or is_stale(stage, stages):
        return False
    return manifest.status == "success" or not any("error" in item for item in read_json_lines(items))


def take_answers(other: StageRun, stage: StageRun) -> None:
    """Begins an evaluation with the answers of another one, so that none is generated twice."""
    manifest = other.manifest
    if process_index() != 0 or manifest is None:
        return
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with atomic_folder(stage.folder) as folder:
        shutil.copyfile(other.folder / "items.jsonl", folder / "items.jsonl")
        begun = {"status": "started", "created": now, "finished": "", "outputs": [], "files": {}}
        manifest.model_copy(update=begun).write(folder)


def is_stale(stage: StageRun, stages: Mapping[str, StageRun]) -> bool:
    """Whether an input was computed again since the stage began, with other content, as after a folder was deleted.

    This compares the content that the stage's manifest has noted, not times: clocks of machines differ. Where no
    content was noted, the stage is not stale.
    """
    manifest = stage.manifest
    if manifest is None:
        return False
    made = {name: stages[name].manifest for name in manifest.made_from.keys() & stages.keys()}
    finished = {name: other.content for name, other in made.items() if other is not None and other.status == "success"}
    return any(content not in ("", manifest.made_from[name]) for name, content in finished.items())


def is_finished(stage: StageRun, stages: Mapping[str, StageRun]) -> bool:
    """Whether a stage has finished, with its inputs as they are now, and all its outputs are there."""
    manifest = stage.manifest
    if manifest is None or manifest.status != "success" or not is_current(stage, stages):
        return False
    return missing_output(stage.folder, manifest) is None


def is_current(stage: StageRun, stages: Mapping[str, StageRun]) -> bool:
    """Whether what a stage has found is of its inputs, and by its judges and grader, as they are now."""
    inputs = {} if stage.manifest is None else stage.manifest.inputs
    judged = all(inputs.get(name, content) == content for name, content in stage.verdict_files.items())
    return judged and not is_stale(stage, stages)


_PARTIAL = "answers or verdicts failed; the metrics cover the rest, and the same command requests them again"
_NUMBER = re.compile(r"(?<![\w./-])\d+([.,]\d+)*(?![\w/-]|\.\w)")
"""A number that is no part of a word, a file name or a path."""


def stage_warnings(stages: Iterable[StageRun]) -> list[str]:
    """The warnings of finished stages, with whose they are, and that something failed in partial ones; of those that
    differ only in numbers, the first.
    """
    found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for stage in stages:
        manifest = stage.manifest
        if manifest is not None and manifest.status != "started":
            for text in [*manifest.warnings, *([_PARTIAL] if manifest.status == "partial" else [])]:
                found[stage.kind, _NUMBER.sub("", text)].append((stage.method, text))
    return [_said(kind, *zip(*warnings, strict=True)) for (kind, _), warnings in found.items()]


def _said(kind: str, methods: Sequence[str], texts: Sequence[str]) -> str:
    first, *more = dict.fromkeys(methods)
    whose = f"{first} and {len(more)} more" if len(more) > 2 else ", ".join([first, *more])
    who = kind if f" {whose}: " in texts[0] else f"{kind} {whose}"  # a judge's warnings begin with its name
    return f"{who}: {texts[0]}" + (f" ({len(texts)} stages)" if len(texts) > 1 else "")
