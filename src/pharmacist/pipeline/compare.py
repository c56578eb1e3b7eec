"""``evaluate --compare A B``: the difference of two finished evaluations."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pharmacist.core.console import plain
from pharmacist.core.errors import DataError
from pharmacist.core.files import read_json_lines
from pharmacist.pipeline.stages.evaluate import COMPARE, EvaluateOptions


_FILES = ("metrics.json", "items.jsonl")


def compare_runs(options: EvaluateOptions) -> dict[str, Any]:
    """Writes ``metrics.json`` with the differences and the manifest; see `evaluation.comparison.compare`.

    Raises:
        DataError: A folder holds no finished evaluation, or the two cannot be compared.
    """
    from pharmacist.core.files import read_json, write_json
    from pharmacist.core.hashing import sha256_file, sha256_json
    from pharmacist.evaluation.comparison import compare

    folders = options.compare or []
    models = [_model(folder) for folder in folders]
    inputs = {
        name: sha256_json([sha256_file(Path(folder) / file) for file in _FILES])
        for name, folder in zip(("first", "second"), folders, strict=True)
    }
    with COMPARE.open(options, inputs=inputs) as run:
        if run.complete:
            found = read_json(run.path("metrics.json"))
        else:
            a, b = (_items(folder) for folder in folders)
            metrics_a, metrics_b = (read_json(Path(folder) / "metrics.json") for folder in folders)
            found = compare(a, b, metrics_a, metrics_b)
            write_json(run.path("metrics.json"), found)
            run.finish(outputs=["metrics.json"], metrics=found, extra={"models": models})
        if not options.quiet:
            _show(found, models)
        return dict(found)


def _model(folder: str) -> str:
    from pharmacist.core.manifest import check_unchanged, missing_output, read_manifest

    manifest = read_manifest(folder)
    check_unchanged(folder, *_FILES)
    if (lost := missing_output(folder, manifest)) is not None:
        raise DataError(f"--compare {folder}: {lost} is no longer there; run that evaluation again")
    if manifest.stage != "evaluate" or manifest.status == "started":
        raise DataError(f"--compare {folder}: holds no finished evaluation; run evaluate with this --output-dir first")
    return str(manifest.config["model"] or manifest.config.get("answers"))


def _items(folder: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_json_lines(Path(folder) / "items.jsonl")
    return found


def _show(found: Mapping[str, Any], models: list[str]) -> None:
    from rich.table import Table

    from pharmacist.core.progress import console

    if console().quiet:
        return
    table = Table(title=plain(f"{models[0]} less {models[1]}"))
    for column in ("metric", "points", "95 % interval", "pairs", "only first", "only second", "McNemar p"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, metric in found.items():
        low, high = metric["ci95"] or (float("nan"), float("nan"))
        p, value = metric["mcnemar_p"], metric["value"]
        table.add_row(
            name.replace("_", " "),
            "-" if value is None else f"{value:+.1f}",
            "-" if metric["ci95"] is None else f"{low:+.1f} to {high:+.1f}",
            str(metric["n"]),
            str(metric["counts"]["only_a"]),
            str(metric["counts"]["only_b"]),
            "-" if p is None else f"{p:.2g}",
        )
    console().print(table)
