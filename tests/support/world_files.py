"""Small files of the village world, and what the tests of the command line do with them."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pharmacist.core.hashing import sha256_file
from pharmacist.pipeline.stages.curate import REFERENCES
from pharmacist.worlds import BASE_MODEL, World


FEW_STEPS = (
    "--selector.twin_steps 4 --selector.folds 2 --selector.corruptions_per_row 1 --selector.batch_size 4"
).split()
"""Options of the selector that train little."""
CHEAP = [*FEW_STEPS, "--selector.readers", "lexical,probe", "--selector.cotrain", "0"]
"""Less still; trains nothing but where the form asks for twins."""

TWO_PROCESSES = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2 -m pharmacist".split()]
"""A launcher; `accelerate launch --cpu` is none, it starts a single process however many it is asked for."""


def write_rows(path: Path, rows: Iterable[Any]) -> str:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_world(folder: Path, rows: int = 60, references: int = 16) -> dict[str, str]:
    """Writes pool and references; gives their paths by option."""
    world = World(3)
    sets = {"pool": world.pool(rows)[0]} | {name: world.rows(name, references) for name in REFERENCES}
    folder.mkdir(parents=True, exist_ok=True)
    return {name: write_rows(folder / f"{name}.jsonl", own) for name, own in sets.items()}


def curate_words(files: dict[str, str], output: Path, *more: str, model: str | None = str(BASE_MODEL)) -> list[str]:
    """A command line of `curate`."""
    words = ["curate", "--output-dir", str(output), "--device", "cpu"]
    words += ["--model", model] if model else []
    for name, path in files.items():
        words += [f"--{name}", path]
    return [*words, *more]


def fingerprints(*places: Path) -> dict[str, str | None]:
    """Content of every file below some places, and the folders there."""
    found: dict[str, str | None] = {}
    for place in places:
        for path in [place, *place.rglob("*")]:
            if path.is_file():
                found[str(path)] = sha256_file(path)
            elif path.exists():
                found[str(path)] = None
    return found
