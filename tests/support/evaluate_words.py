"""Evaluate words that several tests use."""

import json
from pathlib import Path

from pharmacist.worlds.potions import BASE_MODEL


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arguments(files: dict[str, str], output: Path, *more: str, model: str = str(BASE_MODEL)) -> list[str]:
    words = ["evaluate", "--model", model, "--output-dir", str(output), "--device", "cpu", "--max-new-tokens", "16"]
    for name, path in files.items():
        words += [f"--{name.replace('_', '-')}", path]
    return words + list(more)


def some(files: dict[str, str], *names: str) -> dict[str, str]:
    return {name: files[name] for name in names}
