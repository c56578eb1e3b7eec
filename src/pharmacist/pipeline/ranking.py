"""The result of a ranking."""

import json
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pharmacist.core.errors import DataError
from pharmacist.core.files import atomic_path, read_json_lines
from pharmacist.core.manifest import options_in
from pharmacist.core.naming import naming_arguments
from pharmacist.data.formats import IN_MEMORY, Source, open_source
from pharmacist.data.records import Records, own_columns, parse_columns, read_records
from pharmacist.data.where import conditions_for
from pharmacist.evaluation.prompts import categories_of
from pharmacist.pipeline.choosing import Points, choose
from pharmacist.pipeline.pages import ranking_manifest, read_table
from pharmacist.pipeline.stages.curate import Diversity
from pharmacist.report.html import render_ranking
from pharmacist.selectors.labels import REASON_OF, labels_of


if TYPE_CHECKING:
    import datasets

_COLUMNS = ("row", "score", "rank", "selected", "reason")
_BARS = 40


@dataclass(repr=False)
class Ranking:
    """A ranked pool.

    Attributes:
        source: The pool.
        table: The content of ``scores.parquet``: row, score, rank, selected, reason and the selector's signals.
        manifest: Manifest of the run, as JSON.
        about: The selector's report, such as its quality on held-out references.
        to_label: Positions of the rows whose labels are most informative, shape [rows to label].
        folder: Folder of the run; None where none was asked for.
    """

    source: Source
    table: pd.DataFrame
    manifest: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    to_label: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    folder: Path | None = None
    _records: Records | None = None
    _points: Points | None = None
    _scratch: Any = None
    """Temporary folder from which rows are memory-mapped, unless they lie in that of a run."""

    @classmethod
    def load(cls, folder: str | Path, pool: Any = None) -> "Ranking":
        """Loads a ranking from the output folder of `curate` or `rank` and opens its pool.

        Args:
            folder: The output folder.
            pool: The pool, if it is not a file or a Hub id: the dataset or list that was ranked.

        Raises:
            DataError: The folder contains no finished ranking, or the pool has changed since then.
        """
        folder, manifest = Path(folder), ranking_manifest(folder)
        config = options_in(folder, manifest, "pool", "columns", "on_bad_row", "output_dir")
        table = read_table(folder / "scores.parquet", *_COLUMNS)
        if pool is None:
            if str(config["pool"]).endswith(IN_MEMORY):
                raise DataError(f"{folder}: was ranked from rows in memory; give them to Ranking.load as well")
            pool = _where_it_is(config["pool"], config["output_dir"], folder)
        what = f"{folder}: the pool {config['pool']}"
        again = "restore it (a relative path counts from here), or rank it again with pharmacist curate"
        try:
            source = open_source(pool, name="pool")
        except DataError as error:
            raise DataError(f"{what} is missing; {again}") from error
        if source.fingerprint() != manifest.inputs.get("pool"):
            raise DataError(f"{what} has changed since it was ranked; {again}")
        lines = folder / "to_label.jsonl"
        asked = [row["row"] for row in read_json_lines(lines)] if lines.is_file() else []
        to_label = np.searchsorted(table["row"], np.array(asked, dtype=np.int64))
        about = manifest.extra.get("selector_report", {})
        return cls(source, table, manifest.model_dump(mode="json"), about, to_label, folder)

    @property
    def records(self) -> Records:
        """The ranked rows in the order of `table`; for a loaded ranking, they are read on first use."""
        if self._records is None:
            config, self._scratch = self.manifest["config"], tempfile.TemporaryDirectory(prefix="pharmacist-")
            found = read_records(
                self.source,
                work_dir=self._scratch.name,
                columns=own_columns(self.source, parse_columns(config["columns"]) or {}),
                on_bad_row=config["on_bad_row"],
                where=conditions_for(config.get("where", []), "pool", self.source),
                keep=True,
            )
            # Rows that the chat template refused were not ranked.
            found = found.without(np.flatnonzero(~np.isin(found.row_numbers, self.table["row"])))
            if found.row_numbers.tolist() != self.table["row"].tolist():
                raise DataError(
                    f"{self.folder}: scores.parquet has other rows than the pool {config['pool']}; rank it again"
                )
            self._records = found
        return self._records

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        chosen = int(self.table["selected"].sum())
        return f"Ranking of {self.source.label}: {len(self)} rows ranked, {chosen} selected"

    def _repr_html_(self) -> str:
        """Counts by reason and the histogram of the scores."""
        heights = np.histogram(self.table["score"], bins=_BARS)[0] / max(1, len(self))
        bars = "".join(
            f'<rect x="{8 * n}" y="{100 - height:.1f}" width="7" height="{height:.1f}"/>'
            for n, height in enumerate(100 * heights / max(heights.max(), 1e-9))
        )
        low, high = (f"{end:.3g}" for end in (self.table["score"].min(), self.table["score"].max()))
        picture = f'<svg width="{8 * _BARS}" height="100" fill="currentColor">{bars}</svg><p>score {low} to {high}</p>'
        return f"<p>{escape(repr(self))}</p>{self.counts().to_html()}{picture}"

    def to_pandas(self) -> pd.DataFrame:
        """A copy of `table`."""
        return self.table.copy()

    def counts(self) -> pd.DataFrame:
        """Number of rows per reason (index), selected and left out (columns)."""
        found = pd.crosstab(self.table["reason"].astype(str), self.table["selected"])
        found = found.reindex(columns=[True, False], fill_value=0)
        return found.set_axis(["selected", "left out"], axis=1).rename_axis(columns=None)

    @naming_arguments()
    def select(
        self,
        fraction: float | None = None,
        *,
        k: int | None = None,
        min_score: float | None = None,
        diversity: Diversity = "none",
        diversity_margin: float = 1.5,
        balance_share: float = 0.0,
        fill: bool = False,
    ) -> "datasets.Dataset":
        """Selects the core subset, with all input columns and in input order.

        Args:
            fraction: Share of the ranked rows, in (0, 1].
            k: Number of rows, instead of `fraction`.
            min_score: Minimum score, instead of `fraction`.
            diversity: ``near-duplicates`` leaves out near-duplicates of higher-ranked rows; ``k-center`` and
                ``facility-location`` need a ranking that was made with one of the two and was not loaded.
            diversity_margin: ``k-center`` and ``facility-location`` choose from this many times as many best-ranked
                rows.
            balance_share: Minimum share of every group, in a ranking that was made with ``balance``; 0 means none.
            fill: Whether rows whose reason speaks against them may be selected to reach the share or number.

        Raises:
            ConfigError: No row qualifies, the ranking lacks what the choice needs, or ``min_score`` is combined with
                ``balance_share`` or a ``diversity`` that chooses among rows.
        """
        how: dict[str, Any] = {"margin": diversity_margin, "share": balance_share, "fill": fill}
        chosen = choose(self.table, fraction, k, min_score, diversity, points=self._points, **how)
        return self.source.dataset(self.table["row"].to_numpy()[chosen])

    def weights(self, rows: Any) -> list[float]:
        """The weight of each of some rows of the pool, such as those of `select`, as the selector gave it.

        Args:
            rows: A dataset, a list of dicts or a path; rows are recognised by their content.

        Raises:
            DataError: The ranking has no weights, or a row is not in the pool.
        """
        if "weight" not in self.table:
            raise DataError("weights: the ranking has none; rank the pool with a selector that gives rows weights")
        known = defaultdict[str, list[float]](list)
        for row, weight in zip(self.source.pick(self.table["row"]), self.table["weight"], strict=True):
            known[_content(row.value)].append(weight)
        found = []
        for number, values in open_source(rows, name="data").rows():
            if not (own := known.get(_content(values))):
                raise DataError(f"weights: row {number} of the data is not in the ranking; give a weight for each row")
            found.append(own.pop(0) if len(own) > 1 else own[0])  # equal rows in turn
        return found

    def to_parquet(self, path: str | Path) -> None:
        """Writes ``scores.parquet``."""
        with atomic_path(path) as temporary:
            self.table.to_parquet(temporary, index=False)

    def report(self, path: str | Path) -> None:
        """Writes the HTML report."""
        known, pool = labels_of(self.table), self.source.fingerprint()
        render_ranking(
            Path(path),
            scores=self.table,
            texts=self.records.dataset.select_columns(["prompt", "completion"]),
            manifest=self.manifest,
            categories=categories_of(self.records) or None,
            labelling={"pool": pool, "rows": self.rows_to_label(), "labels": REASON_OF, "known": known},
        )

    def rows_to_label(self) -> list[dict[str, Any]]:
        """The rows whose labels are most informative: ``row``, ``prompt``, ``completion`` and ``reason`` of each."""
        columns = self.records.dataset.select_columns(["row", "prompt", "completion"])
        reasons = self.table["reason"].to_numpy()
        return [dict(columns[int(at)]) | {"reason": str(reasons[at])} for at in self.to_label]


def _where_it_is(pool: str, output_dir: str, folder: Path) -> str:
    """Path of a ranking's pool, which may have been moved together with the ranking's folder."""
    moved = os.path.normpath(folder / os.path.relpath(pool, output_dir))
    return moved if not os.path.exists(pool) and os.path.exists(moved) else pool


def _content(row: Any) -> str:
    """What makes rows equal: all columns with a value."""
    return json.dumps(
        _filled(row), sort_keys=True, default=lambda it: it.isoformat() if hasattr(it, "isoformat") else str(it)
    )


def _filled(value: Any) -> Any:
    """A value in the one form that it has before and after it was in a dataset or in JSON.

    A dataset fills objects up with null and turns whole numbers among others into floats; JSON has null for NaN.
    """
    if isinstance(value, Mapping):
        filled = {str(name): _filled(inner) for name, inner in value.items()}
        return {name: inner for name, inner in filled.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_filled(inner) for inner in value]
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value
