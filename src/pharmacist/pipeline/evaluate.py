"""The command `evaluate`: one model or given answers, several models, or the difference of two evaluations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pharmacist.core.files import read_json_lines
from pharmacist.pipeline.stages.evaluate import EvaluateOptions


@dataclass
class EvaluateResult:
    """What `evaluate` found.

    Attributes:
        metrics: Content of ``metrics.json``: name -> value in percent, n, count, ci95, judge; with several models,
            that by model.
        folder: Where the files are.
    """

    metrics: dict[str, Any]
    folder: Path

    def items(self) -> list[dict[str, Any]]:
        """Content of ``items.jsonl`` of one model: one object per prompt with answer and verdicts."""
        return read_json_lines(self.folder / "items.jsonl")


def evaluate(options: EvaluateOptions) -> EvaluateResult:
    """Evaluates a model and writes ``metrics.json``, ``items.jsonl`` and the manifest; or compares two such folders.

    Interrupted, it keeps the answers that it has and continues with the rest. Answers and verdicts that an endpoint
    failed to give leave the run ``partial``: its metrics are over the rest, and the same run asks for them again.

    Raises:
        PharmacistError: Bad options or input.
    """
    if options.compare is not None:
        from pharmacist.pipeline.compare import compare_runs as run
    elif options.models is not None:
        from pharmacist.pipeline.side_by_side import evaluate_models as run
    else:
        from pharmacist.pipeline.evaluate_model import evaluate_model as run
    return EvaluateResult(run(options), Path(options.output_dir))
