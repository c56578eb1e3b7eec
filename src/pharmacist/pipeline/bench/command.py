"""The command `bench`: runs what a grid still needs and writes the table of results."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pharmacist.core.console import plain
from pharmacist.core.errors import ConfigError
from pharmacist.core.hashing import sha256_json
from pharmacist.core.rundir import RunDir
from pharmacist.pipeline.bench.options import BenchOptions


if TYPE_CHECKING:
    from pharmacist.pipeline.bench.grid import Plan
    from pharmacist.pipeline.bench.remote import Remote
    from pharmacist.pipeline.bench.results import Result
    from pharmacist.pipeline.bench.stages import Outcome, Stage

STAGE_VERSION = 1


class StagesFailed(ExceptionGroup[Exception]):
    """Some stages failed; what could be run without them is finished."""


@dataclass
class BenchResult:
    """What a benchmark found.

    Attributes:
        rows: Content of ``results.parquet``.
        ran: Names of the stages that this call ran.
        folder: Where everything lies; of a benchmark at a URL the table and the page.
    """

    rows: "list[Result]"
    ran: list[str]
    folder: Path


def bench(options: BenchOptions) -> BenchResult:
    """Runs the stages that are missing and writes ``results.parquet`` and the manifest, also where some fail.

    Raises:
        PharmacistError: Something in the grid cannot be, or the folder holds something else; nothing has run.
        StagesFailed: Some stages failed.
    """
    from pharmacist.core.env import rank
    from pharmacist.core.progress import bar, console
    from pharmacist.nn.distributed import barrier, from_main
    from pharmacist.pipeline.bench.executors import EXECUTORS
    from pharmacist.pipeline.bench.grid import expand
    from pharmacist.pipeline.bench.remote import Remote
    from pharmacist.pipeline.bench.results import collect

    remote = Remote.of(options.output_dir)
    root = Path(options.output_dir if remote is None else options.work_dir or remote.work_dir).resolve()
    executor, plan = EXECUTORS.build_from(options.executor), expand(options, root)
    _look(plan, remote)
    if options.dry_run:
        waiting = plan.waiting(options.only)
        _show_costs(plan, waiting)
        return BenchResult([], [], root)
    plan.waiting(options.only)  # a result of a newer version is told before the folder is touched
    run = _open(options, plan, remote)
    root = run.root
    try:
        _upload(run, remote)  # where nothing can be written this is told before any work
        # Under a launcher the first process decides; the others take part in the stages.
        waiting = [plan.stages[name] for name in from_main([stage.name for stage in plan.waiting(options.only)])]
        complete = from_main(run.complete)
        if run.complete and waiting:  # somebody deleted the folder of a stage
            run.manifest.model_copy(update={"status": "started"}).write(run.root)
            run = _open(options, plan, remote)
        if complete and not waiting:
            _upload(run, remote)
            console().print(f"{remote.url if remote else root}: complete already, nothing to run", soft_wrap=True)
            return BenchResult(list(collect(plan)), [], root)
        if rank() == 0:
            plan.data.write()
            if remote is not None and waiting:
                remote.put(plan.data.root, [f"data/{path.name}" for path in plan.data.written])
        barrier()
        failed: dict[str, Exception] = {}
        ran: list[str] = []
        try:
            with bar("bench", total=len(waiting)) as progress:
                outcomes = executor.run(waiting, plan.stages)
                for number, outcome in enumerate(outcomes, 1):
                    progress.advance()
                    ran += [outcome.stage] if outcome.done else []
                    _tell(plan.stages[outcome.stage], outcome, number, len(waiting))
                    if outcome.error is not None:
                        failed[outcome.stage] = outcome.error
                        if options.fail_fast:
                            outcomes.close()  # type: ignore[attr-defined]
                            break
        finally:
            _look(plan, remote)
            rows = _write(plan, run, failed) if rank() == 0 else []
            _upload(run, remote)
        if failed:
            raise _failure(failed, len(waiting), len(waiting) - len(ran) - len(failed))
        if rank() == 0 and not plan.waiting():
            outputs = ("results.parquet", "report.html", "tables.md", "tables.tex", "stages", "data")
            run.finish(outputs=[name for name in outputs if run.path(name).exists()])
            _upload(run, remote)
        place = remote.url if remote else root
        console().print(
            f"{len(rows)} of {len(plan.cells)} cells: {place}/results.parquet\npage {place}/report.html",
            soft_wrap=True,
        )
        return BenchResult(rows, ran, root)
    finally:
        run.close()


def _look(plan: "Plan", remote: "Remote | None") -> None:
    """Notes in the graph what is finished at the URL."""
    if remote is not None:
        markers = remote.finished(list(plan.stages))
        for name, stage in plan.stages.items():
            found = markers[name].manifest if name in markers else None
            plan.stages[name] = replace(stage, remote=remote, found=found)


def _upload(run: RunDir, remote: "Remote | None") -> None:
    """Uploads table, page and manifest; those of the last one to finish are the fullest."""
    from pharmacist.core.env import rank

    if remote is not None and rank() == 0:
        names = ("results.parquet", "report.html", "tables.md", "tables.tex", "manifest.json")
        remote.put(run.root, [name for name in names if run.path(name).is_file()])


def _open(options: BenchOptions, plan: "Plan", remote: "Remote | None") -> RunDir:
    """The benchmark's folder, in which grids may follow each other: whatever stages they share lies there once.

    Of one at a URL a folder beside the stages, for another driver's workers may have put such there before.
    """
    from pharmacist.pipeline.bench.stages import with_options

    # How it is run does not make another benchmark of it.
    identity = with_options(options, only=None, fail_fast=False, executor={"name": "local"})
    if remote is not None:
        identity = with_options(identity, output_dir=str(plan.data.root / "results"))
    try:
        return RunDir.open(
            identity,
            stage="bench",
            version=STAGE_VERSION,
            inputs={"stages": sha256_json(sorted(plan.stages))},
            late=frozenset(item.name for item in fields(BenchOptions)),
            late_inputs=frozenset({"stages"}),
            reopen=True,
        )
    except ConfigError as error:
        if remote is None:
            raise
        raise type(error)(str(error).replace("--output-dir", "--work-dir")) from error


def _write(plan: "Plan", run: RunDir, failed: dict[str, Exception]) -> "list[Result]":
    """Writes the table of results, and the manifest with what failed."""
    from pharmacist.pipeline.bench.results import collect, write_results
    from pharmacist.pipeline.bench.stages import is_finished
    from pharmacist.pipeline.report import bench_page

    rows = list(collect(plan))
    write_results(run.path("results.parquet"), rows)
    finished = sum(is_finished(stage, plan.stages) for stage in plan.stages.values())
    run.record(
        counts={
            "cells": len(plan.cells),
            "results": len(rows),
            "stages": len(plan.stages),
            "finished": finished,
            "failed": len(failed),
        },
        seeds={f"seed {seed}": seed for seed in plan.axes["seed"]},
        extra={
            "axes": plan.axes,
            "failed": [
                {"stage": name, "error": _one_line(error), "cells": sum(name in cell.stages for cell in plan.cells)}
                for name, error in failed.items()
            ],
        },
    )
    run.manifest.write(run.root)
    if rows:
        bench_page(run.root, run.manifest)
    return rows


def _failure(failed: dict[str, Exception], total: int, left: int) -> StagesFailed:
    first = next(iter(failed))
    more = f", {left} could not run without them" if left else ""
    kept = "the same command runs again what is missing"
    return StagesFailed(
        f"{len(failed)} of {total} stages failed{more}; {kept}; {first}: {_one_line(failed[first])}",
        list(failed.values()),
    )


def _one_line(error: Exception) -> str:
    return plain(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


def _tell(stage: "Stage", outcome: "Outcome", number: int, total: int) -> None:
    from pharmacist.core.progress import console

    result = "done" if outcome.done else "not run, needs what failed"
    result = result if outcome.error is None else _one_line(outcome.error)
    console().print(f"{number}/{total} {plain(stage.name)} ({stage.method}): {result}", soft_wrap=True, markup=False)


def _show_costs(plan: "Plan", waiting: "Sequence[Stage]") -> None:
    """Prints the graph by kind and method of stages, with what it will cost."""
    from rich.table import Table

    from pharmacist.core.progress import console
    from pharmacist.pipeline.bench.costs import estimate

    (costs, seconds), out = estimate(plan, waiting), console()
    table = Table(title=f"{len(plan.cells)} cells, {len(plan.stages)} stages, {len(waiting)} to run")
    for column in ("stage", "method"):
        table.add_column(column)
    for column in ("stages", "to run", "tokens", "tokens/s", "hours"):
        table.add_column(column, justify="right")
    order = list(dict.fromkeys(cost.kind for cost in costs))
    for cost in sorted(costs, key=lambda cost: order.index(cost.kind)):
        table.add_row(
            cost.kind,
            cost.method,
            str(cost.stages),
            str(cost.waiting),
            _number(cost.tokens, ",.0f"),
            _number(cost.tokens_per_second, ",.0f"),
            _hours(cost.seconds) if cost.waiting else "",
        )
    known = [cost.seconds for cost in costs if cost.waiting and cost.seconds is not None]
    unknown = sum(cost.waiting for cost in costs if cost.waiting and cost.seconds is None)
    table.add_section()
    table.add_row("all", "", str(len(plan.stages)), str(len(waiting)), "", "", _hours(sum(known)) if known else "-")
    out.print(table)
    if known:
        measured = sum(stage.manifest is not None for stage in plan.stages.values())
        rest = [cost.kind for cost in costs if cost.seconds is not None and not cost.measured]
        parts = [f"as measured on {measured} stages in {plan.data.root}"] if measured else []
        parts += [f"{', '.join(dict.fromkeys(rest))} as a short test of the model on this machine has it"] * bool(rest)
        out.print(f"hours of one device, {'; '.join(parts)}", soft_wrap=True)
        whole = [cell for cell in plan.cells if all(name in seconds for name in cell.stages)]
        if whole:
            alone = sorted(sum(seconds[name] for name in cell.stages) for cell in whole)
            span = " to ".join(dict.fromkeys(map(_hours, (alone[0], alone[-1]))))
            out.print(f"a cell by itself: {span} hours", soft_wrap=True)
    if unknown:
        out.print(
            f"{unknown} stages are not in the hours: nothing like them was measured here yet, and no short test of a "
            "model (in a local folder, of 4 GB at most) can tell; run one cell with "
            "--only 'PART OF ITS NAME', then ask again",
            soft_wrap=True,
        )
    names = list(dict.fromkeys(plain(cell.name) for cell in plan.cells))
    out.print(f"cells such as: {names[0]}" + (f"\nand: {names[-1]}" if len(names) > 1 else ""), soft_wrap=True)


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _hours(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{seconds / 3600:.2f}"
