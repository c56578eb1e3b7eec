"""Two processes (gloo) compute the gradient that one computes from the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.defenses.cases import NAMES
from tests.defenses.ddp import gradients
from tests.tiny import save_tiny_model


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    # Not `accelerate launch --cpu`, which starts a single process, however many it is asked for.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["tests.defenses.ddp", str(model), str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    two = [load_file(tmp_path / f"rank{n}.safetensors") for n in range(2)]
    one = gradients(model, tmp_path / "one", 8)
    assert two[0].keys() == two[1].keys() == one.keys()
    worst = dict.fromkeys(["sft", *NAMES], 0.0)
    for key, expected in one.items():
        name = key.split(".")[0]
        assert torch.equal(two[0][key], two[1][key]), key
        worst[name] = max(worst[name], float((two[0][key] - expected).abs().max()))
    assert max(worst.values()) < 1e-6, worst
    # What would be noticed: every defense adds something, and the second step is another one.
    for name in NAMES:
        for accumulation in (1, 2):
            own = {key: value for key, value in one.items() if key.startswith(f"{name}.{accumulation}.0.")}
            plain = [one["sft" + key.removeprefix(name)] for key in own]
            later = [one.get(key.replace(f".{accumulation}.0.", f".{accumulation}.1."), own[key]) for key in own]
            assert max(float((a - b).abs().max()) for a, b in zip(own.values(), plain, strict=True)) > 1e-3, name
            assert max(float((a - b).abs().max()) for a, b in zip(own.values(), later, strict=True)) > 1e-3, name
