"""``evaluate --compare A B``: the difference of two finished evaluations."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from pharmacist.core.console import plain
from pharmacist.core.errors import DataError
from pharmacist.core.files import read_json, read_json_lines, write_json
from pharmacist.core.hashing import sha256_file, sha256_json
from pharmacist.core.manifest import check_unchanged, missing_output, read_manifest
from pharmacist.core.progress import console
from pharmacist.evaluation.comparison import compare
from pharmacist.evaluation.metrics import NAMES
from pharmacist.pipeline.stages.evaluate import COMPARE, EvaluateOptions


_FILES = ("metrics.json", "items.jsonl")


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
            write_json(run.path("metrics.json"), found)
            run.finish(outputs=["metrics.json"], metrics=found, extra={"models": models})
        if not options.quiet:
            _show(found, models)
        return found


def _model(folder: Path) -> str:
    manifest = read_manifest(folder)
    check_unchanged(folder, *_FILES)
    if (lost := missing_output(folder, manifest)) is not None:
        raise DataError(f"--compare {folder}: {lost} is no longer there; run that evaluation again")
    if manifest.stage != "evaluate" or manifest.status == "started":
        raise DataError(f"--compare {folder}: holds no finished evaluation; run evaluate with this --output-dir first")
    return str(manifest.config["model"] or manifest.config.get("answers"))


def _show(found: Mapping[str, Any], models: list[str]) -> None:
    if console().quiet:
        return
    table = Table(title=plain(f"{models[0]} less {models[1]}"))
    for column in ("metric", "points", "95 % interval", "pairs", "only first", "only second", "McNemar p"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, metric in found.items():
        value, p, counts = metric["value"], metric["mcnemar_p"], metric["counts"]
        table.add_row(
            NAMES[name],
            "-" if value is None else f"{value:+.1f}",
            " to ".join(f"{end:+.1f}" for end in metric["ci95"] or ()) or "-",
            *(str(count) for count in (metric["n"], counts["only_a"], counts["only_b"])),
            "-" if p is None else f"{p:.2g}",
        )
    console().print(table)
