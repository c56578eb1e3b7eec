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


def curated(root: Path, options: dict, processes: int) -> pd.DataFrame:
    (root / "run.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(root / "run.py"), json.dumps(options)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]
    return pd.read_parquet(Path(options["output_dir"]) / "scores.parquet")


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
    files = {"pool": village.pool(40), **village.references()}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {name: str(tmp_path / f"{name}.jsonl") for name in files}
    common = {"model": str(model), "selector": options, **given}
    tables = [curated(tmp_path, common | {"output_dir": str(tmp_path / f"{n}")}, n) for n in (1, 2)]
    # More than the promised rank correlation: jobs and chunks are shared out whole, so nothing is summed differently.
    for column in tables[0]:
        assert np.array_equal(tables[0][column], tables[1][column]), column
