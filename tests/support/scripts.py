"""Recipes and benchmarks are scripts, not a package; tests load them from their files."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest


ROOT = Path(__file__).parents[2]


def load_script(path: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """A fresh module of the script at `path` under the root; scripts beside it can be imported as long as the test."""
    place = ROOT / path
    patch.syspath_prepend(str(place.parent))
    spec = spec_from_file_location(f"script_{place.stem}", place)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    patch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module
