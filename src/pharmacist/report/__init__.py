"""Pages: one self-contained HTML file per finished folder, readable from disk without any network."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from pharmacist.report.benchmark_page import render_benchmark
    from pharmacist.report.html import render_demo, render_ranking

__all__ = ["render_benchmark", "render_demo", "render_ranking"]
_MODULES = {"render_benchmark": "benchmark_page", "render_demo": "html", "render_ranking": "html"}


def __getattr__(name: str) -> Any:
    """Loads what draws pages when it is needed: names and numbers, which commands use, cost no start-up time."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
