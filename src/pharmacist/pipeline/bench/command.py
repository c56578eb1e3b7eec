"""The command `bench`: runs the stages of a grid that are missing and writes the table of results."""

from collections import defaultdict
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pharmacist.core.console import plain
from pharmacist.core.env import process_index
from pharmacist.core.hashing import sha256_json
from pharmacist.core.manifest import RunManifest, read_manifest
from pharmacist.core.progress import bar, print_table, say, warn
from pharmacist.core.rundir import RunDir, check_usable
from pharmacist.nn.distributed import from_main
from pharmacist.pipeline.bench.executors import EXECUTORS, Executor, Local
from pharmacist.pipeline.bench.grid import Plan, expand
from pharmacist.pipeline.bench.options import BENCH, BenchOptions
from pharmacist.pipeline.bench.overlap import shared_prompts
from pharmacist.pipeline.bench.results import Result, collect, write_results, write_verdicts
from pharmacist.pipeline.bench.stages import Outcome, StageRun, is_finished, stage_warnings
from pharmacist.pipeline.evaluate.reading import check_methods
from pharmacist.pipeline.pages import bench_page
from pharmacist.pipeline.stages.evaluate import GENERAL


_TRAINING = ("align", "attack")
_OF_ANSWERS = frozenset({"load model", "generate", "perplexity", "margin", "lm-eval"})
"""Phases of an evaluation whose results that of another judge on the same answers reuses."""
_METHODS = ("engine", "judge", "second_judge", "task_type", *GENERAL)
"""Options of an evaluation that name methods."""
_PAGES = ("report.html", "tables.md", "tables.tex")


class StagesFailed(ExceptionGroup[Exception]):
    """Some stages failed; all that do not need them are finished."""


@dataclass
class BenchResult:
    """Results of a benchmark."""

    rows: list[Result]
    """Of ``results.parquet``."""
    ran: list[str]
    """Names of the stages that this call ran."""
    folder: Path
    """The output folder."""


def bench(options: BenchOptions) -> BenchResult:
    """Runs the stages that are missing and writes the tables of results and the manifest, also where some fail.

    Raises:
        PharmacistError: The grid has an error, or the folder holds something else; nothing has run.
        StagesFailed: Some stages failed.
    """
    root = Path(options.output_dir).resolve()
    executor, plan = EXECUTORS.build_from(options.executor), expand(options, root)
    # Refuses results of a newer version before the folder is touched.
    waiting = plan.waiting(options.only, again=options.overwrite)
    if options.dry_run:
        check_usable(root, options)
        _warn(plan)
        _show_costs(plan, waiting)
        return BenchResult([], [], root)
    if isinstance(executor, Local):  # other machines may have what this one lacks
        evaluations = [stage.options for stage in waiting if stage.kind == "evaluate"]
        for own in {repr([getattr(one, name) for name in _METHODS]): one for one in evaluations}.values():
            check_methods(own)
    if waiting and not options.overwrite and process_index() == 0:
        _mark_unfinished(root)
    with BENCH.open(options, inputs={"stages": sha256_json(sorted(plan.stages)), **plan.data.labels}) as run:
        # Under a launcher the first process decides; the others take part in the stages.
        waiting = [plan.stages[name] for name in from_main([stage.name for stage in plan.waiting(options.only)])]
        if run.complete and not waiting:
            say(f"{root}: already complete, nothing to run")
            return BenchResult(list(collect(plan)), [], root)
        _warn(plan)
        ended: list[Outcome] = []
        try:
            run.claim("stages")
            plan.write()
            with closing(run_stages(plan.stages, waiting, executor)) as outcomes:
                for outcome in outcomes:
                    ended.append(outcome)
                    result = "done" if outcome.done else "not run, needs what failed"
                    result = result if outcome.error is None else _one_line(outcome.error)
                    stage = f"{plain(outcome.stage)} ({plan.stages[outcome.stage].method})"
                    say(f"{len(ended)}/{len(waiting)} {stage}: {result}")
                    if outcome.error is not None and options.fail_fast:
                        break
        finally:
            failed = {outcome.stage: outcome.error for outcome in ended if outcome.error is not None}
            rows = _write(plan, run, failed) if process_index() == 0 else []
        if failed:
            first, error = next(iter(failed.items()))
            skipped = sum(outcome.skipped for outcome in ended)
            left = len(waiting) - len(ended)  # by --fail-fast
            text = f"{len(failed)} of {len(waiting)} stages failed"
            text += f", {skipped} could not run without them" if skipped else ""
            text += f", {left} were not started" if left else ""
            text += f"; the same command runs again what is missing; {first}: {_one_line(error)}"
            raise StagesFailed(text, list(failed.values()))
        if process_index() == 0 and not plan.waiting():
            outputs = ("results.parquet", "verdicts.parquet", *_PAGES, "stages", "data")
            run.finish(outputs=[name for name in outputs if run.path(name).exists()])
        page = f"\nreport {root}/report.html" if rows else ""
        say(f"{len(rows)} of {len(plan.cells)} cells: {root}/results.parquet{page}")
        return BenchResult(rows, [outcome.stage for outcome in ended if outcome.done], root)


