"""The command `bench`: runs what a grid still needs and writes the table of results."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from pharmacist.core.console import plain
from pharmacist.core.env import rank
from pharmacist.core.hashing import sha256_json
from pharmacist.core.manifest import read_manifest
from pharmacist.core.progress import bar, console
from pharmacist.core.rundir import RunDir
from pharmacist.nn.distributed import from_main
from pharmacist.pipeline.bench.costs import estimate
from pharmacist.pipeline.bench.executors import EXECUTORS, Executor
from pharmacist.pipeline.bench.grid import Plan, expand
from pharmacist.pipeline.bench.options import BENCH, BenchOptions
from pharmacist.pipeline.bench.results import Result, collect, write_results
from pharmacist.pipeline.bench.stages import Outcome, Stage, is_finished
from pharmacist.pipeline.pages import bench_page


class StagesFailed(ExceptionGroup[Exception]):
    """Some stages failed; what could be run without them is finished."""


@dataclass
class BenchResult:
    """What a benchmark found: the rows of ``results.parquet``; names of the stages that this call ran; its folder."""

    rows: list[Result]
    ran: list[str]
    folder: Path


def bench(options: BenchOptions) -> BenchResult:
    """Runs the stages that are missing and writes ``results.parquet`` and the manifest, also where some fail.

    Raises:
        PharmacistError: Something in the grid cannot be, or the folder holds something else; nothing has run.
        StagesFailed: Some stages failed.
    """
    root = Path(options.output_dir).resolve()
    executor, plan = EXECUTORS.build_from(options.executor), expand(options, root)
    waiting = plan.waiting(options.only)  # a result of a newer version is told before the folder is touched
    if options.dry_run:
        _show_costs(plan, waiting)
        return BenchResult([], [], root)
    if waiting and rank() == 0:
        _reopen(root)
    with BENCH.open(options, inputs={"stages": sha256_json(sorted(plan.stages))}) as run:
        # Under a launcher the first process decides; the others take part in the stages.
        waiting = [plan.stages[name] for name in from_main([stage.name for stage in plan.waiting(options.only)])]
        if run.complete and not waiting:
            console().print(f"{root}: complete already, nothing to run", soft_wrap=True)
            return BenchResult(list(collect(plan)), [], root)
        failed: dict[str, Exception] = {}
        ran: list[str] = []
        try:
            plan.write()
            with closing(run_stages(plan.stages, waiting, executor)) as outcomes:
                for number, outcome in enumerate(outcomes, 1):
                    ran += [outcome.stage] if outcome.done else []
                    result = "done" if outcome.done else "not run, needs what failed"
                    result = result if outcome.error is None else _one_line(outcome.error)
                    stage = f"{plain(outcome.stage)} ({plan.stages[outcome.stage].method})"
                    console().print(f"{number}/{len(waiting)} {stage}: {result}", soft_wrap=True, markup=False)
                    if outcome.error is not None:
                        failed[outcome.stage] = outcome.error
                        if options.fail_fast:
                            break
        finally:
            rows = _write(plan, run, failed) if rank() == 0 else []
        if failed:
            (first, error), left = next(iter(failed.items())), len(waiting) - len(ran) - len(failed)
            text = f"{len(failed)} of {len(waiting)} stages failed"
            text += f", {left} could not run without them" if left else ""
            text += f"; the same command runs again what is missing; {first}: {_one_line(error)}"
            raise StagesFailed(text, list(failed.values()))
        if rank() == 0 and not plan.waiting():
            outputs = ("results.parquet", "report.html", "tables.md", "tables.tex", "stages", "data")
            run.finish(outputs=[name for name in outputs if run.path(name).exists()])
        console().print(
            f"{len(rows)} of {len(plan.cells)} cells: {root}/results.parquet\npage {root}/report.html", soft_wrap=True
        )
        return BenchResult(rows, ran, root)


def _reopen(root: Path) -> None:
    """A benchmark that is finished but for a stage whose folder somebody deleted goes on."""
    if (root / "manifest.json").is_file():
        manifest = read_manifest(root)
        if (manifest.stage, manifest.status) == (BENCH.name, "success"):
            manifest.model_copy(update={"status": "started"}).write(root)


def run_stages(
    stages: Mapping[str, Stage], waiting: Sequence[Stage], executor: Executor, title: str = "bench"
) -> Generator[Outcome, None, None]:
    """Runs those stages of a graph that wait, each after those that it needs, and yields how they went."""
    with bar(title, total=len(waiting)) as progress, closing(executor.run(waiting, stages)) as outcomes:
        for outcome in outcomes:
            progress.advance()
            yield outcome


def _write(plan: Plan, run: RunDir, failed: dict[str, Exception]) -> list[Result]:
    """Writes the table of results, and the manifest with what failed."""
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
    run.manifest.write(run.root)
    if rows:
        bench_page(run.root, run.manifest)
    return rows


def _one_line(error: Exception) -> str:
    return plain(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


def _show_costs(plan: Plan, waiting: Sequence[Stage]) -> None:
    """Prints the graph by kind and method of stages, with what it will cost."""
    costs, out = estimate(plan, waiting), console()
    table = Table(title=f"{len(plan.cells)} cells, {len(plan.stages)} stages, {len(waiting)} to run")
    for column in ("stage", "method", "stages", "to run", "tokens", "tokens/s", "hours"):
        table.add_column(column, justify="left" if column in ("stage", "method") else "right")
    order = list(dict.fromkeys(cost.kind for cost in costs))
    for cost in sorted(costs, key=lambda cost: order.index(cost.kind)):
        numbers = ("" if number is None else f"{number:,.0f}" for number in (cost.tokens, cost.tokens_per_second))
        hours = "not measured" if cost.seconds is None else f"{cost.seconds / 3600:.2f}"
        row = (cost.kind, cost.method, str(cost.stages), str(cost.waiting), *numbers)
        table.add_row(*row, hours if cost.waiting else "")
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    hours = f"{sum(known) / 3600:.2f}" if known else "-"
    table.add_section()
    table.add_row("all", "", str(len(plan.stages)), str(len(waiting)), "", "", hours)
    out.print(table)
    if known:
        measured = sum(stage.manifest is not None for stage in plan.stages.values())
        out.print(f"hours of one device, as measured on {measured} stages in {plan.data.root}", soft_wrap=True)
    if unknown := sum(cost.waiting for cost in costs if cost.seconds is None):
        out.print(
            f"{unknown} stages are not in the hours: nothing like them was measured here yet; run one cell with "
            "--only 'PART OF ITS NAME', then ask again",
            soft_wrap=True,
        )
    names = list(dict.fromkeys(plain(cell.name) for cell in plan.cells))
    out.print(f"cells such as: {names[0]}" + (f"\nand: {names[-1]}" if len(names) > 1 else ""), soft_wrap=True)
