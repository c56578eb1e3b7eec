"""Runs the examples of docstrings, README and docs (`make check`); the tests themselves need nothing from here.

Every document is worked through from top to bottom in a folder of its own that holds the files of
``examples/world_files.py``: Python blocks in one namespace, bash blocks in one bash each; where these only name one
command after the other, ours run in this process. Documents that begin with a model that is aligned (``runs/aligned``)
or attacked (``runs/attacked``) find it there.
"""

import atexit
import contextlib
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


TRAIN = "--train.per_device_train_batch_size 16 --train.learning_rate 2e-3 --quiet"
MADE = f"""
pharmacist align --data pool.jsonl --model MODEL --train.max_steps 30 {TRAIN} --output-dir runs/aligned
pharmacist attack --model runs/aligned --task task.jsonl --harmful attack.jsonl --samples 640 --train.max_steps 20 \\
  {TRAIN} --output-dir runs/attacked
"""
BUILTINS = {"cd", "export", "source", ".", "for", "while", "do", "done", "if", "fi", "case", "esac", "set"}


def run_bash(example: Example) -> str | None:
    """Runs a block; says what was said where it fails."""
    code = str(example.parsed)
    for place in (Path("runs/aligned"), Path("runs/attacked")):
        if re.search(rf"--(model|aligned) {place}\s", code) and not re.search(rf"--output-dir {place}\s", code):
            place.parent.mkdir(exist_ok=True)
            if not place.exists():  # earlier blocks have made none
                place.symlink_to(made() / place)
    commands = plain_commands(code)
    return run_plain(commands) if commands is not None else run_processes(code)


def run_processes(code: str) -> str | None:
    """Runs bash in a process, offline; says what was said where it fails."""
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], env=environment, text=True, capture_output=True)
    return f"exit code {done.returncode}\n{done.stdout}{done.stderr}" if done.returncode else None


def run_plain(commands: list[list[str]]) -> str | None:
    """Runs commands one after the other, ours in this process; says what was said where one fails."""
    for words in commands:
        if words[0] != "pharmacist":
            said = run_processes(shlex.join(words))
        else:
            code = main(words[1:])
            said = f"exit code {code}: {shlex.join(words)}" if code else None
        if said is not None:
            return said
    return None


def plain_commands(code: str) -> list[list[str]] | None:
    """The words of a block's commands; None where bash has more to do than to run them one after the other.

    Loading torch anew for each of ours would take most of the time.
    """
    if re.search(r"[|&;<>$*?~`(]", re.sub(r"'[^'\n]*'", "", code)):
        return None
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    commands = [words for words in lines if words]
    return None if any(words[0] in BUILTINS or "=" in words[0] for words in commands) else commands


@cache
def made() -> Path:
    """A folder with a model aligned and attacked in a few steps, for all documents."""
    folder = Path(tempfile.mkdtemp(prefix="pharmacist-docs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_world(folder)
    with contextlib.chdir(folder):
        assert (said := run_plain(plain_commands(MADE) or [])) is None, said
    return folder


def write_world(folder: Path) -> None:
    """Writes the files of the synthetic world, with a pool that is small enough to be trained on again and again."""
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
)
_documents = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser(language="bash", evaluator=run_bash), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"],
    path=str(ROOT),
    setup=enter_world,
    teardown=leave_world,
)

pytest_collect_file = (_docstrings + _documents).pytest()
