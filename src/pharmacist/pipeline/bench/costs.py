"""What a grid will cost, from what its finished stages took."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pharmacist.core.manifest import RunManifest
from pharmacist.pipeline.bench.grid import Plan
from pharmacist.pipeline.bench.stages import Stage


TRAINING = ("align", "attack")


@dataclass
class Cost:
    """Stages of one kind and method.

    Attributes:
        kind: Of the stages.
        method: Theirs.
        stages: How many there are.
        waiting: How many of them are still to be run.
        seconds: What these will take; None where nothing like them was measured.
        tokens: What these will train on; None where that is unknown, or nothing is trained.
        tokens_per_second: As measured.
        measured: On how many finished stages the estimate rests.
    """

    kind: str
    method: str
    stages: int = 0
    waiting: int = 0
    seconds: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    measured: int = 0


@dataclass(frozen=True)
class _Measured:
    rows: float
    tokens: int
    seconds: float


def estimate(plan: Plan, waiting: Iterable[Stage]) -> list[Cost]:
    """Cost by kind and method, in the order of the graph.

    Training: rows that pass through the model (rows times epochs, or steps times batch), times the tokens per row and
    over the tokens per second of finished stages of that kind and method, or of that kind with other methods where it
    has none. All else: the mean time of such stages.
    """
    manifests = {name: stage.manifest for name, stage in plan.stages.items()}
    finished = {name: found for name, found in manifests.items() if found is not None and found.status == "success"}
    measured: dict[tuple[str, ...], list[_Measured]] = defaultdict(list)
    for name, manifest in finished.items():
        stage = plan.stages[name]
        one = _measure(stage, manifest, plan, finished)
        measured[stage.kind, stage.method].append(one)
        measured[stage.kind,].append(one)
    names = {stage.name for stage in waiting}
    costs: dict[tuple[str, str], Cost] = {}
    for stage in plan.stages.values():
        cost = costs.setdefault((stage.kind, stage.method), Cost(stage.kind, stage.method))
        cost.stages += 1
        if stage.name not in names:
            continue
        cost.waiting += 1
        known = measured[stage.kind, stage.method] or measured[stage.kind,]
        cost.measured = len(known)
        if known:
            _add(cost, stage, known, plan, finished)
    return list(costs.values())


def _measure(stage: Stage, manifest: RunManifest, plan: Plan, finished: Mapping[str, RunManifest]) -> _Measured:
    if stage.kind in TRAINING:
        phase = manifest.phases["train"]
        return _Measured(_rows(stage, plan, finished) or 0.0, phase.tokens, phase.seconds)
    return _Measured(0.0, 0, sum(phase.seconds for phase in manifest.phases.values()))


def _add(cost: Cost, stage: Stage, known: list[_Measured], plan: Plan, finished: Mapping[str, RunManifest]) -> None:
    seconds = sum(one.seconds for one in known)
    if stage.kind not in TRAINING:
        cost.seconds = (cost.seconds or 0.0) + seconds / len(known)
        return
    rows, tokens = sum(one.rows for one in known), sum(one.tokens for one in known)
    own = _rows(stage, plan, finished)
    if own is None or not rows or not tokens or not seconds:
        return
    cost.tokens_per_second = tokens / seconds
    expected = own * tokens / rows
    cost.tokens = (cost.tokens or 0) + round(expected)
    cost.seconds = (cost.seconds or 0.0) + expected / cost.tokens_per_second


def _rows(stage: Stage, plan: Plan, finished: Mapping[str, RunManifest]) -> float | None:
    """Rows that pass through the model in training; None where nobody has counted the pool yet."""
    train: Mapping[str, Any] = stage.options.effective_train
    if int(train.get("max_steps", 0)) > 0:
        batch = int(train["per_device_train_batch_size"]) * int(train.get("gradient_accumulation_steps", 1))
        return float(int(train["max_steps"]) * batch)
    if stage.kind == "attack":
        return float(stage.options.samples) * float(train["num_train_epochs"])
    select = plan.stages[stage.parents[0]]
    pool = plan.stages[select.parents[0]].options.pool
    counts = [
        manifest.counts["ranked"]
        for name, manifest in finished.items()
        if plan.stages[name].kind == "rank" and plan.stages[name].options.pool == pool
    ]
    return select.options.top * counts[0] * float(train["num_train_epochs"]) if counts else None
