"""Which package may import which: data flows one way, and what is light stays light."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1] / "src" / "pharmacist"

ABOVE_DATA = {"core", "data", "nn"}
MAY_IMPORT = {
    "core": set(),
    "data": {"core"},
    "worlds": {"core"},
    "nn": {"core", "data"},
    "readers": ABOVE_DATA,
    "training": ABOVE_DATA,
    "selectors": ABOVE_DATA | {"readers"},
    "defenses": {"core", "nn", "training.strategy"},
    "attacks": {"core", "data"},
    "repairs": ABOVE_DATA,
    "evaluation": ABOVE_DATA | {"readers"},
    "report": {"core", "evaluation.statistics"},
    "cli": {"core", "pipeline"},
}
MAY_IMPORT["pipeline"] = set(MAY_IMPORT) - {"cli"}
"""Package -> packages or modules; everything may import itself and `pharmacist` alone."""

MODELS = {"torch", "transformers", "peft", "accelerate", "trl"}
NEVER = {"core": MODELS | {"datasets", "pandas"}, "report": MODELS, "defenses": {"datasets"}}
"""Package -> libraries that it imports nowhere."""
LIGHT = ("core", "cli", "pipeline/commands.py", "pipeline/stage.py", "pipeline/stages", "pipeline/bench/options.py")
"""What loads with the command line: at module level it imports none of these."""
HEAVY = MODELS | {"datasets", "pandas", "numpy", "pyarrow", "scipy", "sklearn", "plotly"}


def imports(tree: ast.Module, *, top_level: bool = False) -> Iterator[str]:
    """Full names of imported modules; blocks under ``if TYPE_CHECKING`` are for type checkers only."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)


def broken_rules(module: str, source: str) -> list[str]:
    """What a module, or one of a package, imports although it must not."""
    tree, broken, package = ast.parse(source), list[str](), module.split("/")[0]
    for name in imports(tree):
        head, _, inner = name.partition(".")
        first = inner.split(".")[0]
        if head == "pharmacist" and first in MAY_IMPORT:
            allowed = MAY_IMPORT[package] | {package}
            if not any(inner == other or inner.startswith(other + ".") for other in allowed):
                broken.append(f"{package} imports {name}")
        elif head in NEVER.get(package, ()):
            broken.append(f"{package} imports {name}")
    if f"{module}/".startswith(tuple(f"{light}/" for light in LIGHT)):
        broken += [
            f"{module} imports {name} at module level"
            for name in imports(tree, top_level=True)
            if name.split(".")[0] in HEAVY
        ]
    return broken


MODULES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert package in MAY_IMPORT, f"new package '{package}': add it to the table"
    assert not broken_rules(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("data", "from pharmacist.selectors.base import Scores"),
        ("core", "def f():\n    import torch"),
        ("report", "from pharmacist.pipeline.curate import Ranking"),
        ("evaluation", "import pharmacist.training.trainer"),
        ("defenses", "from pharmacist.training import trainer"),
        ("pipeline/stages/align.py", "import numpy as np"),
        ("cli", "from pharmacist.cli import main\nfrom pharmacist.data import formats"),
    ],
)
def test_the_rules_can_fail(package: str, source: str) -> None:
    assert broken_rules(package, source)


def test_what_the_rules_allow() -> None:
    lazy = "if TYPE_CHECKING:\n    import pandas\ndef f():\n    import numpy\n    from pharmacist.training import loop"
    assert not broken_rules("pipeline/stages/align.py", lazy)
    assert not broken_rules("pipeline/align.py", "import numpy")
    assert not broken_rules("defenses", "from pharmacist.training.strategy import GradientStrategy\nimport torch")
