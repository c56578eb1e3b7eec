"""The command `demo`: rank, select, align, attack, evaluate on the synthetic world, as the grid in ``demo.yaml``.

Users can do the same on their files with `pharmacist bench`. Every stage has a separate folder, so that an interrupted
demo resumes where it stopped; links such as ``align/core-0`` give these folders readable names.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import yaml

from pharmacist.core.config import from_mapping
from pharmacist.core.env import process_index
from pharmacist.core.files import read_json, write_json
from pharmacist.core.progress import console, print_table, warn
from pharmacist.evaluation.statistics import RATE, RATE_DIFFERENCE, t_interval, with_interval
from pharmacist.nn.distributed import from_main
from pharmacist.pipeline.bench.command import run_stages
from pharmacist.pipeline.bench.executors import Local
from pharmacist.pipeline.bench.grid import Plan, expand
from pharmacist.pipeline.bench.options import BenchOptions
from pharmacist.pipeline.bench.results import Result, collect
from pharmacist.pipeline.bench.stages import stage_warnings
from pharmacist.pipeline.pages import demo_page, planted_pool
from pharmacist.pipeline.stages.demo import DEMO, DemoOptions
from pharmacist.report.cautions import cautions
from pharmacist.report.numbers import rate_text


ARMS = ("full", "random", "core")
GRID: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@dataclass
class DemoResult:
    """Results of the demo: the content of ``demo.json``, and the output folder."""

    summary: dict[str, Any]
    folder: Path


def demo(options: DemoOptions, grid: Mapping[str, Any] = GRID) -> DemoResult:
    """Runs the demo and writes ``demo.json`` and ``report.html``.

    `grid` is a benchmark with the selectors full, random and core, one pool and one model.

    Raises:
        PharmacistError: Bad options, or an output folder that holds something else.
    """
    with DEMO.open(options, inputs={}) as run:
        if run.complete:
            result = DemoResult(read_json(run.path("demo.json")), run.root)
        else:
            plan = expand(_grid(options, grid), run.root.resolve())
            waiting = [plan.stages[name] for name in from_main([stage.name for stage in plan.waiting()])]
            run.claim("stages")
            with run.phase("stages"):
                plan.write()
                for outcome in run_stages(plan.stages, waiting, Local(), "demo"):
                    if outcome.error is not None:
                        raise outcome.error
            result = DemoResult(_summarise(options, plan, list(collect(plan))), run.root)
            if process_index() == 0:
                # Those of the rankings stand beside the ranking.
                for warning in stage_warnings(stage for stage in plan.stages.values() if stage.kind != "rank"):
                    warn(warning)
                links = _link(plan, run.root, result.summary["steps"][-1])
                write_json(run.path("demo.json"), result.summary)
                run.record(metrics={"auc": result.summary["auc"], "ranking": result.summary["ranking"]})
                demo_page(run.root, run.manifest)
                run.finish(outputs=["demo.json", "report.html", "stages", *links])
        _show(result)
        return result


def _grid(options: DemoOptions, grid: Mapping[str, Any]) -> BenchOptions:
    """Options of the benchmark that the demo is."""
    pool = {"rows": options.rows, "mislabel": options.mislabel, "kind": options.pool, "seed": options.seed}
    seed, copied = {"seed": options.seed}, ("output_dir", "device", "dtype", "quiet", "checkpoint_seconds")
    values = {name: getattr(options, name) for name in copied} | {
        "seeds": list(range(options.seed, options.seed + options.seeds)),
        "pools": [grid["pools"][0] | pool],
        "selectors": [entry if isinstance(entry, str) else entry | seed for entry in grid["selectors"]],
    }
    return from_mapping(BenchOptions, {**grid, **values}, where="demo.yaml")


def _link(plan: Plan, root: Path, last: int) -> list[str]:
    """Links folders and files of the grid under readable names; returns those at the top of the demo's folder."""
    links = {f"data/{path.name.rpartition('-')[0]}.jsonl": path for path in plan.data.texts}
    for cell in plan.cells:
        selector, arm = cell.axes["selector"], f"{cell.axes['selector']}-{cell.seed}"
        names = {f"{kind}/{arm}": cell.roles[kind] for kind in ("align", "attack")}
        names |= {f"evaluate/{arm}/step-{last if step < 0 else step}": stage for step, stage in cell.curve}
        names |= {"rank" if selector == "core" else f"rank-{arm}": cell.roles["rank"]}
        links |= {link: plan.stages[name].folder for link, name in names.items()}
    for link, target in links.items():
        path = root.resolve() / link
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(os.path.relpath(target, path.parent))
    return list(dict.fromkeys(link.partition("/")[0] for link in links))


