"""Pharmacist: rank a safety-alignment dataset, keep the core subset, align on it, prove that it holds.

The names below are imported on first use, so that ``import pharmacist`` stays cheap; so are all methods, by the names
of their classes, such as ``pharmacist.Vaccine``, ``pharmacist.ProbeJudge`` or ``pharmacist.PharmacistSelector``.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from pharmacist.api import align, attack, evaluate, rank, repair, tokenize
    from pharmacist.pipeline.align import AlignOptions
    from pharmacist.pipeline.attack import AttackOptions
    from pharmacist.pipeline.curate import CurateOptions, Ranking, curate
    from pharmacist.pipeline.evaluate import EvaluateOptions
    from pharmacist.pipeline.repair import RepairOptions
    from pharmacist.pipeline.sweep import SweepOptions, sweep
    from pharmacist.training.trainer import StrategyMixin, StrategyTrainer

__version__ = version("pharmacist")

_EXPORTS = {
    "AlignOptions": "pipeline.align",
    "align": "api",
    "AttackOptions": "pipeline.attack",
    "attack": "api",
    "CurateOptions": "pipeline.curate",
    "Ranking": "pipeline.curate",
    "curate": "pipeline.curate",
    "rank": "api",
    "EvaluateOptions": "pipeline.evaluate",
    "evaluate": "api",
    "RepairOptions": "pipeline.repair",
    "repair": "api",
    "SweepOptions": "pipeline.sweep",
    "sweep": "pipeline.sweep",
    "StrategyMixin": "training.trainer",
    "StrategyTrainer": "training.trainer",
    "tokenize": "api",
}

__all__ = [
    "AlignOptions",
    "AttackOptions",
    "CurateOptions",
    "EvaluateOptions",
    "Ranking",
    "RepairOptions",
    "StrategyMixin",
    "StrategyTrainer",
    "SweepOptions",
    "__version__",
    "align",
    "attack",
    "curate",
    "evaluate",
    "rank",
    "repair",
    "sweep",
    "tokenize",
]


_REGISTRIES = {
    "selectors": "SELECTORS",
    "defenses": "DEFENSES",
    "attacks": "ATTACKS",
    "repairs": "REPAIRS",
    "evaluation.judges": "JUDGES",
    "evaluation.tasks": "TASKS",
    "evaluation.engines": "ENGINES",
}


def _methods() -> dict[str, str]:
    """Class name of every method -> ``"module:Class"``."""
    found: dict[str, str] = {}
    for package, registry in _REGISTRIES.items():
        found |= getattr(import_module(f"pharmacist.{package}"), registry).classes()
    return found


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"pharmacist.{_EXPORTS[name]}"), name)
    if name[:1].isupper() and (place := _methods().get(name)):
        return getattr(import_module(place.partition(":")[0]), name)
    raise AttributeError(f"module 'pharmacist' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, *_methods()])
