"""Weights of rows, from the ranking to the training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from pharmacist.cli.main import main
from pharmacist.core.manifest import read_manifest
from pharmacist.worlds import BASE_MODEL, World
from tests.support.tiny import save_tiny_model
from tests.support.world_files import write_rows


SGD = [
    "--train.max_steps",
    "2",
    "--train.optim",
    "sgd",
    "--train.learning_rate",
    "1",
    "--train.max_grad_norm",
    "0",
    "--lora.r",
    "2",
    "--device",
    "cpu",
    "--quiet",
]


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished curate with weights."""
    folder, world = tmp_path_factory.mktemp("weights"), World(3)
    files = {
        name: write_rows(folder / f"{name}.jsonl", rows)
        for name, rows in {
            "pool": world.rows("safe", 30)[:20] + world.rows("utility", 10),
            "safe": World(4).rows("safe", 12),
            "harmful": World(4).rows("harmful", 12),
        }.items()
    }
    words = [
        "curate",
        "--pool",
        files["pool"],
        "--safe",
        files["safe"],
        "--harmful",
        files["harmful"],
        "--model",
        str(BASE_MODEL),
        "--selector",
        "toxic-lora",
        "--selector.steps",
        "3",
        "--selector.toxic_steps",
        "3",
        "--top",
        "0.4",
        "--output-dir",
        str(folder / "core"),
        "--device",
        "cpu",
        "--quiet",
    ]
    assert main(words) == 0
    return folder


def aligned(data: Path, output: Path, *more: str, batch: int = 4, accumulation: int = 1) -> dict[str, torch.Tensor]:
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    given = [word for name, size in sizes.items() for word in (f"--train.{name}", str(size))]
    words = ["align", "--data", str(data), "--model", str(BASE_MODEL), "--output-dir", str(output)]
    assert main([*words, *SGD, *given, *more]) == 0
    return load_file(output / "adapter" / "adapter_model.safetensors")


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_scores_hold_weights_with_mean_1_over_the_selected_rows(ranked: Path) -> None:
    scores = pd.read_parquet(ranked / "core/scores.parquet")
    assert scores["weight"].dtype == np.float64 and (scores["weight"] >= 0).all()
    assert scores.loc[scores["selected"], "weight"].mean() == pytest.approx(1.0)
    pool = [json.loads(line) for line in (ranked / "pool.jsonl").open()]
    selected = [json.loads(line) for line in (ranked / "core/selected.jsonl").open()]
    assert selected == [pool[row] for row in scores.loc[scores["selected"], "row"]], "and gains no column"


def test_align_trains_with_them_whatever_the_accumulation(ranked: Path, tmp_path: Path) -> None:
    data, weights = ranked / "core/selected.jsonl", ["--weights", str(ranked / "core/scores.parquet")]
    plain = aligned(data, tmp_path / "plain")
    weighted = aligned(data, tmp_path / "weighted", *weights)
    assert far(plain, weighted) > 1e-3
    apart = aligned(data, tmp_path / "apart", *weights, batch=1, accumulation=4)
    assert far(weighted, apart) < 1e-5
    manifest = read_manifest(tmp_path / "weighted")
    assert len(manifest.inputs["weights"]) == 64
    assert "row weights" in (tmp_path / "weighted/README.md").read_text()
    # Weights of one's own, in any unit: all alike they are none.
    own = tmp_path / "own.parquet"
    count = len(data.read_text().splitlines())
    pd.DataFrame({"weight": np.full(count, 7)}).to_parquet(own)
    assert far(plain, aligned(data, tmp_path / "ones", "--weights", str(own))) < 1e-5
    # The row's number decides, not the line of the file.
    scores = pd.read_parquet(ranked / "core/scores.parquet").sample(frac=1, random_state=0)
    scores.to_parquet(own)
    assert far(weighted, aligned(data, tmp_path / "mixed", "--weights", str(own))) < 1e-6


def test_a_row_of_weight_0_teaches_nothing(ranked: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (ranked / "pool.jsonl").open()][:8]
    pd.DataFrame({"weight": [0.0, 1.0] * 4}).to_parquet(tmp_path / "w.parquet")
    found = []
    # As many tokens either way, which the loss is divided by.
    for number, completion in enumerate(("a cake of bread", "a bread of cake")):
        changed = [{**row, "completion": completion} if i % 2 == 0 else row for i, row in enumerate(rows)]
        data = Path(write_rows(tmp_path / f"{number}.jsonl", changed))
        found.append(aligned(data, tmp_path / str(number), "--weights", str(tmp_path / "w.parquet"), batch=8))
        found.append(aligned(data, tmp_path / f"{number}-plain", batch=8))
    assert far(found[0], found[2]) < 1e-6
    assert far(found[1], found[3]) > 1e-4, "unweighted they do teach"


