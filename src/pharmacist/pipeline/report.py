"""The command `report`: writes the page of a finished folder again, out of what lies in it and the pool it names."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pharmacist.core.errors import ConfigError, DataError


if TYPE_CHECKING:
    from pharmacist.core.manifest import RunManifest


@dataclass(kw_only=True)
class ReportOptions:
    """Write the page of a finished folder again; nothing is trained or ranked."""

    run: str
    """Folder of a finished curate or demo."""
    quiet: bool = False
    """No progress bars and no summary."""


def report(options: ReportOptions) -> Path:
    """Writes ``report.html`` of a finished folder again.

    Returns:
        The page.

    Raises:
        DataError: The folder is no finished run, or the pool is not what it was when it was ranked.
        ConfigError: The folder is of a command that writes no page.
    """
    from pharmacist.core.manifest import read_manifest
    from pharmacist.core.progress import console

    folder = Path(options.run)
    manifest = read_manifest(folder)
    if manifest.stage not in _PAGES:
        known = " or ".join(_PAGES)
        raise ConfigError(f"{folder}: a run of '{manifest.stage}', which has no page; give the folder of a {known}")
    if manifest.status != "success":
        raise DataError(f"{folder}: this {manifest.stage} is not finished; run the same command again to resume it")
    _PAGES[manifest.stage](folder, manifest)
    page = folder / "report.html"
    console().print(f"page {page}")
    return page


def _curate_page(folder: Path, manifest: "RunManifest") -> None:
    from pharmacist.data.formats import open_source
    from pharmacist.data.records import parse_columns, read_records
    from pharmacist.report import render_ranking

    config = manifest.config
    scores = _scores(folder / "scores.parquet")
    again = "put it back as it was (a relative path counts from here), or rank it again with pharmacist curate"
    try:
        source = open_source(config["pool"], name="pool")
    except DataError as error:
        raise DataError(f"{folder}: the pool {config['pool']} is no longer there; {again}") from error
    if source.fingerprint() != manifest.inputs["pool"]:
        raise DataError(f"{folder}: the pool {config['pool']} has changed since it was ranked; {again}")
    with tempfile.TemporaryDirectory(prefix="pharmacist-") as work:
        records = read_records(
            source, work_dir=work, columns=parse_columns(config["columns"]), on_bad_row=config["on_bad_row"]
        )
        if records.row_numbers.tolist() != scores["row"].tolist():
            raise DataError(f"{folder}: scores.parquet has other rows than the pool {config['pool']}; {again}")
        texts = records.dataset.select_columns(["prompt", "completion"])
        render_ranking(folder / "report.html", scores=scores, texts=texts, manifest=manifest.model_dump(mode="json"))
        del texts, records  # memory-mapped from the folder that goes now


def _demo_page(folder: Path, manifest: "RunManifest") -> None:
    import json

    from pharmacist.report import render_demo
    from pharmacist.worlds import World

    config = manifest.config
    for name in ("demo.json", "data/pool.jsonl", "rank/manifest.json"):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: {name} is missing; run pharmacist demo again with --overwrite")
    _scores(folder / "rank" / "scores.parquet")
    # Labels are in no file, so that nothing can rank by them; the world that wrote the pool knows them.
    world, rows = World(config["seed"]), config["rows"]
    pool, labels = (
        world.clean_pool(rows) if config["pool"] == "clean" else world.pool(rows, mislabel=config["mislabel"])
    )
    with open(folder / "data" / "pool.jsonl", encoding="utf-8") as file:
        if [json.loads(line) for line in file] != pool:
            raise DataError(f"{folder}: data/pool.jsonl has changed; run pharmacist demo again with --overwrite")
    render_demo(folder, labels=labels)


def _scores(path: Path) -> Any:
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]}); run the command again") from error


_PAGES = {"curate": _curate_page, "demo": _demo_page}
