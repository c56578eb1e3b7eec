"""What a benchmark found: ``results.parquet``, one row per cell and seed.

A cell is one choice on every axis of the grid. Only cells whose last evaluation is finished have a row, so a partial
run leaves a partial table; ``manifest.json`` beside it says which stages failed. Rates are percentages, times seconds
summed over resumes, and what was not measured is null. The columns are the fields of `Result`, in their order.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

from pharmacist.core.files import atomic_path
from pharmacist.core.manifest import RunManifest
from pharmacist.evaluation.statistics import curve_area
from pharmacist.pipeline.bench.grid import Cell, Plan
from pharmacist.pipeline.bench.stages import Stage


AXES = ("model", "pool", "selector", "fraction", "defense", "attack", "later_defense", "task", "judge")
"""Columns that make up a cell; `Result.seed` comes on top."""
MEASURES = ("harmful_score", "hs_plus", "loss_margin", "fine_tune_accuracy", "over_refusal")
"""Metrics of evaluate that a row holds, after the attack and before it."""


@dataclass(kw_only=True)
class Result:
    """One row of ``results.parquet``.

    ``_before`` is the aligned model, before the attack; without a suffix it is the model at the end: attacked and,
    where there is a repair, repaired.
    """

    cell: str
    """The choices joined by " / ", seed left out: equal for the rows of one cell."""
    model: str
    """Names as the grid gives them, here and below."""
    pool: str
    selector: str
    fraction: float
    """Share of the ranked rows that was kept, in (0, 1]; 1 for the selector full."""
    defense: str
    """Alignment-stage defense."""
    attack: str
    poison_ratio: float
    """Share of harmful rows in the attack's set."""
    samples: int
    """Rows in the attack's set."""
    later_defense: str
    """Fine-tuning-stage defense or repair; "none" where there is none."""
    task: str
    judge: str
    seed: int

    harmful_score: float | None = None
    harmful_score_before: float | None = None
    harmful_score_over_attack: float | None = None
    """Mean height of the harmful score over the attack's steps (trapezoids from step 0 to the last); null unless it
    was measured between the two ends. A repair comes after the attack and is not part of it."""
    attack_steps: list[int] = field(default_factory=list)
    """Steps at which the curve was measured, 0 and the last one included; empty like the next one where it was not."""
    harmful_scores: list[float] = field(default_factory=list)
    """Harmful score at each of `attack_steps`."""
    loss_margin: float | None = None
    """Loss of harmful answers less that of refusals, nats per token; null unless ``evaluate`` has a ``margin``."""
    loss_margin_before: float | None = None
    loss_margins: list[float] = field(default_factory=list)
    """At each of `attack_steps`."""
    hs_plus: float | None = None
    """HS+: harmful or degenerate, as in ``metrics.json``."""
    hs_plus_before: float | None = None
    fine_tune_accuracy: float | None = None
    fine_tune_accuracy_before: float | None = None
    over_refusal: float | None = None
    over_refusal_before: float | None = None
    ranking_auc: float | None = None
    """Of a made-up pool, in percent: how often the ranking puts a row worth keeping above another one."""
    prompts: int = 0
    """Harmful prompts whose answers were judged, at the end."""

    pool_rows: int = 0
    """Rows that were ranked."""
    alignment_rows: int = 0
    """Rows that were aligned on."""
    selection_seconds: float = 0.0
    """Ranking and selecting; a ranking that cells share counts in full in each of them."""
    alignment_seconds: float = 0.0
    """Training of the alignment alone, without loading."""
    attack_seconds: float = 0.0
    """Training of the attack alone."""
    repair_seconds: float | None = None
    alignment_tokens: int = 0
    """Tokens that the alignment's main pass read."""
    attack_tokens: int = 0
    alignment_peak_memory: float | None = None
    """MB (10^6 bytes) during the alignment's training: allocated on the GPU, or resident in the process on a CPU."""
    device: str = ""
    """Of the alignment."""
    folder: str = ""
    """Of the last evaluation, relative to the benchmark's folder."""


def write_results(path: Path, rows: Sequence[Result]) -> None:
    """Writes ``results.parquet``, whole or not at all; columns and types are those of `Result` even without rows."""
    kinds: dict[Any, Any] = {
        str: pa.string(),
        int: pa.int64(),
        float: pa.float64(),
        float | None: pa.float64(),
        list[int]: pa.list_(pa.int64()),
        list[float]: pa.list_(pa.float64()),
    }
    schema = pa.schema([(item.name, kinds[item.type]) for item in fields(Result)])
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=schema), temporary)


def collect(plan: Plan) -> Iterator[Result]:
    """The rows of the cells whose stages are all finished, in the grid's order."""
    manifests = {name: stage.manifest for name, stage in plan.stages.items()}
    found = {name: own for name, own in manifests.items() if own is not None and own.status == "success"}
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
    heights, margins = (_heights([curve[step] for step in steps], name) for name in ("harmful_score", "loss_margin"))
    if not heights:
        steps, margins = [], []
    metrics: dict[str, Any] = {name: _value(after, name) for name in MEASURES}
    metrics |= {f"{name}_before": _value(before, name) for name in MEASURES}
    selecting = [by_role[role] for role in ("ask", "label", "rank", "select") if role in by_role]
    return Result(
        cell=cell.name,
        **cell.axes,
        seed=cell.seed,
        **metrics,
        harmful_score_over_attack=curve_area(steps, heights) if heights else None,
        attack_steps=steps,
        harmful_scores=heights,
        loss_margins=margins,
        ranking_auc=_ranking_auc(plan.stages[cell.roles["rank"]], plan),
        prompts=int(after.get("harmful_score", {}).get("n", 0)),
        pool_rows=by_role["rank"].counts["ranked"],
        alignment_rows=by_role["align"].counts["trained"],
        selection_seconds=sum(phase.seconds for own in selecting for phase in own.phases.values()),
        alignment_seconds=aligning.seconds,
        attack_seconds=attacking.seconds,
        repair_seconds=by_role["repair"].phases["repair"].seconds if "repair" in by_role else None,
        alignment_tokens=aligning.tokens,
        attack_tokens=attacking.tokens,
        alignment_peak_memory=aligning.extra.get("peak_memory"),
        device=by_role["align"].device,
        folder=str(plan.stages[cell.roles["after"]].folder.relative_to(plan.data.root)),
    )


def _heights(curve: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A metric along the attack; empty unless it was measured everywhere, and more than once."""
    found = [value for metrics in curve if (value := _value(metrics, name)) is not None]
    return found if len(found) == len(curve) > 1 else []


def _ranking_auc(stage: Stage, plan: Plan) -> float | None:
    keep, scores = plan.data.worth_keeping.get(stage.options.pool), stage.folder / "scores.parquet"
    if keep is None or len(set(keep)) < 2 or not scores.is_file():
        return None
    return 100 * float(roc_auc_score(keep, pq.read_table(scores, columns=["score"])["score"].to_numpy()))


def _value(metrics: Mapping[str, Any], name: str) -> float | None:
    value = metrics.get(name, {}).get("value")
    return None if value is None else float(value)