def _warn(plan: Plan) -> None:
    """Prints in the first process what speaks against trusting the results before any is there."""
    for warning in [*plan.warnings, *shared_prompts(plan)] if process_index() == 0 else ():
        warn(warning)


def _mark_unfinished(root: Path) -> None:
    """Marks a finished benchmark as unfinished, where a result of a stage was deleted or is stale."""
    if (root / "manifest.json").is_file():
        manifest = read_manifest(root)
        if (manifest.stage, manifest.status) == (BENCH.name, "success"):
            manifest.model_copy(update={"status": "started"}).write(root)


def run_stages(
    stages: Mapping[str, StageRun], waiting: Sequence[StageRun], executor: Executor, title: str = "bench"
) -> Generator[Outcome, None, None]:
    """Runs stages of a graph, each after those that it needs, and yields their outcomes."""
    with bar(title, total=len(waiting)) as progress, closing(executor.run(waiting, stages)) as outcomes:
        for outcome in outcomes:
            progress.advance()
            yield outcome


def _write(plan: Plan, run: RunDir, failed: dict[str, Exception]) -> list[Result]:
    """Writes results and verdicts, page and tables, and the manifest with the failures."""
    rows = list(collect(plan))
    write_results(run.path("results.parquet"), rows)
    counts = {"cells": len(plan.cells), "results": len(rows), "stages": len(plan.stages)}
    counts["finished"] = sum(is_finished(stage, plan.stages) for stage in plan.stages.values())
    failures = [
        {"stage": name, "error": _one_line(error), "cells": sum(name in cell.stages for cell in plan.cells)}
        for name, error in failed.items()
    ]
    run.record(
        counts=counts | {"failed": len(failed)},
        seeds={f"seed {seed}": seed for seed in plan.axes["seed"]},
        extra={"axes": plan.axes, "failed": failures},
    )
    for warning in stage_warnings(plan.stages.values()):
        warn(warning)
    run.manifest.write(run.root)
    if rows:
        bench_page(run.root, run.manifest)
    else:  # a page from before is of another grid, or of results that are stale
        for name in _PAGES:
            run.path(name).unlink(missing_ok=True)
    write_verdicts(run.path("verdicts.parquet"), rows, plan)
    return rows


