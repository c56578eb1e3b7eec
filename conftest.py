"""Runs the examples of docstrings, README and docs (`make check`); the tests themselves need nothing from here.

Every document is worked through from top to bottom in a folder of its own that holds the files of
``examples/world_files.py``: Python blocks in one namespace, bash blocks in one bash each, or in this process where
they are nothing but commands of ours. Documents that begin with a model that is aligned (``runs/aligned``) or attacked
(``runs/attacked``) find it there.
"""

import atexit
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from sybil import Example, Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser

from pharmacist.cli.main import main


ROOT = Path(__file__).parent
BIN = Path(sys.executable).parent


MADE = """
common="--train.per_device_train_batch_size 16 --train.learning_rate 2e-3 --quiet"
pharmacist align --data pool.jsonl --model MODEL --train.max_steps 30 $common --output-dir runs/aligned
pharmacist attack --model runs/aligned --task task.jsonl --harmful attack.jsonl --samples 640 --train.max_steps 20 \\
  $common --output-dir runs/attacked
"""


def run_bash(example: Example) -> str | None:
    """Runs a block; says what was said where it fails."""
    code = str(example.parsed)
    for place in (Path("runs/aligned"), Path("runs/attacked")):
        if re.search(rf"--(model|aligned) {place}\s", code) and not re.search(rf"--output-dir {place}\s", code):
            place.parent.mkdir(exist_ok=True)
            if not place.exists():  # earlier blocks have made none
                place.symlink_to(made() / place)
    commands = plain_commands(code)
    if commands is None:
        done = bash(code, Path.cwd())
        return f"exit code {done.returncode}\n{done.stdout}{done.stderr}" if done.returncode else None
    for words in commands:
        if (returned := main(words)) != 0:
            return f"exit code {returned}: pharmacist {shlex.join(words)}"
    return None


def plain_commands(code: str) -> list[list[str]] | None:
    """The words of a block's commands where it has only commands of ours, which need no process of their own.

    None where bash has something to do. Loading torch anew for each command would take most of the time.
    """
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    commands = [words for words in lines if words]
    plain = not re.search(r"[|&;<>$*?~`(]", code) and all(words[0] == "pharmacist" for words in commands)
    return [words[1:] for words in commands] if plain else None


def bash(code: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Runs commands in a folder, offline."""
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    command = ["bash", "-euo", "pipefail", "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)


@cache
def made() -> Path:
    """A folder with a model aligned and attacked in a few steps, for all documents."""
    folder = Path(tempfile.mkdtemp(prefix="pharmacist-docs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_world(folder)
    done = bash(MADE, folder)
    assert not done.returncode, done.stderr
    return folder


def write_world(folder: Path) -> None:
    """Writes the files of the made-up world, with a pool that is small enough to be trained on again and again."""
    runpy.run_path(str(ROOT / "examples" / "world_files.py"))["write_world"](folder, rows=240)


def enter_world(namespace: dict[str, Any]) -> None:
    """Makes the document's folder and goes there."""
    namespace["_folder"], namespace["_before"] = tempfile.TemporaryDirectory(prefix="pharmacist-docs-"), Path.cwd()
    folder = Path(namespace["_folder"].name)
    write_world(folder)
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
