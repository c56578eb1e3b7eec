"""Results of a benchmark: ``results.parquet``, a row per cell and seed, and ``verdicts.parquet``, verdicts on prompts.

A cell is one choice on every axis of the grid. Only cells whose stages are all finished have a row, so an unfinished
run leaves a shorter table; ``manifest.json`` beside it says which stages failed. Where an endpoint has failed to give
some replies, the rates cover the rest. Rates are percentages, times seconds
summed over resumes, and what was not measured is null. The columns are the fields of `Result`, in their order, and
`Result.further`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from sklearn.metrics import roc_auc_score

from pharmacist.core.files import read_json_lines
from pharmacist.core.manifest import RunManifest, read_manifest
from pharmacist.core.options import as_json
from pharmacist.evaluation.statistics import curve_area
from pharmacist.pipeline.bench.grid import Cell, Plan
from pharmacist.pipeline.bench.stages import is_current
from pharmacist.pipeline.choosing import chosen_rows
from pharmacist.pipeline.pages import write_table


@dataclass(kw_only=True)
class Result:
    """One row of ``results.parquet``; what its columns mean is in docs/reference/output-files.md."""

    cell: str
    model: str
    pool: str
    selector: str
    fraction: float
    defense: str
    attack: str
    poison_ratio: float
    samples: int
    post_alignment_defense: str
    task: str
    judge: str
    seed: int

    harmful_score: float | None = None
    harmful_score_before: float | None = None
    harmful_score_over_attack: float | None = None
    attack_steps: list[int] = field(default_factory=list)
    harmful_scores: list[float] = field(default_factory=list)
    loss_margin: float | None = None
    loss_margin_before: float | None = None
    loss_margin_over_attack: float | None = None
    loss_margins: list[float] = field(default_factory=list)
    hs_plus: float | None = None
    hs_plus_before: float | None = None
    fine_tune_accuracy: float | None = None
    fine_tune_accuracy_before: float | None = None
    win_rate: float | None = None
    win_rate_before: float | None = None
    over_refusal: float | None = None
    over_refusal_before: float | None = None
    ranking_auc: float | None = None
    selected_good: float | None = None
    prompts: int = 0

    pool_rows: int = 0
    alignment_rows: int = 0
    selection_seconds: float = 0.0
    alignment_seconds: float = 0.0
    attack_seconds: float = 0.0
    repair_seconds: float | None = None
    alignment_tokens: int = 0
    attack_tokens: int = 0
    alignment_peak_memory: float | None = None
    device: str = ""
    folder: str = ""
    further: dict[str, float | None] = field(default_factory=dict)
    """Each other metric of ``metrics.json`` at the end, and with ``_before`` of the aligned model: columns of their
    names."""


def write_results(path: Path, rows: Sequence[Result]) -> None:
    """Writes ``results.parquet``, whole or not at all; columns and types are those of `Result` even without rows."""
    kinds: dict[Any, Any] = {str: pa.string(), int: pa.int64(), float: pa.float64(), float | None: pa.float64()}
    kinds |= {list[int]: pa.list_(pa.int64()), list[float]: pa.list_(pa.float64())}
    columns = {item.name: kinds[item.type] for item in fields(Result) if item.name != "further"}
    columns |= {name: pa.float64() for row in rows for name in row.further}
    write_table(path, [asdict(row) | row.further for row in rows], columns)


def write_verdicts(path: Path, rows: Sequence[Result], plan: Plan) -> None:
    """Writes ``verdicts.parquet``, whole or not at all: of the same cells the verdicts on harmful prompts."""
    lists = {"prompts": pa.list_(pa.int64()), "harmful": pa.list_(pa.bool_())}
    columns = {"cell": pa.string(), "seed": pa.int64(), "step": pa.int64(), **lists}
    cells = {(cell.name, cell.seed): cell for cell in plan.cells}
    found = [verdicts for row in rows for verdicts in _verdicts(cells[row.cell, row.seed], plan)]
    write_table(path, found, columns)


def _verdicts(cell: Cell, plan: Plan) -> Iterator[dict[str, Any]]:
    last = int(read_manifest(plan.stages[cell.roles["attack"]].folder).metrics["steps"])
    measured: dict[int | None, str] = {0: cell.roles["before"]}
    measured |= {last if step < 0 else step: stage for step, stage in cell.curve}
    measured[None if "repair" in cell.roles else last] = cell.roles["after"]
    for step, stage in measured.items():
        file = plan.stages[stage].folder / "items.jsonl"
        if file.is_file():  # somebody may want to keep the metrics alone
            items = [item for item in read_json_lines(file) if item["set"] == "prompts"]
            lists = {"prompts": [item["row"] for item in items], "harmful": [item["harmful"] for item in items]}
            yield {"cell": cell.name, "seed": cell.seed, "step": step, **lists}


def collect(plan: Plan) -> Iterator[Result]:
    """The rows of the cells whose stages are all finished with their inputs as they are now, in the grid's order; an
    evaluation may be partial.
    """
    manifests = {name: stage.manifest for name, stage in plan.stages.items() if is_current(stage, plan.stages)}
    found = {name: manifest for name, manifest in manifests.items() if manifest and manifest.status != "started"}
    for cell in plan.cells:
        if found.keys() >= cell.stages:
            yield _row(cell, found, plan)


def _row(cell: Cell, found: Mapping[str, RunManifest], plan: Plan) -> Result:
    by_role = {role: found[name] for role, name in cell.roles.items()}
    before, after, attack = by_role["before"].metrics, by_role["after"].metrics, by_role["attack"]
    aligning, attacking = by_role["align"].phases["train"], attack.phases["train"]
    last = int(attack.metrics["steps"])
    # A snapshot after the last step is the attack's end itself.
    curve = {last if step < 0 else step: found[stage].metrics for step, stage in cell.curve}
    steps = sorted(curve)
    scores, margins = (_curve([curve[step] for step in steps], name) for name in ("harmful_score", "loss_margin"))
    if not scores:
        steps, margins = [], []
    measured: dict[str, Any] = {name: _value(after, name) for name in after}
    measured |= {f"{name}_before": _value(before, name) for name in before}
    own = {item.name: measured.pop(item.name) for item in fields(Result) if item.name in measured}
    selecting = [by_role[role] for role in ("ask", "label", "rank", "select") if role in by_role]
    return Result(
        cell=cell.name,
        **cell.axes,
        seed=cell.seed,
        **own,
        further=measured,
        harmful_score_over_attack=curve_area(steps, scores) if scores else None,
        attack_steps=steps,
        harmful_scores=scores,
        loss_margin_over_attack=curve_area(steps, margins) if margins else None,
        loss_margins=margins,
        **_by_labels(cell, plan),
        prompts=int(after.get("harmful_score", {}).get("n", 0)),
        pool_rows=by_role["rank"].counts["ranked"],
        alignment_rows=by_role["align"].counts["trained"],
        selection_seconds=sum(phase.seconds for manifest in selecting for phase in manifest.phases.values()),
        alignment_seconds=aligning.seconds,
        attack_seconds=attacking.seconds,
        repair_seconds=by_role["repair"].phases["repair"].seconds if "repair" in by_role else None,
        alignment_tokens=aligning.tokens,
        attack_tokens=attacking.tokens,
        alignment_peak_memory=aligning.extra.get("peak_memory"),
        device=by_role["align"].device,
        folder=str(plan.stages[cell.roles["after"]].folder.relative_to(plan.data.root)),
    )


def _curve(measured: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A metric along the attack; empty unless it was measured at every step, and at several."""
    values = [value for metrics in measured if (value := _value(metrics, name)) is not None]
    return values if len(values) == len(measured) > 1 else []


