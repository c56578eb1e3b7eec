"""Two processes (gloo) compute the gradient that one computes from the same global batch, and fail together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ddp_diverging
from tests.support.ddp_gradients import STRATEGIES, first_gradients


def launch(module: str, model: Path, output: Path) -> None:
    # Not `accelerate launch --cpu`, which starts a single process, however many it is asked for.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += [f"tests.support.{module}", str(model), str(output)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(model: Path, tmp_path: Path) -> None:
    one = first_gradients(model, tmp_path / "one", 8)
    launch("ddp_gradients", model, tmp_path)
    two = [load_file(tmp_path / f"rank{n}.safetensors") for n in range(2)]
    compared = set()
    for key, expected in one.items():
        parts = [own[key] for own in two]
        if key.endswith(".rows"):
            # The same rows, half of them on each process, with other lengths there.
            assert sorted(torch.cat(parts).tolist()) == sorted(expected.tolist())
            assert len(parts[0]) == len(parts[1]) == 4
            continue
        assert torch.equal(*parts), key
        assert float((parts[0] - expected).abs().max()) < 1e-6, key
        assert float(expected.abs().max()) > 1e-4, key
        compared.add(key.split(".")[0])
    assert compared == STRATEGIES.keys()
    # What would be noticed: the strategies do add something.
    names = [key.removeprefix("sft.1.") for key in one if key.startswith("sft.1.") and key.endswith("weight")]
    for name in ("carried", "twice", "sharp"):
        assert max(float((one[f"{name}.1.{k}"] - one[f"sft.1.{k}"]).abs().max()) for k in names) > 1e-2


def test_both_processes_stop_where_one_diverges(model: Path, tmp_path: Path) -> None:
    launch("ddp_diverging", model, tmp_path)
    first, second = (json.loads((tmp_path / f"rank{n}.json").read_text()) for n in range(2))
    assert [*first] == [*second] == [strategy.__name__ for strategy in ddp_diverging.STRATEGIES]
    for name, found in first.items():
        assert found["message"] == second[name]["message"]
        assert found["then"] == second[name]["then"] == "together"
    # The rows are those of the process that met it.
    assert f"(rows {', '.join(map(str, second['Main']['rows']))})" in first["Main"]["message"]
    assert not {*first["Main"]["rows"]} & {*second["Main"]["rows"]}
