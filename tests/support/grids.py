"""Small grids over the synthetic world."""

from pathlib import Path
from typing import Any

import pandas as pd
import yaml


SMALL: dict[str, Any] = {
    "models": [{"name": "village", "model": "world"}],
    "pools": [{"name": "pool", "pool": "world", "rows": 60}],
    "selectors": ["full", "random"],
    "fractions": [0.5],
    "defenses": ["sft", "vaccine"],
    "attacks": [{"kind": "mix", "samples": 20}],
    "tasks": [{"name": "reviews", "train": "world:task:40", "test": "world:task-test:10"}],
    "judges": ["keyword"],
    "attack": {"harmful": "world:attack:8", "snapshots": [1]},
    "evaluate": {"prompts": "world:prompts:5", "max_new_tokens": 4},
    "device": "cpu",
    "quiet": True,
}
"""Four cells; with real stages each of which trains two steps see `FEW_STEPS`."""

FEW_STEPS: dict[str, Any] = {
    "align": {"train": {"max_steps": 2, "per_device_train_batch_size": 4}},
    "attack": {"harmful": "world:attack:8", "snapshots": [1], "train": {"max_steps": 2, "learning_rate": 1e-3}},
}

TIMES = ("selection_seconds", "alignment_seconds", "attack_seconds", "repair_seconds", "alignment_peak_memory")
"""Columns that differ from run to run."""


def write_grid(path: Path, **changes: Any) -> Path:
    """Writes `SMALL` with other keys."""
    path.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
    return path


def results(root: Path) -> pd.DataFrame:
    """The table without times."""
    return pd.read_parquet(root / "results.parquet").drop(columns=list(TIMES))
