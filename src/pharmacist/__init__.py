"""Pharmacist: rank a safety-alignment dataset, keep the core subset, align on it, prove that it holds.

The names below are imported on first use, so that ``import pharmacist`` stays cheap; so are all methods, by the names
of their classes, such as ``pharmacist.Vaccine``, ``pharmacist.ProbeJudge`` or ``pharmacist.PharmacistSelector``.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from pharmacist.pipeline.align import AlignOptions, align
    from pharmacist.pipeline.attack import AttackOptions, attack
    from pharmacist.pipeline.curate import CurateOptions, Ranking, curate, rank
    from pharmacist.pipeline.evaluate import EvaluateOptions, evaluate
    from pharmacist.pipeline.repair import RepairOptions, repair
    from pharmacist.pipeline.sweep import SweepOptions, sweep

__version__ = version("pharmacist")

_EXPORTS = {
    "AlignOptions": "align",
    "align": "align",
    "AttackOptions": "attack",
    "attack": "attack",
    "CurateOptions": "curate",
    "Ranking": "curate",
    "curate": "curate",
    "rank": "curate",
    "EvaluateOptions": "evaluate",
    "evaluate": "evaluate",
    "RepairOptions": "repair",
    "repair": "repair",
    "SweepOptions": "sweep",
    "sweep": "sweep",
}

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
        return getattr(import_module(f"pharmacist.pipeline.{_EXPORTS[name]}"), name)
    if name[:1].isupper() and (place := _methods().get(name)):
        return getattr(import_module(place.partition(":")[0]), name)
    raise AttributeError(f"module 'pharmacist' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, *_methods()])
