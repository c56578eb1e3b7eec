"""Pharmacist: rank a safety-alignment dataset, keep the core subset, align on it, measure whether it holds.

The names below are imported on first use, so that ``import pharmacist`` is fast. The same holds for all methods, under
the names of their classes, such as ``pharmacist.Vaccine``, ``pharmacist.ProbeJudge`` or
``pharmacist.PharmacistSelector``.
"""

from functools import partial, update_wrapper
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pharmacist.core.naming import naming_arguments


if TYPE_CHECKING:
    from pharmacist.api import align, attack, evaluate, rank, repair, tokenize
    from pharmacist.pipeline.curate import curate
    from pharmacist.pipeline.ranking import Ranking
    from pharmacist.pipeline.stages.align import AlignOptions
    from pharmacist.pipeline.stages.attack import AttackOptions
    from pharmacist.pipeline.stages.curate import CurateOptions
    from pharmacist.pipeline.stages.evaluate import EvaluateOptions
    from pharmacist.pipeline.stages.repair import RepairOptions
    from pharmacist.pipeline.stages.sweep import GridOptions, SweepOptions
    from pharmacist.pipeline.sweep import sweep
    from pharmacist.training.trainer import StrategyMixin, StrategyTrainer

__version__ = version("pharmacist")

__all__ = [
    "AlignOptions",
    "AttackOptions",
    "CurateOptions",
    "EvaluateOptions",
    "GridOptions",
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

_MODULES = {
    "GridOptions": "pipeline.stages.sweep",
    "Ranking": "pipeline.ranking",
    "StrategyMixin": "training.trainer",
    "StrategyTrainer": "training.trainer",
    **dict.fromkeys(("align", "attack", "evaluate", "rank", "repair", "tokenize"), "api"),
}
"""Modules of the public names that no command declares."""
_REGISTRIES = {
    "selectors": "SELECTORS",
    "defenses": "DEFENSES",
    "attacks": "ATTACKS",
    "repairs": "REPAIRS",
    "evaluation.judges": "JUDGES",
    "evaluation.graders": "GRADERS",
    "evaluation.engines": "ENGINES",
}


def _methods() -> dict[str, str]:
    """Class name of every method -> ``"module:Class"``."""
    found: dict[str, str] = {}
    for package, registry in _REGISTRIES.items():
        found |= getattr(import_module(f"pharmacist.{package}"), registry).classes()
    return found


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"pharmacist.{_MODULES[name]}"), name)
    if name in __all__:
        commands = import_module("pharmacist.pipeline.commands").COMMANDS
        stage = commands[name.removesuffix("Options").lower()]
        if name.endswith("Options"):
            return stage.options
        return naming_arguments()(update_wrapper(partial(stage), stage.function))
    if name[:1].isupper() and (path := _methods().get(name)):
        return getattr(import_module(path.partition(":")[0]), name)
    raise AttributeError(f"module 'pharmacist' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, *_methods()])
