"""One process and two give the same ranking."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.support import village


OPTIONS = {"name": "pharmacist", "form": "both", "twin_steps": 3, "batch_size": 4, "r": 2, "folds": 2}
SCRIPT = """
import json, sys
from pharmacist.pipeline.curate import CurateOptions, curate
curate(CurateOptions(**json.loads(sys.argv[1])))
"""


IN_MEMORY = """
import json, sys
import pharmacist
from pharmacist.core.env import process_index
options = json.loads(sys.argv[1])
folder = options.pop("folder")
for call in range(2):
    ranking = pharmacist.rank(**options)
    assert len(ranking.select(0.5)) == len(ranking) // 2
    ranking.table.to_parquet(f"{folder}/table-{process_index()}-{call}.parquet")
"""


def launch(script: str, root: Path, options: dict, processes: int) -> None:
    (root / "run.py").write_text(script)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(root / "run.py"), json.dumps(options)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]


def given(model: Path, root: Path, selector: dict) -> dict:
    files = {"pool": village.pool(40), **village.references()}
    for name, rows in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": str(model), "selector": selector} | {name: str(root / f"{name}.jsonl") for name in files}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        OPTIONS | {"solver": "gradient", "cotrain": 1.0, "form": "bilevel"},
        {"name": "toxic-lora", "steps": 3, "toxic_steps": 3, "batch_size": 4, "r": 2, "lookahead": 0.01},
    ],
)
def test_two_processes_rank_like_one(model, tmp_path, options):
    common, tables = given(model, tmp_path, options), []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        launch(SCRIPT, tmp_path, common | {"output_dir": str(output)}, processes)
        tables.append(pd.read_parquet(output / "scores.parquet"))
    # More than the promised rank correlation: jobs and chunks are shared out whole, so nothing is summed differently.
    for column in tables[0]:
        assert np.array_equal(tables[0][column], tables[1][column]), column


@pytest.mark.slow
@pytest.mark.parametrize("output_dir", [None, "kept"])
def test_two_processes_get_the_same_ranking_in_memory(model, tmp_path, output_dir):
    selector = {"name": "less", "epochs": 1, "batch_size": 4, "r": 2}
    options = given(model, tmp_path, selector) | {"folder": str(tmp_path)}
    options["output_dir"] = output_dir and str(tmp_path / output_dir)
    launch(IN_MEMORY, tmp_path, options, 2)
    first, *others = (pd.read_parquet(path) for path in sorted(tmp_path.glob("table-*.parquet")))
    assert len(others) == 3
    for other in others:
        pd.testing.assert_frame_equal(first, other)
