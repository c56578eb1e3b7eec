"""Two processes (gloo) compute the gradient that one computes from the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ddp_finetuning
from tests.support.ddp import gradients
from tests.support.defense_cases import FINETUNING, NAMES
from tests.support.tiny import save_tiny_model


def launched(module: str, model: Path, folder: Path, *more: str) -> list[dict[str, torch.Tensor]]:
    """What each of two processes has found."""
    # Not `accelerate launch --cpu`, which starts a single process, however many it is asked for.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, module, str(model), str(folder), *more],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [load_file(folder / f"rank{n}.safetensors") for n in range(2)]


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    two = launched("tests.support.ddp", model, tmp_path)
    one = gradients(model, tmp_path / "one", 8)
    assert two[0].keys() == two[1].keys() == one.keys()
    worst = dict.fromkeys(["sft", *NAMES, "metrics"], 0.0)
    for key, expected in one.items():
        name = key.split(".")[0]
        assert torch.equal(two[0][key], two[1][key]), key
        worst[name] = max(worst[name], float((two[0][key] - expected).abs().max()))
    assert max(worst.values()) < 1e-6, worst
    assert {key.split(".")[1] for key in one if key.startswith("metrics.")} == {*NAMES}
    # What would be noticed: every defense adds something, and the second step is another one.
    for name in NAMES:
        for accumulation in (1, 2):
            own = {key: value for key, value in one.items() if key.startswith(f"{name}.{accumulation}.0.")}
            plain = [one["sft" + key.removeprefix(name)] for key in own]
            later = [one.get(key.replace(f".{accumulation}.0.", f".{accumulation}.1."), own[key]) for key in own]
            assert max(float((a - b).abs().max()) for a, b in zip(own.values(), plain, strict=True)) > 1e-3, name
            assert max(float((a - b).abs().max()) for a, b in zip(own.values(), later, strict=True)) > 1e-3, name


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_fine_tune_as_one_does(accumulation: int, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    two = launched("tests.support.ddp_finetuning", model, tmp_path, str(accumulation))
    one = ddp_finetuning.gradients(model, tmp_path / "one", 8, accumulation)
    assert two[0].keys() == two[1].keys() == one.keys()
    worst = dict.fromkeys(["sft", *FINETUNING, *ddp_finetuning.FISHER], 0.0)
    for key, expected in one.items():
        assert torch.equal(two[0][key], two[1][key]), key
        name = key.split(".")[0]
        worst[name] = max(worst[name], float((two[0][key] - expected).abs().max()))
    assert max(worst.values()) < 1e-6, worst
    # What would be noticed: every defense acts by the third step, and no step is another's.
    for name in FINETUNING:
        third = f"{name}.{accumulation}.2."
        own = {key.removeprefix(third): value for key, value in one.items() if key.startswith(third)}
        for other in (f"sft.{accumulation}.2.", f"{name}.{accumulation}.1."):
            assert max(float((value - one[other + key]).abs().max()) for key, value in own.items()) > 1e-3, other
    for name in ddp_finetuning.FISHER:
        assert max(float(value.max()) for key, value in one.items() if key.startswith(name + ".")) > 1e-3, name
