"""Weights of rows for `align`: from the ranking that selected them, or from a file of one's own."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from pharmacist.core.console import named
from pharmacist.core.errors import DataError
from pharmacist.core.hashing import sha256_file
from pharmacist.core.manifest import RunManifest, read_manifest
from pharmacist.data.formats import Source, open_source


def weights_fingerprint(path: str | Source | None) -> dict[str, str]:
    """The content of a file or of weights in memory, by the name of the option; nothing without either.

    Raises:
        DataError: There is no such file.
    """
    if path is None:
        return {}
    if isinstance(path, Source):
        return {"weights": path.fingerprint()}
    if not Path(path).is_file():
        raise DataError(f"--weights {path}: no such file; give scores.parquet of the curate run that wrote --data")
    return {"weights": sha256_file(path)}


def row_weights(path: str | Source, data: Source, rows: int) -> dict[int, float]:
    """Weights of the rows of the alignment set, by their number in the file.

    A curate run's file beside the set that it ranked has one for each row that was ranked. Any other file has as many
    lines as there are rows, one for each, or as many ``selected`` ones, in input order, which is the order of
    ``selected.jsonl``.

    Args:
        path: Parquet, with ``weight`` and maybe ``row`` and ``selected``, or such rows in memory.
        data: The alignment set.
        rows: Its length, with the rows that are refused or left out by ``where``.

    Raises:
        DataError: The weights are of other rows, or no weights.
    """
    table = _read(path)
    if "weight" not in table:
        raise DataError(
            f"--weights {path}: has no column 'weight'; rank the pool with a selector that gives rows weights"
        )
    run = None if isinstance(path, Source) else _curate_run(Path(path))
    if run is not None and data.fingerprint() == run.inputs["pool"]:
        numbers = table["row"].tolist()
    else:
        table, numbers = _lines_of(table, rows, path), list(range(rows))
        if run is not None:
            _check_selected(str(path), run, data)
    weight = pd.to_numeric(table["weight"], errors="coerce").to_numpy(dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(weight) | (weight < 0))
    if len(bad):
        found = table["weight"].iloc[int(bad[0])]
        raise DataError(
            f"--weights {path}: the weight of row {numbers[bad[0]]} is {str(found)[:40]!r}, not a number of at least 0"
        )
    return dict(zip(numbers, weight.tolist(), strict=True))


def _lines_of(table: pd.DataFrame, rows: int, path: str | Source) -> pd.DataFrame:
    """The lines for a set of so many rows, in input order."""
    selected = table[table["selected"].astype(bool)] if "selected" in table else table
    if rows not in (len(table), len(selected)):
        chosen = f", {len(selected)} of them selected" if "selected" in table else ""
        raise DataError(
            f"--weights {path}: has {len(table)} rows{chosen}, but --data has {rows}; give the scores.parquet of the "
            "curate run that wrote --data"
        )
    found = table if len(table) == rows else selected
    return found.sort_values("row", kind="stable") if "row" in found else found


def scaled(weights: Mapping[int, float], rows: Sequence[int], path: str | Source) -> dict[int, float]:
    """Weights of the rows that are trained on, by their number in the file, with mean 1.

    Raises:
        DataError: They are all 0, or a row has none.
    """
    if missing := [row for row in rows if row not in weights]:
        raise DataError(
            f"--weights {path}: has no weight for {named(missing)} of --data; choose the rows that were ranked by "
            "--where, or give the selected ones"
        )
    mean = math.fsum(weights[row] for row in rows) / len(rows)
    if not mean:
        raise DataError(f"--weights {path}: all weights are 0, so there is nothing to train on")
    return {row: weights[row] / mean for row in rows}


def _read(path: str | Source) -> pd.DataFrame:
    if isinstance(path, Source):
        return pd.DataFrame([row for _, row in path.rows()])
    try:
        return pd.read_parquet(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"--weights {path}: is not a readable Parquet file") from error


def _curate_run(path: Path) -> RunManifest | None:
    """The manifest of the curate run that wrote a file, where it lies in the run's folder."""
    if path.name != "scores.parquet" or not (path.parent / "manifest.json").is_file():
        return None
    manifest = read_manifest(path.parent)
    return manifest if manifest.stage == "curate" else None


def _check_selected(path: str, run: RunManifest, data: Source) -> None:
    """Equal numbers of rows do not make them the same rows: the files of the run tell."""
    files = [Path(path).parent / name for name in run.outputs if name.startswith("selected.")]
    selected = [open_source(str(file), name="selected").fingerprint() for file in files if file.is_file()]
    if data.fingerprint() not in selected:
        raise DataError(
            f"--weights {path}: belongs to other rows than --data {data.label}; give the selected rows (or the pool) "
            "of that run, or copy the file elsewhere if its rows are the same in another form"
        )
