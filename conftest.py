"""Runs the examples of docstrings, README and docs (`make check`); the tests themselves need nothing from here.

Every document is worked through from top to bottom in a folder of its own that holds the files of
``examples/world_files.py``: Python blocks in one namespace, bash blocks in one bash each.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sybil import Example, Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser


ROOT = Path(__file__).parent
BIN = Path(sys.executable).parent


def run_bash(example: Example) -> str | None:
    """Runs a block; says what bash said where it fails."""
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", str(example.parsed)], env=environment, text=True, capture_output=True
    )  # fmt: skip
    return f"exit code {done.returncode}\n{done.stdout}{done.stderr}" if done.returncode else None


def enter_world(namespace: dict[str, Any]) -> None:
    """Makes the document's folder and goes there."""
    namespace["_folder"], namespace["_before"] = tempfile.TemporaryDirectory(prefix="pharmacist-docs-"), Path.cwd()
    folder = Path(namespace["_folder"].name)
    runpy.run_path(str(ROOT / "examples" / "world_files.py"))["write_world"](folder)
    os.chdir(folder)


def leave_world(namespace: dict[str, Any]) -> None:
    """Goes back and deletes the folder."""
    os.chdir(namespace["_before"])
    namespace["_folder"].cleanup()


_docstrings = Sybil(
    parsers=[DocTestParser()], pattern="*.py", document_types={".py": PythonDocStringDocument}, path=str(ROOT / "src")
)  # fmt: skip
_documents = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser(language="bash", evaluator=run_bash), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"], path=str(ROOT), setup=enter_world, teardown=leave_world,
)  # fmt: skip

pytest_collect_file = (_docstrings + _documents).pytest()
