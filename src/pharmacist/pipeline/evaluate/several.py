"""Evaluations of several models: side by side (``evaluate --models A B C``), or as differences (``--compare A B``)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pharmacist.core.console import plain
from pharmacist.core.env import process_index
from pharmacist.core.errors import DataError
from pharmacist.core.files import read_json, read_json_lines, write_json
from pharmacist.core.hashing import sha256_file, sha256_json
from pharmacist.core.manifest import check_unchanged, missing_output, output_files, read_manifest
from pharmacist.core.progress import print_table, say
from pharmacist.core.rundir import made_from
from pharmacist.evaluation.comparison import compare
from pharmacist.evaluation.engines import ENGINES
from pharmacist.evaluation.metrics import NAMES
from pharmacist.pipeline.evaluate.model import evaluate_model
from pharmacist.pipeline.evaluate.summary import count_of
from pharmacist.pipeline.stages.evaluate import COMPARE, EVALUATE_MODELS, EvaluateOptions
from pharmacist.report.numbers import Figure


_FILES = ("metrics.json", "items.jsonl")
_SHOWN = (
    "harmful_score",
    "hs_plus",
    "loss_margin",
    "over_refusal",
    "fine_tune_accuracy",
    "win_rate",
    "perplexity_drift",
)
"""Metrics that are printed side by side, before those of lm-eval; all are in ``metrics.json``."""


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
        names = folder_names(models, run.manifest.extra.get("models", {}))
        run.record(extra={"models": names})
        run.claim(*names.values())
        for model in dict.fromkeys(models):
            name = names[model]
            say(f"{name}: {plain(model)}")
            where = str(run.path(name))
            own = replace(options, model=model, models=None, quiet=True, overwrite=False, output_dir=where)
            with made_from({}):
                found[name] = evaluate_model(own)
        folders = [name for name in names.values() if run.path(name).is_dir()]  # of models that were named before too
        if run.complete and not output_files(run.root, folders).items() <= run.manifest.files.items():
            run.begin_again()  # a model's own run was made again, with other references say
        if process_index() == 0:
            write_json(run.path("metrics.json"), found)
        partial = any(read_manifest(run.path(name)).status == "partial" for name in found)
        run.finish(outputs=["metrics.json", *folders], metrics=found, partial=partial)
        _show(found)
        say(f"metrics {plain(run.path('metrics.json'))}")
        return found


def folder_names(models: Sequence[str], known: Mapping[str, str]) -> dict[str, str]:
    """Model -> name of its folder: a number and the last part of its path or Hub id; those that are `known` stay.

    >>> folder_names(["org/base-1B", "runs/b/model", "runs/a/model"], {"runs/a/model": "1-model"})
    {'runs/a/model': '1-model', 'org/base-1B': '2-base-1B', 'runs/b/model': '3-model'}
    """
    found = dict(known)
    for model in models:
        last = re.sub(r"[^\w.-]+", "-", Path(model).name) or "model"
        found.setdefault(model, f"{len(found) + 1}-{last}")
    return found


def _show(found: Mapping[str, Mapping[str, Any]]) -> None:
    measured = list(dict.fromkeys(metric for own in found.values() for metric in own))
    shown = [metric for metric in _SHOWN if metric in measured] + [name for name in measured if name not in NAMES]
    head = ["model", *(NAMES.get(metric, metric) for metric in shown)]
    rows = [[name, *(_cell(own.get(metric, {})) for metric in shown)] for name, own in found.items()]
    print_table("%, count / prompts, 95 % interval", head, rows)


def _cell(metric: Mapping[str, Any]) -> str:
    if (figure := Figure.of(metric)) is None:
        return "-"
    digits, of_ends = (3, 3) if "unit" in metric else (1, 0)
    return f"{figure.mean:.{digits}f}\n{count_of(metric)}\n{figure.interval(digits=of_ends)}".rstrip()


def compare_runs(options: EvaluateOptions) -> dict[str, Any]:
    """Writes ``metrics.json`` with the differences and the manifest; see `evaluation.comparison.compare`.

    Raises:
        DataError: A folder holds no finished evaluation, or the two cannot be compared.
    """
    folders = [Path(folder) for folder in options.compare or ()]
    models = [_model(folder) for folder in folders]
    inputs = {
        name: sha256_json([sha256_file(folder / file) for file in _FILES])
        for name, folder in zip(("first", "second"), folders, strict=True)
    }
    with COMPARE.open(options, inputs=inputs) as run:
        found: dict[str, Any]
        if run.complete:
            found = read_json(run.path("metrics.json"))
        else:
            a, b = (read_json_lines(folder / "items.jsonl") for folder in folders)
            found = compare(a, b, *(read_json(folder / "metrics.json") for folder in folders))
            if process_index() == 0:
                write_json(run.path("metrics.json"), found)
            run.finish(outputs=["metrics.json"], metrics=found, extra={"models": models})
        _show_differences(found, models)
        return found


def _model(folder: Path) -> str:
    manifest = read_manifest(folder)
    if manifest.stage == EVALUATE_MODELS.name:
        names = " or ".join(name for name in manifest.outputs if name != "metrics.json")
        raise DataError(f"--compare {folder}: holds evaluations of several models; give the folder of one, {names}")
    check_unchanged(folder, *_FILES)
    if (lost := missing_output(folder, manifest)) is not None:
        raise DataError(f"--compare {folder}: {lost} is missing; run that evaluation again")
    if manifest.stage != "evaluate" or manifest.status == "started":
        raise DataError(f"--compare {folder}: holds no finished evaluation; run evaluate with this --output-dir first")
    return str(manifest.config["model"] or manifest.config.get("answers"))


def _show_differences(found: Mapping[str, Any], models: list[str]) -> None:
    rows = []
    for name, metric in found.items():
        figure, p, counts = Figure.of(metric), metric["mcnemar_p"], metric["counts"]
        rows.append(
            [
                NAMES[name],
                "-" if figure is None else f"{figure.mean:+z.1f}",
                "-" if figure is None else figure.interval() or "-",
                *(str(count) for count in (metric["n"], counts["only_a"], counts["only_b"])),
                "-" if p is None else f"{p:.2g}",
            ]
        )
    head = ["metric", "points", "95 % interval", "pairs", "only first", "only second", "McNemar p"]
    print_table(plain(f"{models[0]} minus {models[1]}"), head, rows)
