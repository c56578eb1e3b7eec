"""``evaluate --models A B C``: several models against the same prompts, judge and task, side by side."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from pharmacist.core.console import plain
from pharmacist.core.files import write_json
from pharmacist.core.manifest import read_manifest
from pharmacist.core.progress import console
from pharmacist.evaluation.engines import ENGINES
from pharmacist.evaluation.metrics import NAMES
from pharmacist.pipeline.evaluate_model import evaluate_model
from pharmacist.pipeline.evaluate_summary import count_of
from pharmacist.pipeline.stages.evaluate import EVALUATE_MODELS, EvaluateOptions


_SHOWN = ("harmful_score", "hs_plus", "over_refusal", "fine_tune_accuracy", "win_rate", "perplexity_drift")
"""Metrics that are printed; all are in ``metrics.json``."""


def evaluate_models(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluates one model after another, each as `evaluate` does alone, and shows their figures side by side.

    Returns:
        Folder below the output folder -> metrics, as in its ``metrics.json``.

    Raises:
        PharmacistError: Bad options or input.
    """
    models = options.models or []
    engine = ENGINES.build_from(options.engine)
    # The inputs' content identifies no run: every model's own run watches over that.
    with EVALUATE_MODELS.open(options, inputs={}) as run:
        for model in models:
            engine.fingerprint(model)  # a model that is missing is named before hours are spent on the others
        found: dict[str, Any] = {}
        for name, model in zip(folder_names(models), models, strict=True):
            console().print(f"{name}: {plain(model)}", soft_wrap=True)
            where = str(run.path(name))
            own = replace(options, model=model, models=None, quiet=True, overwrite=False, output_dir=where)
            found[name] = evaluate_model(own)
        write_json(run.path("metrics.json"), found)
        partial = any(read_manifest(run.path(name)).status == "partial" for name in found)
        run.finish(outputs=["metrics.json", *found], metrics=found, partial=partial)
        if not options.quiet:
            _show(found)
            console().print(f"metrics {plain(run.path('metrics.json'))}", soft_wrap=True)
        return found


def folder_names(models: Sequence[str]) -> list[str]:
    """A folder name per model that says its place in the row and the last part of its path or hub id.

    >>> folder_names(["org/base-1B", "runs/a/model", "runs/b/model"])
    ['1-base-1B', '2-model', '3-model']
    """
    last = [re.sub(r"[^\w.-]+", "-", Path(model).name) or "model" for model in models]
    return [f"{number}-{name}" for number, name in enumerate(last, start=1)]


def _show(found: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(title="%, count / prompts, 95 % interval")
    table.add_column("model", no_wrap=True)
    shown = [metric for metric in _SHOWN if any(metric in own for own in found.values())]
    for metric in shown:
        table.add_column(NAMES[metric].split(",")[0], justify="right")
    for name, own in found.items():
        table.add_row(name, *(_cell(own.get(metric, {})) for metric in shown))
    console().print(table)


def _cell(metric: Mapping[str, Any]) -> str:
    if metric.get("value") is None:
        return "-"
    interval = "" if metric["ci95"] is None else "\n" + " to ".join(f"{end:.0f}" for end in metric["ci95"])
    return f"{metric['value']:.1f}\n{count_of(metric)}{interval}"