def _one_line(error: Exception) -> str:
    return plain(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


def _show_costs(plan: Plan, waiting: Sequence[StageRun]) -> None:
    """Prints the graph by kind and method of stages, with what it will cost."""
    costs = _costs(plan, {stage.name for stage in waiting})
    known, hours = costs["seconds"].notna(), f"{costs['seconds'].sum() / 3600:.2f}"
    groups = costs.groupby(["kind", "method"], sort=False).sum(min_count=1).reset_index()
    order = {kind: at for at, kind in enumerate(groups["kind"].unique())}
    groups = groups[groups["waiting"] > 0].sort_values("kind", key=lambda kinds: kinds.map(order), kind="stable")
    rows = []
    for kind, method, stages, to_run, tokens, seconds in groups.itertuples(index=False, name=None):
        numbers = ["" if pd.isna(number) else f"{number:,.0f}" for number in (tokens, tokens / seconds)]
        time = "not measured" if pd.isna(seconds) else f"{seconds / 3600:.2f}"
        rows.append([kind, method, f"{stages}", f"{to_run}", *numbers, time])
    print_table(
        f"{len(plan.cells)} cells, {len(plan.stages)} stages, {len(waiting)} to run",
        ["stage", "method", "stages", "to run", "tokens", "tokens/s", "hours"],
        rows,
        text=(0, 1),
        total=["all", "", str(len(plan.stages)), str(len(waiting)), "", "", hours if known.any() else "-"],
    )
    if known.any():
        measured = sum(is_finished(stage, plan.stages) for stage in plan.stages.values())
        say(f"hours of one device, as measured on {measured} stages in {plan.data.root}")
    if unknown := int(costs.loc[~known, "waiting"].sum()):
        say(
            f"{unknown} stages are not in the hours, because no similar stage was measured here yet; run one cell "
            "with --only 'PART OF ITS NAME', then repeat this estimate"
        )
    names = list(dict.fromkeys(plain(cell.name) for cell in plan.cells))
    say(f"cells such as: {names[0]}" + (f"\nand: {names[-1]}" if len(names) > 1 else ""))


def _costs(plan: Plan, waiting: Collection[str]) -> pd.DataFrame:
    """A row per stage: ``kind``, ``method``, ``stages`` (1), ``waiting`` (0 or 1), and as far as they can be estimated
    the ``tokens`` of its training and the ``seconds`` that it will take.

    Training: rows that pass through the model (rows times epochs, or steps times batch), times the tokens per row and
    over the tokens per second of finished stages of that kind and method, or of that kind with other methods where it
    has none. All else: the mean time of such stages; answers that were made for another judge are not made again.
    """
    manifests = {name: stage.manifest for name, stage in plan.stages.items()}
    finished = {name: found for name, found in manifests.items() if found is not None and found.status == "success"}
    measured: dict[tuple[Any, ...], list[tuple[float, int, float]]] = defaultdict(list)
    for name, manifest in finished.items():
        stage, phases = plan.stages[name], manifest.phases
        if stage.kind in _TRAINING:
            one = _rows(stage, plan, finished) or 0.0, phases["train"].tokens, phases["train"].seconds
        else:
            taken = (own.seconds for phase, own in phases.items() if stage.like is None or phase not in _OF_ANSWERS)
            one = 0.0, 0, sum(taken)
        measured[stage.kind, stage.like is None, stage.method].append(one)
        measured[stage.kind, stage.like is None].append(one)
    found = []
    for stage in plan.stages.values():
        group, expected, time = (stage.kind, stage.like is None), None, None
        known = measured[*group, stage.method] or measured[group]
        if stage.name in waiting and known:
            rows, tokens, seconds = (sum(column) for column in zip(*known, strict=True))
            if stage.kind not in _TRAINING:
                time = seconds / len(known)
            elif (own := _rows(stage, plan, finished)) is not None and rows and tokens and seconds:
                expected = round(own * tokens / rows)
                time = own * seconds / rows
        found.append((stage.kind, stage.method, 1, int(stage.name in waiting), expected, time))
    table = pd.DataFrame(found, columns=["kind", "method", "stages", "waiting", "tokens", "seconds"])
    return table.astype({"tokens": float, "seconds": float})


def _rows(stage: StageRun, plan: Plan, finished: Mapping[str, RunManifest]) -> float | None:
    """Rows that pass through the model in training; None where nobody has counted the pool yet."""
    train: Mapping[str, Any] = stage.options.effective_train
    if int(train.get("max_steps", 0)) > 0:
        batch = int(train["per_device_train_batch_size"]) * int(train.get("gradient_accumulation_steps", 1))
        return float(int(train["max_steps"]) * batch)
    if stage.kind == "attack":
        return float(stage.options.samples) * float(train["num_train_epochs"])
    select = plan.stages[stage.parents[0]]
    pool = plan.stages[select.parents[0]].options.pool
    for name, manifest in finished.items():
        if plan.stages[name].kind == "rank" and plan.stages[name].options.pool == pool:
            return float(select.options.top) * manifest.counts["ranked"] * float(train["num_train_epochs"])
    return None
