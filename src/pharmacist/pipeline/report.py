"""The command `report`: writes the page of a finished run again, from the files in its folder and the pool."""

from collections.abc import Callable
from pathlib import Path

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.manifest import check_unchanged, read_manifest
from pharmacist.core.progress import say
from pharmacist.pipeline.pages import bench_page, demo_page, sweep_page
from pharmacist.pipeline.ranking import Ranking
from pharmacist.pipeline.stages.report import ReportOptions


def report(options: ReportOptions) -> str:
    """Writes ``report.html`` of a finished folder again.

    Returns:
        Path of the page.

    Raises:
        DataError: The folder holds no finished run, or the pool has changed since it was ranked.
        ConfigError: The run is of a command that writes no page, or the grid has no such baseline.
    """
    folder = Path(options.run)
    manifest = read_manifest(folder)
    check_unchanged(folder, "scores.parquet", "to_label.jsonl", "demo.json", "data", "sweep.json", "results.parquet")
    if manifest.stage == "demo":
        check_unchanged(folder / "rank", "scores.parquet")
    pages: dict[str, Callable[[], None]] = {
        "curate": lambda: Ranking.load(folder).report(folder / "report.html"),
        "demo": lambda: demo_page(folder, manifest),
        "sweep": lambda: sweep_page(folder, manifest),
        "bench": lambda: bench_page(folder, manifest, baseline=options.baseline),
    }
    if manifest.stage not in pages:
        known = " or ".join(pages)
        raise ConfigError(
            f"{folder}: a run of '{manifest.stage}', which has no HTML report; give the folder of a {known}"
        )
    if manifest.stage != "bench":  # of which what is finished can be shown
        if manifest.status == "started":
            raise DataError(
                f"{folder}: this {manifest.stage} is not finished; run the same command again to resume it"
            )
        if options.baseline is not None:
            raise ConfigError(f"--baseline {options.baseline}: only selectors of a bench are compared with one")
    pages[manifest.stage]()
    say(f"report {folder}/report.html")
    return f"{folder}/report.html"
