"""The command `evaluate`: `reading` opens its inputs, `model` evaluates one, `several` more, `summary` prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pharmacist.core.files import read_json_lines
from pharmacist.evaluation.metrics import NAMES
from pharmacist.pipeline.evaluate.model import evaluate_model
from pharmacist.pipeline.stages.evaluate import COMPARE, EVALUATE_MODELS, EvaluateOptions


@dataclass(repr=False)
class EvaluateResult:
    """The result of `evaluate`.

    Attributes:
        metrics: Content of ``metrics.json``: name -> value (rates in percent), n, count, ci95, judge; with several
            models, one such mapping per model.
        folder: Folder of the files; None where none was asked for.
    """

    metrics: dict[str, Any]
    folder: Path | None = None
    _items: list[dict[str, Any]] | None = None

    def items(self) -> list[dict[str, Any]]:
        """The content of ``items.jsonl`` of one model: one object per prompt, with answer and verdicts."""
        if self._items is None and self.folder is not None:
            return read_json_lines(self.folder / "items.jsonl")
        return self._items or []

    def to_pandas(self) -> pd.DataFrame:
        """One row per metric (and model, if there are several), with ``value`` and the ends ``low`` and ``high`` of
        its 95 % interval (rates in percent), ``count`` of ``n``, and ``by``, the judge or the matching of answers.
        """
        one = any("value" in metric for metric in self.metrics.values())
        rows = []
        for model, metrics in ({"": self.metrics} if one else self.metrics).items():
            for name, metric in metrics.items():
                low, high = metric.get("ci95") or (None, None)
                by = metric.get("judge") or metric.get("task_type") or metric.get("matching")
                rows.append((model, name, metric["value"], low, high, metric.get("count"), metric["n"], by))
        table = pd.DataFrame(rows, columns=["model", "metric", "value", "low", "high", "count", "n", "by"])
        return table.drop(columns="model") if one else table

    def __repr__(self) -> str:
        return self.to_pandas().to_string(index=False, na_rep="")  # no answers, which may be harmful

    def _repr_html_(self) -> str:
        table = self.to_pandas()
        digits = table["metric"].map(lambda name: 3 if name == "loss_margin" else 1)
        for name in ("value", "low", "high"):
            values = zip(table[name], digits, strict=True)
            table[name] = [None if pd.isna(value) else f"{value:.{places}f}" for value, places in values]
        table["count"] = table["count"].astype("Int64")
        table["metric"] = table["metric"].map(lambda name: NAMES.get(name, name))
        shown: str = table.to_html(index=False, na_rep="")
        return shown


def evaluate(options: EvaluateOptions) -> EvaluateResult:
    """Evaluates a model and writes ``metrics.json``, ``items.jsonl`` and the manifest; or compares two such folders.

    After an interruption, the same call continues with the missing answers. If an endpoint failed to return some
    answers or verdicts, the run is ``partial``: its metrics cover the rest, and the same call requests the missing
    ones.

    Raises:
        PharmacistError: Options or input cannot be used.
    """
    several = EVALUATE_MODELS if options.models else evaluate_model
    run = COMPARE if options.compare is not None else several
    return EvaluateResult(run(options), Path(options.output_dir))
