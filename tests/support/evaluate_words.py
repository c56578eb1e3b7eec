"""Evaluate words that several tests use."""

import json
from pathlib import Path

import pytest

from pharmacist.worlds.potions import BASE_MODEL, World


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, world = tmp_path_factory.mktemp("files"), World(3)
    rows = {
        "prompts": world.eval_prompts(24),
        "benign_prompts": world.borderline(12),
        "task": world.task_test(20),
        "safe": world.safe(48),
        "harmful": world.harmful(48),
        "utility": world.utility(48),
    }
    return {name: write(folder / f"{name}.jsonl", own) for name, own in rows.items()}


def arguments(files: dict[str, str], output: Path, *more: str, model: str = str(BASE_MODEL)) -> list[str]:
    words = ["evaluate", "--model", model, "--output-dir", str(output), "--device", "cpu", "--max-new-tokens", "16"]
    for name, path in files.items():
        words += [f"--{name.replace('_', '-')}", path]
    return words + list(more)


def some(files: dict[str, str], *names: str) -> dict[str, str]:
    return {name: files[name] for name in names}
