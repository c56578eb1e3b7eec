"""The benchmarks on planted faults: what they keep of earlier results, and what they say of labels."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from pharmacist import CurateOptions
from pharmacist.core.errors import DataError
from tests.support.scripts import load_script


@pytest.fixture
def hard_pools(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("benchmarks/hard_pools.py", monkeypatch)


@pytest.fixture
def selection_cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("benchmarks/selection_cost.py", monkeypatch)


def test_a_run_of_some_selectors_keeps_the_results_of_the_others(
    hard_pools: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def curate(options: CurateOptions) -> None:
        folder = Path(options.output_dir)
        folder.mkdir(exist_ok=True)
        pd.DataFrame({"score": np.random.default_rng(0).random(600)}).to_parquet(folder / "scores.parquet")

    monkeypatch.setattr(hard_pools, "curate", curate)
    hard_pools.main([str(tmp_path), "--seeds", "2", "--only", "dsir", "ifd"])
    first = json.loads((tmp_path / "hard_pools.json").read_text())
    hard_pools.main([str(tmp_path), "--seeds", "1", "--only", "ifd", "seal"])
    found = json.loads((tmp_path / "hard_pools.json").read_text())
    assert {name: len(values) for name, values in found.items()} == {"dsir": 2, "ifd": 1, "seal": 1}
    assert found["dsir"] == first["dsir"]


def test_no_seed_is_no_run(hard_pools: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hard_pools.main([str(tmp_path), "--seeds", "0"])
    assert "--seeds 0: must be at least 1" in capsys.readouterr().err


def test_a_pool_without_some_kinds_of_fault_is_measured(selection_cost: ModuleType) -> None:
    labels = pd.Series(["good"] * 6 + ["noisy"] * 4)
    table = pd.DataFrame({"reason": ["critical"] * 8 + ["low_quality"] * 2})
    quality = selection_cost.ranking_quality(np.arange(10)[::-1], labels)
    reasons = selection_cost.reason_quality(table, labels)
    assert quality == {"auc": 1, "purity": 1, "noisy": 1}
    assert reasons == {"reason": 0.8, "reason by label": {"good": 1, "noisy": 0.5}}
    assert selection_cost.table_line("x", quality, ["0.8"]) == "| x | 1.000 | 1.000 |  |  | 1.000 |  | 0.8 |"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "cannot be read"),
        ("{}", "is no JSON list of labels"),
        ('["good", "fine"]', "unknown label 'fine'; known are good, duplicate"),
        ('["good"]', "1 labels for 2 rows"),
        ('["good", "duplicate"]', "without both good and bad rows"),
    ],
)
def test_labels_that_do_not_fit(selection_cost: ModuleType, tmp_path: Path, labels: str | None, message: str) -> None:
    (tmp_path / "pool.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    if labels is not None:
        (tmp_path / "labels.json").write_text(labels)
    with pytest.raises(DataError, match=message):
        selection_cost.read_labels(str(tmp_path / "labels.json"), str(tmp_path / "pool.jsonl"))
