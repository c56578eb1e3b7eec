"""The command `sweep`: many attacks on one model, and the worst of those that still teach the model its task.

Every attack of the grid is a run of `attack` and one of `evaluate`, each in a separate folder, so that an interrupted
sweep resumes where it stopped, and a larger grid in the same output folder reuses what is finished.
"""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from pharmacist.attacks import ATTACKS, Attack
from pharmacist.core.config import from_mapping
from pharmacist.core.env import process_index, world_size
from pharmacist.core.errors import ConfigError, DivergedError
from pharmacist.core.files import read_json, write_json, write_text
from pharmacist.core.inputs import check_outside
from pharmacist.core.manifest import read_manifest
from pharmacist.core.options import RunOptions
from pharmacist.core.progress import hushed, print_table, say, warn
from pharmacist.core.rundir import RunDir, made_from
from pharmacist.data.tasks import TASKS
from pharmacist.defenses import DEFENSES
from pharmacist.evaluation.prompts import PROMPT_SETS
from pharmacist.evaluation.worst_case import LEVELS, simultaneous, steps_to_reach, within_margin, worst_case
from pharmacist.pipeline.attack import attack, open_sources
from pharmacist.pipeline.bench.command import run_stages
from pharmacist.pipeline.bench.executors import EXECUTORS
from pharmacist.pipeline.bench.stages import Draft, StageRun, make_stage, stage_warnings
from pharmacist.pipeline.evaluate.reading import EvaluateInputs
from pharmacist.pipeline.pages import sweep_page, write_table
from pharmacist.pipeline.stages.attack import AttackOptions
from pharmacist.pipeline.stages.evaluate import NOT_ALONG_ATTACKS, EvaluateOptions
from pharmacist.pipeline.stages.sweep import SWEEP, SweepOptions
from pharmacist.report.sweep import attack_table, markdown, sentences
from pharmacist.training.strategy import GradientStrategy


_RATES = ("harmful_score", "fine_tune_accuracy", "over_refusal")
"""Metrics that have columns in ``sweep.parquet`` also where they were not measured."""
_SHARED = ("seed", "device", "dtype", "quiet", "trust_remote_code", "template")
"""Options of the attacks that the evaluations have too."""
_SHOWN = 20


@dataclass
class SweepResult:
    """Results of a sweep: the content of ``sweep.json``, and the output folder."""

    summary: dict[str, Any]
    folder: Path

    def table(self) -> pd.DataFrame:
        """Content of ``sweep.parquet``: one row per attack."""
        return pd.read_parquet(self.folder / "sweep.parquet")


@dataclass(frozen=True)
class _Point:
    """One attack of the grid: the name of its folder, the settings that vary, and all options."""

    name: str
    settings: dict[str, Any]
    options: AttackOptions


def sweep(options: SweepOptions) -> SweepResult:
    """Runs every attack of the grid and writes ``sweep.json``, ``sweep.parquet``, ``sweep.md`` and ``report.html``.

    An attack whose loss becomes infinite or NaN is reported with the reason; it is never the worst case.

    Raises:
        PharmacistError: Bad options or input of any attack; raised before the first training.
    """
    strategy, kind = DEFENSES.build_from(options.defense), ATTACKS.build_from(options.kind)
    if options.grid.poison_ratio:
        kind.check_varies("--grid.poison_ratio")
    measuring = _evaluate_options(options, options.model, Path(options.output_dir))
    if measuring.task_type["name"] == "win-rate":
        raise ConfigError(
            "--evaluate.task_type win-rate: gives no fine-tune accuracy, without which there is no worst case; leave "
            "it out"
        )
    check_outside(Path(options.output_dir), options)  # before the same of the evaluations, which share options
    check_outside(Path(options.output_dir), measuring, within="evaluate.")
    # No attack set may share a prompt with the evaluation.
    files = [file for file in (measuring.prompts, measuring.task) if file is not None and not _is_public(file)]
    options = replace(options, disjoint_from=list(dict.fromkeys([*options.disjoint_from, *files])))
    points = [_with_snapshots_there(point, options) for point in _points(options, strategy, kind)]
    inputs = {name: source.fingerprint() for name, source in open_sources(strategy, kind, options).items()}
    measured = EvaluateInputs(measuring, within="evaluate.").fingerprints()
    inputs |= {"model": measured.pop("model")} | {f"evaluate.{name}": content for name, content in measured.items()}
    with SWEEP.open(options, inputs=inputs, methods={"defense": strategy, "kind": kind}) as run:
        if run.complete:
            result = SweepResult(read_json(run.path("sweep.json")), run.root)
        else:
            result = _sweep(points, options, run)
        if process_index() == 0:
            _show(result)
        return result


