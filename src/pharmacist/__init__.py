"""Pharmacist: rank a safety-alignment dataset, keep the core subset, align on it, prove that it holds.

The names below are imported on first use, so that ``import pharmacist`` stays cheap.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from pharmacist.pipeline.align import align
    from pharmacist.pipeline.attack import attack
    from pharmacist.pipeline.curate import curate, rank
    from pharmacist.pipeline.evaluate import evaluate
    from pharmacist.pipeline.ranking import Ranking
    from pharmacist.pipeline.repair import repair
    from pharmacist.pipeline.stages.align import AlignOptions
    from pharmacist.pipeline.stages.attack import AttackOptions
    from pharmacist.pipeline.stages.curate import CurateOptions
    from pharmacist.pipeline.stages.evaluate import EvaluateOptions
    from pharmacist.pipeline.stages.repair import RepairOptions
    from pharmacist.pipeline.stages.sweep import SweepOptions
    from pharmacist.pipeline.sweep import sweep

__version__ = version("pharmacist")

__all__ = [
    "AlignOptions",
    "AttackOptions",
    "CurateOptions",
    "EvaluateOptions",
    "Ranking",
    "RepairOptions",
    "SweepOptions",
    "__version__",
    "align",
    "attack",
    "curate",
    "evaluate",
    "rank",
    "repair",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name in (others := {"Ranking": "ranking", "rank": "curate"}):
        return getattr(import_module(f"pharmacist.pipeline.{others[name]}"), name)
    if name in __all__:
        commands = import_module("pharmacist.pipeline.commands").COMMANDS
        stage = commands[name.removesuffix("Options").lower()]
        return stage.options if name.endswith("Options") else stage.function
    raise AttributeError(f"module 'pharmacist' has no attribute '{name}'")
