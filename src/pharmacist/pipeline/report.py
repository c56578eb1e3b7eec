"""The command `report`: writes the page of a finished folder again, out of what lies in it and the pool it names."""

import json
import tempfile
from pathlib import Path
from typing import Any

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.manifest import RunManifest, check_unchanged, read_manifest
from pharmacist.core.progress import console
from pharmacist.core.registry import closest
from pharmacist.pipeline.bench.remote import Remote
from pharmacist.pipeline.bench.results import AXES
from pharmacist.pipeline.ranking import Ranking, read_table
from pharmacist.pipeline.stages.report import ReportOptions
from pharmacist.report import render_benchmark, render_demo
from pharmacist.report.sweep import render_sweep
from pharmacist.worlds import World


def report(options: ReportOptions) -> str:
    """Writes ``report.html`` of a finished folder again.

    Returns:
        Path of the page, or its URL.

    Raises:
        DataError: The folder is no finished run, or the pool is not what it was when it was ranked.
        ConfigError: The folder is of a command that writes no page, or the grid has no such baseline.
    """
    remote = Remote.of(options.run, option="--run")
    if remote is None:
        _write_page(Path(options.run), options)
    else:
        with tempfile.TemporaryDirectory(prefix="pharmacist-") as work:
            folder = Path(work)
            remote.get(["manifest.json", "results.parquet"], folder)
            _write_page(folder, options)
            remote.put(folder, ["report.html", "tables.md", "tables.tex"])
    page = f"{remote.url if remote else Path(options.run)}/report.html"
    console().print(f"page {page}", soft_wrap=True)
    return page


def _write_page(folder: Path, options: ReportOptions) -> None:

    manifest = read_manifest(folder)
    check_unchanged(folder, "scores.parquet", "to_label.jsonl", "demo.json", "data", "sweep.json", "results.parquet")
    if manifest.stage == "demo":
        check_unchanged(folder / "rank", "scores.parquet")
    if manifest.stage not in _PAGES:
        known = " or ".join(_PAGES)
        raise ConfigError(f"{folder}: a run of '{manifest.stage}', which has no page; give the folder of a {known}")
    if manifest.status != "success" and manifest.stage != "bench":  # of a grid, what is finished can be shown
        raise DataError(f"{folder}: this {manifest.stage} is not finished; run the same command again to resume it")
    if manifest.stage == "bench":
        bench_page(folder, manifest, baseline=options.baseline)
    elif options.baseline is not None:
        raise ConfigError(f"--baseline {options.baseline}: only selectors of a bench are compared with one")
    else:
        _PAGES[manifest.stage](folder, manifest)


def _curate_page(folder: Path, manifest: RunManifest) -> None:
    del manifest
    Ranking.load(folder).report(folder / "report.html")


def demo_page(folder: Path, manifest: RunManifest) -> None:
    """Writes ``report.html`` of a demo.

    Raises:
        DataError: Something of it is missing, or its pool has changed.
    """
    config = _config(folder, manifest, "seed", "rows", "pool", "mislabel")
    for name in ("demo.json", "data/pool.jsonl", "rank/manifest.json"):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: {name} is missing; run pharmacist demo again with --overwrite")
    read_table(folder / "rank" / "scores.parquet")
    # Labels are in no file, so that nothing can rank by them; the world that wrote the pool knows them.
    world, rows, clean = World(config["seed"]), config["rows"], config["pool"] == "clean"
    planted = world.clean_planted(rows) if clean else world.planted(rows, mislabel=config["mislabel"])
    with open(folder / "data" / "pool.jsonl", encoding="utf-8") as file:
        if [json.loads(line) for line in file] != [row.row for row in planted]:
            raise DataError(f"{folder}: data/pool.jsonl has changed; run pharmacist demo again with --overwrite")
    render_demo(
        folder,
        labels=[row.kind if clean else row.label for row in planted],
        categories=[[row.category] for row in planted],
    )


def _sweep_page(folder: Path, manifest: RunManifest) -> None:

    if not (folder / "sweep.json").is_file():
        raise DataError(f"{folder}: sweep.json is missing; run pharmacist sweep again with --overwrite")
    render_sweep(folder, manifest=manifest.model_dump(mode="json"))


def _config(folder: Path, manifest: RunManifest, *names: str) -> dict[str, Any]:
    """A run's options, in which these must be."""
    if missing := [name for name in names if name not in manifest.config]:
        raise DataError(f"{folder}: manifest.json lacks the option {missing[0]}; run the command again")
    return manifest.config


def bench_page(folder: Path, manifest: RunManifest, baseline: str | None = None) -> None:
    """Writes page and tables of a benchmark, of a partial one too.

    Raises:
        DataError: ``results.parquet`` cannot be used.
        ConfigError: It has no selector of the baseline's name.
    """
    results = read_table(folder / "results.parquet", "cell", "seed", *AXES)
    names = sorted(results["selector"].unique())
    if baseline is not None and baseline not in names:
        raise ConfigError(f"--baseline: the grid has no selector '{baseline}'{closest(baseline, names)}")
    render_benchmark(folder, results, manifest=manifest.model_dump(mode="json"), baseline=baseline)


_PAGES = {"curate": _curate_page, "demo": demo_page, "sweep": _sweep_page, "bench": bench_page}
