"""Reads the results of finished runs and writes their tables and pages, without a model and so without torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import atomic_path, check_ordinary, read_json_lines
from pharmacist.core.manifest import RunManifest, check_unchanged, options_in, read_manifest
from pharmacist.core.progress import print_table, warn
from pharmacist.core.registry import closest
from pharmacist.report.benchmark import AXES, summaries
from pharmacist.report.benchmark_page import render_benchmark
from pharmacist.report.html import render_demo
from pharmacist.report.sweep import render_sweep
from pharmacist.worlds import World
from pharmacist.worlds.potions import Planted


def ranking_manifest(folder: str | Path) -> RunManifest:
    """The manifest of a finished ranking.

    Raises:
        DataError: The run is none, is not finished, or its files have changed since.
    """
    manifest = read_manifest(folder)
    if manifest.stage != "curate":
        raise DataError(f"{folder}: a run of '{manifest.stage}', which writes no ranking; give the folder of a curate")
    if manifest.status != "success":
        raise DataError(f"{folder}: this curate is not finished; run the same command again to resume it")
    check_unchanged(folder, "scores.parquet", "to_label.jsonl")
    return manifest


def read_table(path: Path, *columns: str) -> pd.DataFrame:
    """Reads a Parquet file of a run; `DataError` where it cannot be read or lacks one of the columns."""
    check_ordinary(path)
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]}); run the command again") from error
    if missing := [name for name in columns if name not in table]:
        raise DataError(f"{path}: has no column {missing[0]}; run the command that writes it again")
    return table


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]) -> None:
    """Writes a Parquet file, whole or not at all: `columns` are names and Arrow types; what a row lacks is null."""
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(columns)), temporary)


def bench_page(folder: Path, manifest: RunManifest, baseline: str | None = None) -> None:
    """Writes page and tables of a benchmark, finished or not, and prints how selectors differ from the baseline.

    Raises:
        PharmacistError: ``results.parquet`` cannot be used, or has no selector of the baseline's name.
    """
    results = read_table(folder / "results.parquet", "cell", "seed", *AXES)
    names = sorted(results["selector"].unique())
    if baseline is not None and baseline not in names:
        raise ConfigError(f"--baseline: the grid has no selector '{baseline}'{closest(baseline, names)}")
    benchmark = render_benchmark(folder, results, manifest=manifest.model_dump(mode="json"), baseline=baseline)
    for title, head, rows in summaries(benchmark):
        print_table(title, head, rows)
    for caution in benchmark.cautions:
        warn(caution)


def planted_pool(config: Mapping[str, Any]) -> tuple[list[Planted], list[str]]:
    """The pool of a demo with these options, and the label of each row: in a clean pool the force of its refusal.

    Labels are in no file, so that nothing can rank by them; the generator of the pool gives them again.
    """
    rows = World(config["seed"]).labelled(config["rows"], config["mislabel"], config["pool"])
    return rows, [row.kind if config["pool"] == "clean" else row.label for row in rows]


def demo_page(folder: Path, manifest: RunManifest) -> None:
    """Writes ``report.html`` of a demo; `DataError` where a file is missing or the pool has changed."""
    config = options_in(folder, manifest, "seed", "rows", "pool", "mislabel")
    for name in ("demo.json", "data/pool.jsonl", "rank/manifest.json"):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: {name} is missing; run pharmacist demo again")
    read_table(folder / "rank" / "scores.parquet")
    rows, labels = planted_pool(config)
    texts = [row.row for row in rows]
    found = read_json_lines(folder / "data" / "pool.jsonl")
    if [{name: row.get(name) for name in ("prompt", "completion")} for row in found] != texts:
        raise DataError(f"{folder}: data/pool.jsonl has changed; delete it and run pharmacist demo again")
    categories = [[row.category] for row in rows]
    render_demo(folder, texts, labels, categories=categories, warnings=manifest.warnings)


def sweep_page(folder: Path, manifest: RunManifest) -> None:
    """Writes ``report.html`` of a sweep; `DataError` where ``sweep.json`` is missing."""
    if not (folder / "sweep.json").is_file():
        raise DataError(f"{folder}: sweep.json is missing; run pharmacist sweep again")
    render_sweep(folder, manifest=manifest.model_dump(mode="json"))