def _ranking_quality(options: DemoOptions, folder: Path, auc: float | None) -> dict[str, Any]:
    """How well a ranking finds the planted labels; `auc` is in percent."""
    table = pd.read_parquet(folder / "scores.parquet")
    _, table["label"] = planted_pool(vars(options))
    reasons = table.groupby(["label", "reason"]).size().reset_index(name="rows")
    return {
        "auc": None if auc is None else auc / 100,
        "keep": "good and duplicate" if options.pool == "planted" else "strong",
        "selected": table.loc[table["selected"], "label"].value_counts().to_dict(),
        "reasons": reasons.to_dict("records"),
    }


def _summarise(options: DemoOptions, plan: Plan, rows: Sequence[Result]) -> dict[str, Any]:
    """Content of ``demo.json``: rates in percent, times in seconds, one value per seed in `seeds` order."""

    def interval(values: Sequence[float], bounds: tuple[float, float] = RATE) -> dict[str, Any]:
        estimate = t_interval(values, bounds=bounds)
        return {"values": list(values), "mean": estimate.value, **with_interval(estimate.interval, estimate.missing)}

    def by_arm(column: str) -> dict[str, list[Any]]:
        return {arm: [getattr(row, column) for row in rows if row.selector == arm] for arm in ARMS}

    areas, seconds = by_arm("harmful_score_over_attack"), by_arm("alignment_seconds")
    ranking = next(plan.stages[cell.roles["rank"]] for cell in plan.cells if cell.axes["selector"] == "core")
    return {
        "pool": {"kind": options.pool, "rows": options.rows, "mislabel": options.mislabel},
        "arms": list(ARMS),
        "seeds": plan.axes["seed"],
        "steps": rows[0].attack_steps,
        "curves": by_arm("harmful_scores"),
        "fine_tune_accuracy": by_arm("fine_tune_accuracy"),
        "over_refusal": by_arm("over_refusal"),
        "over_refusal_aligned": by_arm("over_refusal_before"),
        "alignment_seconds": seconds,
        "auc": {arm: interval(values) for arm, values in areas.items()},
        "differences": {
            f"core - {arm}": interval([a - b for a, b in zip(areas["core"], areas[arm], strict=True)], RATE_DIFFERENCE)
            for arm in ("full", "random")
        },
        "final_harmful_score": {arm: interval(values) for arm, values in by_arm("harmful_score").items()},
        "time_saved": {arm: 100 * (1 - fmean(seconds[arm]) / fmean(seconds["full"])) for arm in ("random", "core")},
        "selection_seconds": by_arm("selection_seconds")["core"][0],
        "ranking": _ranking_quality(options, ranking.folder, by_arm("ranking_auc")["core"][0]),
    }


def _show(result: DemoResult) -> None:
    """Prints the comparison of the arms and the next command to try."""
    summary, out = result.summary, console()
    pool = summary["pool"]
    kind = "clean" if pool["kind"] == "clean" else f"{100 * pool['mislabel']:.3g} % mislabelled"
    rows = []
    for arm in summary["arms"]:
        saved = summary["time_saved"].get(arm)
        rows.append(
            [
                arm,
                rate_text(summary["auc"][arm]),
                f"{summary['final_harmful_score'][arm]['mean']:.1f}",
                f"{fmean(summary['fine_tune_accuracy'][arm]):.1f}",
                f"{fmean(summary['over_refusal_aligned'][arm]):.1f} / {fmean(summary['over_refusal'][arm]):.1f}",
                f"{fmean(summary['alignment_seconds'][arm]):.1f} s"
                + (f" ({-saved:+.0f} %)" if saved is not None else ""),
            ]
        )
    title = f"Pool of {pool['rows']} rows, {kind}; {len(summary['seeds'])} seeds, 95 % intervals"
    head = ["aligned\non", "HS over\nattack", "HS at\nend", "FA", "over-\nrefusal", "alignment\ntime"]
    print_table(title, head, rows, wrap=False)
    out.print(
        "HS: harmful score, mean over the attack's steps and at its end; FA: fine-tune accuracy; over-refusal: "
        "after alignment / after the attack; all in %"
    )
    for name, difference in summary["differences"].items():
        why = "" if difference["ci95"] else f" (no interval: {difference['no_ci95']})"
        out.print(f"harmful score, {name}: {rate_text(difference)}{why} points")
    for caution in cautions(summary["curves"]):
        warn(caution)
    quality = summary["ranking"]
    if quality["auc"] is not None:
        out.print(
            f"ranking: AUC {quality['auc']:.3f} ({quality['keep']} against the rest), "
            f"{summary['selection_seconds']:.0f} s"
        )
    out.print(f"report: {result.folder / 'report.html'}   figures: {result.folder / 'demo.json'}")
    out.print(
        "next, your own pool: pharmacist curate --pool POOL --safe SAFE --harmful HARMFUL --model MODEL "
        "--output-dir DIR"
    )
