"""Which package may import which: data flows one way, no two modules know each other, what is light stays light."""

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
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
    "report": {"core", "evaluation.metrics", "evaluation.statistics"},
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


def imported_modules(name: str, source: str, modules: Mapping[str, str]) -> set[str]:
    """Modules of ours that a module imports anywhere: at its top, in functions, and for type checkers."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for target in names:
            while target and target not in modules:
                target = target.rpartition(".")[0]
            found |= {target} - {name, "", "pharmacist"}  # the package itself only gives names on
    return found


def circle(modules: Mapping[str, str]) -> list[str]:
    """Modules that import each other, one after the other; none where there are none such."""
    try:
        TopologicalSorter({name: imported_modules(name, text, modules) for name, text in modules.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other() -> None:
    paths = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path.read_text(encoding="utf-8") for name, path in paths.items()}
    assert len(modules) > 100 and circle(modules) == []


def test_a_circle_is_found_wherever_the_import_stands() -> None:
    modules = {
        "a": "from b import x",
        "b": "def f():\n    import a.c",
        "a.c": "if TYPE_CHECKING:\n    from a import y",
        "d": "import a",
    }
    assert set(circle(modules)) == {"a", "b", "a.c"}
    assert circle(modules | {"a.c": "import json"}) == []


def test_no_test_imports_another() -> None:
    """What several tests use lies in ``tests/support``."""
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = f"{node.module}.{'.'.join(alias.name for alias in node.names)}".split(".")
                assert names[0] != "tests" or not any(name.startswith("test_") for name in names), (
                    f"{path}: {ast.unparse(node)}"
                )


def private_patches(source: str) -> list[str]:
    """Calls of ``setattr`` that replace a private function or attribute; private constants may be changed."""
    private = re.compile(r"(.*\.)?_[a-z]\w*")
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr"
        for name in node.args[:2]
        if isinstance(name, ast.Constant) and isinstance(name.value, str) and private.fullmatch(name.value)
    ]


def test_no_test_patches_a_private_function() -> None:
    for path in Path(__file__).parent.rglob("*.py"):
        assert not private_patches(path.read_text(encoding="utf-8")), path
    private = ["patch.setattr(module, '_rank', f)", "patch.setattr('a.b._rank', f)"]
    assert private_patches("\n".join([*private, "patch.setattr(module, '_MOST', 1)"])) == private
