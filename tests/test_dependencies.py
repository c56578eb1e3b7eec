"""What is imported is declared in pyproject.toml, and what is declared there is imported."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
USED_BY_NAME = {"tabulate": "pandas", "trackio": "transformers", "tensorboard": "transformers", "gguf": "transformers"}
"""Distribution -> library that imports it where we ask for Markdown, a tracker, or a model in GGUF."""
TOOLS = {"pytest-xdist", "ruff", "mypy", "types-pyyaml", "pandas-stubs", "mkdocs-material", "mkdocstrings"}
"""Distributions that are run, or read by one that is."""
OPTIONAL = {"dattri"}
"""Distributions without which a test is skipped and says so."""
CODE = {
    "src": ["src"],
    "tests": ["tests", "conftest.py"],
    "benchmarks": ["benchmarks", "examples", "recipes"],
    "docs": ["docs"],
}


def declared(*groups: str) -> set[str]:
    """Distributions that the package, its extras and some groups for developers name."""
    project = PROJECT["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    lists += [[text for text in PROJECT["dependency-groups"][group] if isinstance(text, str)] for group in groups]
    return {re.match(r"[\w.-]+", text)[0].lower() for texts in lists for text in texts}


def imported(kind: str) -> set[str]:
    """Distributions that the code imports."""
    paths = [
        path
        for part in CODE[kind]
        for path in ([ROOT / part] if part.endswith(".py") else (ROOT / part).rglob("*.py"))
    ]
    names = {name.split(".")[0] for path in paths for name in _names(path.read_text(encoding="utf-8"))}
    names -= {"pharmacist", "tests", *sys.stdlib_module_names, *(path.stem for path in paths if kind != "src")}
    distributions = packages_distributions()
    return {distributions.get(name, [name])[0].lower().replace("_", "-") for name in names} - OPTIONAL


def _names(code: str) -> Iterator[str]:
    """Imported modules, those by a call that names them too."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module)):
                yield module
            case ast.Call(func=ast.Name(called) | ast.Attribute(attr=called), args=[ast.Constant(str(name)), *_]):
                if called in {"import_module", "importorskip", "files"}:
                    yield name


@pytest.mark.parametrize(
    ("kind", "groups"), [("src", []), ("tests", ["test"]), ("benchmarks", ["benchmarks"]), ("docs", ["docs"])]
)
def test_what_is_imported_is_declared(kind: str, groups: list[str]) -> None:
    assert not imported(kind) - declared(*groups)


def test_what_is_declared_is_imported() -> None:
    assert not declared() - imported("src") - set(USED_BY_NAME)
    groups = declared("test", "benchmarks", "check", "docs") - declared()
    assert not groups - imported("tests") - imported("benchmarks") - imported("docs") - TOOLS - set(USED_BY_NAME)


def test_the_rules_can_fail() -> None:
    code = "import a.b\nfrom c.d import e\nfrom . import f\nx = importlib.import_module('g')\nopen('h')"
    assert list(_names(code)) == ["a.b", "c.d", "g"]
    assert {"torch", "ray"} <= declared() and "pytest" in declared("test") - declared()
