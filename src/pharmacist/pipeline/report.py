"""The command `report`: writes the page of a finished folder again, out of what lies in it and the pool it names."""

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import read_json_lines
from pharmacist.core.manifest import RunManifest, check_unchanged, options_in, read_manifest
from pharmacist.pipeline.bench.command import bench_page
from pharmacist.pipeline.demo import demo_page
from pharmacist.pipeline.sweep import sweep_page


if TYPE_CHECKING:
    import pandas as pd

    from pharmacist.data.records import Records

_FIRST = 1000
"""Rows among which a pool with categories shows one."""


@dataclass(kw_only=True)
class ReportOptions:
    """Write the page of a finished folder again, of a bench its tables too; nothing is trained or ranked."""

    run: str = field(metadata={"first": True})
    """Folder of a finished curate, demo or sweep, or of a bench; as the first word it needs no --run."""
    baseline: str | None = None
    """Of a bench: the selector that the others are compared with, as the grid names it; full by default."""
    quiet: bool = False
    """No progress bars and no summary."""


def report(options: ReportOptions) -> str:
    """Writes ``report.html`` of a finished folder again.

    Returns:
        Path of the page.

    Raises:
        DataError: The folder is no finished run, or the pool is not what it was when it was ranked.
        ConfigError: The folder is of a command that writes no page, or the grid has no such baseline.
    """
    from pharmacist.core.progress import console

    _write_page(Path(options.run), options)
    page = f"{Path(options.run)}/report.html"
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
    import numpy as np

    from pharmacist.data.formats import open_source
    from pharmacist.data.records import parse_columns, read_records
    from pharmacist.data.where import conditions_for
    from pharmacist.report import render_ranking
    from pharmacist.report.tables import read_table

    config = options_in(folder, manifest, "pool", "columns", "on_bad_row")
    scores = read_table(folder / "scores.parquet", "row", "score", "rank", "selected", "reason")
    again = "put it back as it was (a relative path counts from here), or rank it again with pharmacist curate"
    try:
        source = open_source(config["pool"], name="pool")
    except DataError as error:
        raise DataError(f"{folder}: the pool {config['pool']} is no longer there; {again}") from error
    if source.fingerprint() != manifest.inputs.get("pool"):
        raise DataError(f"{folder}: the pool {config['pool']} has changed since it was ranked; {again}")
    with tempfile.TemporaryDirectory(prefix="pharmacist-") as work:
        records = read_records(
            source,
            work_dir=work,
            columns=parse_columns(config["columns"]),
            on_bad_row=config["on_bad_row"],
            where=conditions_for(config.get("where", []), "pool", source),
        )
        # Rows that the chat template refused were not ranked.
        records = records.without(np.flatnonzero(~np.isin(records.row_numbers, scores["row"])))
        if records.row_numbers.tolist() != scores["row"].tolist():
            raise DataError(f"{folder}: scores.parquet has other rows than the pool {config['pool']}; {again}")
        texts = records.dataset.select_columns(["prompt", "completion"])
        asked = read_json_lines(folder / "to_label.jsonl") if (folder / "to_label.jsonl").is_file() else []
        render_ranking(
            folder / "report.html",
            scores=scores,
            texts=texts,
            manifest=manifest.model_dump(mode="json"),
            categories=pool_categories(records),
            labelling=labelling(manifest.inputs["pool"], asked, scores),
        )
        del texts, records  # memory-mapped from the folder that goes now


def labelling(pool: str, asked: Sequence[Mapping[str, Any]], scores: "pd.DataFrame") -> dict[str, Any]:
    """What `render_ranking` needs to have rows labelled on the page.

    Args:
        pool: Fingerprint of the pool.
        asked: Rows to label, as in ``to_label.jsonl``.
        scores: ``scores.parquet``, which holds the labels that the ranking was made with.
    """
    from pharmacist.selectors.labels import LABELS, labels_of

    return {"pool": pool, "rows": asked, "labels": LABELS, "known": labels_of(scores)}


def pool_categories(records: "Records") -> list[list[str]] | None:
    """Categories of every row, out of the pool's column ``category``; None where the pool has no such column.

    Args:
        records: The pool; a row may have no category, one, or several.
    """
    from pharmacist.evaluation.prompts import category_names

    # A pool is long, and one without categories is not read to its end.
    columns = {"category", "categories"}
    first = itertools.islice(records.source.scan(columns), _FIRST)
    if not any(category_names(row.value) for row in first):
        return None
    wanted = set(records.row_numbers.tolist())
    return [category_names(row.value) for row in records.source.scan(columns) if row.number in wanted]


_PAGES = {"curate": _curate_page, "demo": demo_page, "sweep": sweep_page, "bench": bench_page}
