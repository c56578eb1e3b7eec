"""A synthetic table of results of a benchmark, with effects of chosen size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pharmacist.core.manifest import RunManifest


STEPS = [0, 8, 64]


def results(
    effects: Mapping[str, float],
    *,
    defenses: Sequence[str] = ("sft", "booster"),
    seeds: int = 5,
    noise: float = 1.0,
    fractions: Sequence[float] = (0.3,),
    **axes: Sequence[Any],
) -> pd.DataFrame:
    """One row per cell and seed.

    Args:
        effects: Selector -> by how much its harmful score differs from that of the full pool, which is in any case.
        defenses: Alignment-stage defenses.
        seeds: Their number.
        noise: Standard deviation of what differs between seeds and selectors.
        fractions: Of the selectors.
        **axes: Values of further axes.
    """
    rng = np.random.default_rng(0)
    given = {
        "model": ["m"],
        "pool": ["p"],
        "attack": ["mix"],
        "post_alignment_defense": ["none"],
        "task": ["t"],
        "judge": ["j"],
        **axes,
    }
    settings: list[dict[str, Any]] = [{}]
    for axis, names in given.items():
        settings = [setting | {axis: name} for setting in settings for name in names]
    rows = []
    for setting in settings:
        for defense in defenses:
            for seed in range(seeds):
                world = rng.normal(60, 10)  # what seeds share is what pairing takes away
                for selector, effect in {"full": 0.0, **effects}.items():
                    for fraction in (1.0,) if selector == "full" else fractions:
                        score = world + effect + rng.normal(0, noise)
                        rows.append(
                            {
                                "cell": "c",
                                **setting,
                                "selector": selector,
                                "fraction": fraction,
                                "defense": defense,
                                "poison_ratio": 0.1,
                                "samples": 100,
                                "seed": seed,
                                "harmful_score": score,
                                "harmful_score_over_attack": score / 2,
                                "attack_steps": STEPS,
                                "harmful_scores": [1.0, score / 2, score],
                                "fine_tune_accuracy": 90 + rng.normal(0, noise),
                                "over_refusal": float("nan"),
                                "alignment_seconds": 100 * fraction + rng.normal(0, 0.1),
                                "selection_seconds": 0.0 if selector == "full" else 20.0,
                                "device": "cpu",
                            }
                        )
    return pd.DataFrame(rows)


def write_bench(folder: Path, table: pd.DataFrame, **about: Any) -> None:
    """A benchmark's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / "results.parquet", index=False)
    manifest: dict[str, Any] = {
        "stage": "bench",
        "status": "success",
        "key": "k",
        "config": {"seed": 0},
        "inputs": {},
        "counts": {"cells": len(table), "results": len(table), "stages": 40, "finished": 40, "failed": 0},
        "created": "2026-01-02T03:04:05+00:00",
        "extra": {"axes": {}, "failed": []},
    }
    RunManifest(**(manifest | about)).write(folder)
