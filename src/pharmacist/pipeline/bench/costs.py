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
    """Stages of one kind and method, and what those of them will take that are still to be run."""

    kind: str
    method: str
    stages: int = 0
    waiting: int = 0
    seconds: float | None = None  # None where nothing like them was measured
    tokens: int | None = None  # of training; None where that is unknown
    tokens_per_second: float | None = None


def estimate(plan: Plan, waiting: Iterable[Stage]) -> list[Cost]:
    """Cost by kind and method, in the order of the graph.

    Training: rows that pass through the model (rows times epochs, or steps times batch), times the tokens per row and
    over the tokens per second of finished stages of that kind and method, or of that kind with other methods where it
    has none. All else: the mean time of such stages.
    """
    manifests = {name: stage.manifest for name, stage in plan.stages.items()}
    finished = {name: found for name, found in manifests.items() if found is not None and found.status == "success"}
    measured: dict[tuple[str, ...], list[tuple[float, int, float]]] = defaultdict(list)
    for name, manifest in finished.items():
        stage, phases = plan.stages[name], manifest.phases
        if stage.kind in TRAINING:
            rows, phase = _rows(stage, plan, finished) or 0.0, phases["train"]
            one = rows, phase.tokens, phase.seconds
        else:
            one = 0.0, 0, sum(phase.seconds for phase in phases.values())
        measured[stage.kind, stage.method].append(one)
        measured[stage.kind,].append(one)
    names = {stage.name for stage in waiting}
    costs: dict[tuple[str, str], Cost] = {}
    for stage in plan.stages.values():
        cost = costs.setdefault((stage.kind, stage.method), Cost(stage.kind, stage.method))
        cost.stages += 1
        cost.waiting += stage.name in names
        known = measured[stage.kind, stage.method] or measured[stage.kind,]
        if stage.name not in names or not known:
            continue
        all_rows, tokens, seconds = (sum(column) for column in zip(*known, strict=True))
        if stage.kind not in TRAINING:
            cost.seconds = (cost.seconds or 0.0) + seconds / len(known)
        elif (own := _rows(stage, plan, finished)) is not None and all_rows and tokens and seconds:
            expected, cost.tokens_per_second = own * tokens / all_rows, tokens / seconds
            cost.tokens = (cost.tokens or 0) + round(expected)
            cost.seconds = (cost.seconds or 0.0) + expected / cost.tokens_per_second
    return list(costs.values())


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
    for name, manifest in finished.items():
        if plan.stages[name].kind == "rank" and plan.stages[name].options.pool == pool:
            return select.options.top * manifest.counts["ranked"] * float(train["num_train_epochs"])
    return None