def test_a_line_per_row_of_the_file_also_where_rows_are_chosen(
    ranked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (ranked / "pool.jsonl").open()][:8]
    data = Path(write_rows(tmp_path / "data.jsonl", [row | {"part": i % 2} for i, row in enumerate(rows)]))
    found = []
    # Weights of rows that are left out have no say.
    for name, left_out in (("a", [1.0, 1.0, 5.0, 5.0]), ("b", [0.0, 7.0, 90.0, 1.0]), ("c", [3.0, 3.0, 3.0, 3.0])):
        weight = np.empty(8)
        weight[0::2], weight[1::2] = left_out, [0.0, 1.0, 2.0, 9.0] if name != "c" else [9.0, 2.0, 1.0, 0.0]
        file = tmp_path / f"{name}.parquet"
        pd.DataFrame({"weight": weight}).to_parquet(file)
        found.append(aligned(data, tmp_path / name, "--weights", str(file), "--where", "part=1"))
    assert far(found[0], found[1]) == 0 and far(found[0], found[2]) > 1e-4
    pd.DataFrame({"weight": np.ones(4)}).to_parquet(tmp_path / "few.parquet")
    pd.DataFrame({"weight": [1.0, 0.0] * 4}).to_parquet(tmp_path / "zero.parquet")
    capsys.readouterr()
    words = ["align", "--data", str(data), "--model", str(BASE_MODEL), "--where", "part=1", *SGD]
    assert main([*words, "--weights", str(tmp_path / "few.parquet"), "--output-dir", str(tmp_path / "d")]) == 2
    assert "has 4 rows, but --data has 8" in capsys.readouterr().err
    assert main([*words, "--weights", str(tmp_path / "zero.parquet"), "--output-dir", str(tmp_path / "d")]) == 2
    assert "all weights are 0" in capsys.readouterr().err


def test_a_pool_that_was_not_ranked_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, object]] = [row | {"part": i % 2} for i, row in enumerate(World(3).rows("safe", 12))]
    pool = write_rows(tmp_path / "pool.jsonl", [*rows[:3], {"prompt": "no answer", "part": 1}, *rows[3:]])
    scores, chosen = tmp_path / "core/scores.parquet", ["--where", "part=1", "--on-bad-row", "skip"]
    words = ["curate", "--pool", pool, "--selector", "length", *chosen, "--output-dir", str(tmp_path / "core")]
    assert main([*words, "--quiet"]) == 0
    table = pd.read_parquet(scores)
    assert table["row"].tolist() == [1, 4, 6, 8, 10, 12]
    table.assign(weight=[0.0, 1.0, 2.0, 3.0, 0.0, 0.0]).to_parquet(scores)
    own = np.zeros(13)
    own[[4, 6, 8]] = [1.0, 2.0, 3.0]
    pd.DataFrame({"weight": own}).to_parquet(tmp_path / "own.parquet")
    given = [aligned(Path(pool), tmp_path / "a", "--weights", str(scores), *chosen)]
    given.append(aligned(Path(pool), tmp_path / "b", "--weights", str(tmp_path / "own.parquet"), *chosen))
    assert far(*given) == 0
    capsys.readouterr()
    words = ["align", "--data", pool, "--model", str(BASE_MODEL), *SGD, "--weights", str(scores)]
    assert main([*words, "--on-bad-row", "skip", "--output-dir", str(tmp_path / "c")]) == 2
    error = capsys.readouterr().err
    assert "has no weight for rows 0, 2, 5, 7, 9, 11 of --data; choose the rows that were ranked" in error


def test_every_alignment_defense_takes_them(ranked: Path, tmp_path: Path) -> None:
    data, weights = ranked / "core/selected.jsonl", ["--weights", str(ranked / "core/scores.parquet")]
    for defense in (["vaccine"], ["booster", "--harmful", str(ranked / "harmful.jsonl")]):
        aligned(data, tmp_path / defense[0], *weights, "--defense", *defense)
        log = [json.loads(line) for line in (tmp_path / defense[0] / "log.jsonl").open()]
        assert all(np.isfinite(line["loss"]) for line in log)


def test_weights_that_cannot_be_are_told_in_one_line(
    ranked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, scores = ranked / "core/selected.jsonl", ranked / "core/scores.parquet"
    rows = [json.loads(line) for line in data.open()]
    other = write_rows(tmp_path / "other.jsonl", rows[::-1])
    fewer = write_rows(tmp_path / "fewer.jsonl", rows[:-1])
    tables = {
        "none": {"score": [1.0] * len(rows)},
        "negative": {"weight": [1.0] * (len(rows) - 1) + [-1.0]},
        "missing": {"weight": [1.0] * (len(rows) - 1) + [None]},
        "zero": {"weight": [0.0] * len(rows)},
        "words": {"weight": ["much"] * len(rows)},
    }
    for name, table in tables.items():
        pd.DataFrame(table).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    cases = [
        (data, tmp_path / "none.parquet", "no column 'weight'"),
        (data, tmp_path / "negative.parquet", "not a number"),
        (data, tmp_path / "missing.parquet", "not a number"),
        (data, tmp_path / "zero.parquet", "all weights are 0"),
        (data, tmp_path / "words.parquet", "not a number"),
        (data, tmp_path / "text.parquet", "not a readable Parquet file"),
        (data, tmp_path / "gone.parquet", "no such file"),
        (fewer, scores, f"has {len(rows) - 1}"),
        (other, scores, "belongs to other rows"),
    ]
    model = save_tiny_model(tmp_path / "tiny")
    capsys.readouterr()
    for place, weights, message in cases:
        words = ["align", "--data", str(place), "--model", str(model), "--weights", str(weights), *SGD]
        assert main([*words, "--output-dir", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not [*(tmp_path / "out").glob("*")], "bad input leaves no run behind"
    # Away from its run a file of as many rows is believed.
    shutil.copy(scores, tmp_path / "scores.parquet")
    aligned(Path(other), tmp_path / "believed", "--weights", str(tmp_path / "scores.parquet"))
