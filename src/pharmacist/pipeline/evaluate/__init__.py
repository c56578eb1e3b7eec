"""The stage `evaluate`: `reading` opens the inputs, `model` evaluates one, `several` more, `summary` prints."""

from pharmacist.pipeline.evaluate.command import EvaluateResult, evaluate
from pharmacist.pipeline.stages.evaluate import EvaluateOptions


__all__ = ["EvaluateOptions", "EvaluateResult", "evaluate"]
