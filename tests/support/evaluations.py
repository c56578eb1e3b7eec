"""Evaluations that several tests use."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin


FAST = ["--engine.max_wait", "0.02", "--engine.timeout", "5", "--engine.attempts", "3", "--engine.concurrency", "3"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(folder: Path, *words: str) -> str:
    return write(folder / "prompts.jsonl", [{"prompt": f"how do you brew {word}"} for word in words])


def command(url: str, files: dict[str, str], output: Path, *more: str) -> list[str]:
    words = ["evaluate", "--model", "served", "--output-dir", str(output), "--engine", "openai", *FAST, "--quiet"]
    words += ["--base-url", url]
    for name, path in files.items():
        words += [f"--{name.replace('_', '-')}", path]
    return words + list(more)


def items(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "items.jsonl").open()]


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def batch_sizes(monkeypatch: pytest.MonkeyPatch, room: int = 1000) -> list[int]:
    """The sizes of the batches that models generate answers to from now on; memory runs out for more than `room`."""
    generate, sizes = GenerationMixin.generate, []

    def spied(model: Any, **options: Any) -> Any:
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > room:
            raise torch.cuda.OutOfMemoryError("full")
        return generate(model, **options)

    monkeypatch.setattr(GenerationMixin, "generate", spied)
    return sizes