def _by_labels(cell: Cell, plan: Plan) -> dict[str, Any]:
    """``ranking_auc`` and ``selected_good`` of a cell's ranking and selection, where labels of the pool are known.

    Rows whose labels the selector was given show nothing of the ranking.
    """
    ranking, selecting = (plan.stages[cell.roles[role]] for role in ("rank", "select"))
    labels, scores = plan.data.worth_keeping, ranking.folder / "scores.parquet"
    known = labels.get(ranking.options.pool) or labels.get(cell.axes["pool"])
    if not known or not scores.is_file():
        return {}
    table = pd.read_parquet(scores)
    table["good"] = table["row"].map(known)
    chosen = table["good"].iloc[chosen_rows(table, as_json(ranking.options), selecting.options)].dropna()
    labelled = table[table["label"] == ""] if "label" in table else table
    labelled = labelled.dropna(subset="good")
    found: dict[str, Any] = {"selected_good": 100 * float(chosen.mean())} if len(chosen) else {}
    if labelled["good"].nunique() == 2:
        found["ranking_auc"] = 100 * float(roc_auc_score(labelled["good"].astype(bool), labelled["score"]))
    return found


def _value(metrics: Mapping[str, Any], name: str) -> float | None:
    value = metrics.get(name, {}).get("value")
    return None if value is None else float(value)