def _is_public(spec: str) -> bool:
    """Whether prompts or task are a public set by its name."""
    return not os.path.exists(spec) and (spec in TASKS or spec.partition(":")[0] in PROMPT_SETS)


def _with_snapshots_there(point: _Point, options: SweepOptions) -> _Point:
    """An attack of the grid with the snapshots that it has, where it was begun before; without curves none is needed.

    A ConfigError where it was trained without the snapshots that the curves need.
    """
    folder, own = Path(point.options.output_dir), point.options
    if options.overwrite or not (folder / "manifest.json").is_file():
        return point
    there = read_manifest(folder).config.get("snapshots", own.snapshots)
    if options.curves == "none":
        return replace(point, options=replace(own, snapshots=there))
    if own.snapshots and not there:
        raise ConfigError(
            f"--curves {options.curves}: {folder} was trained with --curves none, which keeps no snapshots; choose "
            "another --output-dir, or --overwrite to train all attacks again"
        )
    return point


def _points(options: SweepOptions, strategy: GradientStrategy, kind: Attack) -> list[_Point]:
    """The attacks of the grid; the first setting varies slowest."""
    grid, train, lora = options.grid, options.effective_train, options.lora
    by_steps = train.get("max_steps", -1) > 0
    values: dict[str, list[Any]] = {
        "learning_rate": grid.learning_rate or [train.get("learning_rate", 5e-5)],
        "epochs": [None] if by_steps else grid.epochs or [train.get("num_train_epochs", 3.0)],
        "poison_ratio": grid.poison_ratio or [kind.share(options.poison_ratio)],
        "rank": [None] if options.tuning == "full" or options.adapter == "continue" else grid.rank or [lora.r],
    }
    points = []
    for combination in itertools.product(*values.values()):
        settings = {name: value for name, value in zip(values, combination, strict=True) if value is not None}
        length = f"steps-{train['max_steps']}" if by_steps else f"epochs-{settings['epochs']:.15g}"
        name = f"lr-{settings['learning_rate']:.15g}_{length}_poison-{settings['poison_ratio']:.15g}"
        attacking = {item.name: getattr(options, item.name) for item in fields(AttackOptions)}
        attacking |= {"poison_ratio": settings["poison_ratio"], "overwrite": False}
        attacking["train"] = options.train | {"learning_rate": settings["learning_rate"]}
        if not by_steps:
            attacking["train"]["num_train_epochs"] = settings["epochs"]
        if (r := settings.get("rank")) is not None:
            name += f"_rank-{r}"
            if lora.alpha * r % lora.r:
                raise ConfigError(
                    f"--grid.rank {r}: lora.alpha would not be whole where alpha / r is {lora.alpha}/{lora.r}; "
                    "change one of the two"
                )
            attacking["lora"] = replace(lora, r=r, alpha=lora.alpha * r // lora.r)
        point = AttackOptions(**attacking | {"output_dir": str(Path(options.output_dir) / "attack" / name)})
        point.snapshots = _snapshots(point, strategy, options)
        points.append(_Point(name, settings, point))
    return points


def _snapshots(point: AttackOptions, strategy: GradientStrategy, options: SweepOptions) -> list[int]:
    """Steps before the last one after which the model is saved."""
    if options.curves == "none":
        return []
    train = point.effective_train
    added, replaces = strategy.mixed_in(point.samples) if "safe" in strategy.streams else (0, False)
    rows, batch = point.samples + (0 if replaces else added), int(train["per_device_train_batch_size"]) * world_size()
    updates = math.ceil(math.ceil(rows / batch) / int(train.get("gradient_accumulation_steps", 1)))
    steps = int(train.get("max_steps", -1))
    steps = steps if steps > 0 else math.ceil(train["num_train_epochs"] * updates)
    snapshots = options.snapshots or [steps // 16, steps // 8, steps // 4, steps // 2]
    return sorted({step for step in snapshots if 0 < step < steps})


def _evaluate_options(options: SweepOptions, model: str, folder: Path, *, curve: bool = False) -> EvaluateOptions:
    """Options of the evaluation of a model; for a curve of the harmful score alone."""
    values = {name: getattr(options, name) for name in _SHARED} | options.evaluate
    values |= {"model": model, "output_dir": str(folder)}
    if curve:
        values |= dict.fromkeys([*NOT_ALONG_ATTACKS, "margin"])
    return from_mapping(EvaluateOptions, values, where="--evaluate")


@dataclass
class _Sweep:
    """A sweep while it runs: a graph of attacks and evaluations, each in a folder with a readable name."""

    options: SweepOptions
    run: RunDir
    stages: dict[str, StageRun] = field(default_factory=dict)

    def stage(self, kind: str, options: RunOptions, *parents: StageRun) -> StageRun:
        """Adds an attack or an evaluation to the graph."""
        folder, names = Path(options.output_dir), [parent.name for parent in parents]
        stage = make_stage(self.run.root, Draft(kind, options, folder.name), {}, parents=names, folder=folder)
        return self.stages.setdefault(stage.name, stage)

    def evaluation(self, model: str, name: str, *parents: StageRun, curve: bool = False) -> StageRun:
        """Adds the evaluation of a model; for a curve of the harmful score alone."""
        options = _evaluate_options(self.options, model, self.run.path("evaluate", name), curve=curve)
        return self.stage("evaluate", options, *parents)

    def execute(self, stages: Sequence[StageRun]) -> dict[str, str]:
        """Runs stages and returns those that diverged, with the reason."""
        diverged: dict[str, str] = {}
        executor = EXECUTORS.build_from(self.options.executor)
        with closing(run_stages(self.stages, stages, executor, "sweep")) as outcomes:
            for outcome in outcomes:
                if isinstance(outcome.error, DivergedError):
                    diverged[outcome.stage] = str(outcome.error)
                elif outcome.error is not None:
                    raise outcome.error
        return diverged


def _sweep(points: Sequence[_Point], options: SweepOptions, run: RunDir) -> SweepResult:
    sweep = _Sweep(options, run)
    run.claim("attack", "evaluate")
    with run.phase("check"), hushed(), made_from({}):
        _build_sets(points, run)
    before = sweep.evaluation(options.model, "before")
    with run.phase("evaluate"):  # before the first training, so that what is wrong with it shows now
        sweep.execute([before])
    attacks = {point.name: sweep.stage("attack", point.options) for point in points}
    ends = {name: sweep.evaluation(it.options.output_dir, f"{name}/end", it) for name, it in attacks.items()}
    with run.phase("attack"):
        diverged = sweep.execute([stage for name in attacks for stage in (attacks[name], ends[name])])
    entries = []
    for point in points:
        name, attacked = point.name, attacks[point.name]
        entry: dict[str, Any] = {"name": name, "settings": point.settings, "attack": f"attack/{name}"}
        if attacked.name in diverged:
            entry["failed"] = diverged[attacked.name]
        else:
            entry |= {"steps": _metrics(attacked)["steps"], **_metrics(ends[name]), "evaluate": f"evaluate/{name}/end"}
        entries.append(entry)
    summary = summarise(entries, _metrics(before), options.accuracy_margin)
    with run.phase("curves"):
        summary["curves"] = _curves(sweep, attacks, summary)
    manifests = [stage.manifest for stage in sweep.stages.values() if stage.kind == "evaluate"]
    partial = any(manifest is not None and manifest.status == "partial" for manifest in manifests)
    for warning in stage_warnings(sweep.stages.values()):
        warn(warning)
    if process_index() == 0:
        write_json(run.path("sweep.json"), summary)
        _write_table(run.path("sweep.parquet"), summary)
        write_text(run.path("sweep.md"), markdown(summary))
        run.record(
            counts={"attacks": len(entries), "diverged": sum("failed" in entry for entry in entries)},
            metrics={"worst": summary["worst"]},
        )
        sweep_page(run.root, run.manifest)
        outputs = ["sweep.json", "sweep.parquet", "sweep.md", "report.html", "attack", "evaluate"]
        run.finish(outputs=outputs, partial=partial)
    return SweepResult(summary, run.root)


def _metrics(stage: StageRun) -> dict[str, Any]:
    return read_manifest(stage.folder).metrics


def _build_sets(points: Sequence[_Point], run: RunDir) -> None:
    """Builds the set of every poison ratio, so that one that cannot be built stops the sweep before any training."""
    first: dict[float, AttackOptions] = {}
    for point in points:
        first.setdefault(point.settings["poison_ratio"], point.options)
    for ratio, options in first.items():
        folder = str(run.work("sets", f"poison-{ratio:.15g}"))
        attack(replace(options, build_only=True, snapshots=[], output_dir=folder))


def _curves(sweep: _Sweep, attacks: Mapping[str, StageRun], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Harmful score over the steps of an attack, for the attacks that ``--curves`` names."""
    names = {"worst": {summary["worst"]}, "all": attacks.keys(), "none": set()}[sweep.options.curves]
    entries = {it["name"]: it for it in summary["attacks"] if it["name"] in names and "failed" not in it}
    measured: dict[str, dict[int, StageRun]] = {}
    for name in entries:
        attacked, snapshots = attacks[name], f"{attacks[name].options.output_dir}/snapshots"
        measured[name] = {
            step: sweep.evaluation(f"{snapshots}/step-{step}", f"{name}/step-{step}", attacked, curve=True)
            for step in attacked.options.snapshots
        }
    sweep.execute([stage for stages in measured.values() for stage in stages.values()])
    curves: dict[str, Any] = {}
    for name, stages in measured.items():
        metrics = {0: summary["before"]["harmful_score"]}
        metrics |= {step: _metrics(stage)["harmful_score"] for step, stage in stages.items()}
        metrics[entries[name]["steps"]] = entries[name]["harmful_score"]
        if known := {step: metric for step, metric in metrics.items() if metric["value"] is not None}:
            steps, values = list(known), [metric["value"] for metric in known.values()]
            reached = [steps_to_reach(steps, values, level) for level in LEVELS]
            curves[name] = {"steps": steps, "harmful_score": list(known.values()), "reached": reached}
    return curves


def summarise(attacks: list[dict[str, Any]], before: Mapping[str, Any], margin: float) -> dict[str, Any]:
    """Content of ``sweep.json`` without its curves: which of the attacks is the worst case, and why.

    An attack has a name, settings, steps and metrics, or instead of these ``failed``, the reason why it has none.
    """

    def values(name: str) -> list[float | None]:
        return [entry[name]["value"] if name in entry else None for entry in attacks]

    harmful, accuracy = values("harmful_score"), values("fine_tune_accuracy")
    for entry, kept in zip(attacks, within_margin(accuracy, margin), strict=True):
        entry["within_margin"] = kept
    position = worst_case(harmful, accuracy, [entry.get("steps") for entry in attacks], margin)
    interval = None
    scored = sum(value is not None for value in harmful)
    if position is not None and scored > 1 and "count" in (found := attacks[position]["harmful_score"]):
        interval = list(simultaneous(found["count"], found["n"], scored))
    return {
        "margin": margin,
        "best_accuracy": max((value for value in accuracy if value is not None), default=None),
        "worst": None if position is None else attacks[position]["name"],
        "worst_ci95_of_all": interval,
        "highest_of_all": max((value for value in harmful if value is not None), default=None),
        "before": dict(before),
        "attacks": attacks,
    }


def _write_table(path: Path, summary: Mapping[str, Any]) -> None:
    """Writes ``sweep.parquet``."""
    kinds = dict.fromkeys(("learning_rate", "epochs", "poison_ratio"), pa.float64())
    columns: dict[str, Any] = {"name": pa.string(), **kinds, "rank": pa.int64(), "steps": pa.int64()}
    metrics = dict.fromkeys([*_RATES, *summary["before"]])
    for name in metrics:
        columns |= dict.fromkeys((name, f"{name}_low", f"{name}_high"), pa.float64()) | {f"{name}_n": pa.int64()}
    columns |= {"within_margin": pa.bool_(), "worst": pa.bool_()}
    columns |= dict.fromkeys(("failed", "attack", "evaluate"), pa.string())
    rows = []
    for entry in summary["attacks"]:
        row = entry | entry["settings"] | {"worst": entry["name"] == summary["worst"]}
        for name in metrics:
            metric = entry.get(name) or {}
            low, high = metric.get("ci95") or (None, None)
            row |= {name: metric.get("value"), f"{name}_low": low, f"{name}_high": high, f"{name}_n": metric.get("n")}
        rows.append(row)
    write_table(path, rows, columns)


def _show(result: SweepResult) -> None:
    head, lines = attack_table(result.summary)
    title = f"{len(lines)} attacks, in %, 95 % intervals over prompts"
    names = [name.replace(" ", "\n") for name in head]
    print_table(title, names, lines[:_SHOWN], text=(len(head) - 1,), wrap=False)
    if len(lines) > _SHOWN:
        say(f"{len(lines) - _SHOWN} more in {result.folder / 'sweep.md'}")
    files = [f"report {result.folder / 'report.html'}", f"figures {result.folder / 'sweep.json'}"]
    say("\n".join([*sentences(result.summary), *files]))
