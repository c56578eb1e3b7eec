"""Stages that cost nothing, in the place of the real ones: each writes down that it ran, and makes up its metrics.

Like real ones they take possession of their folder, keep partial state from which they go on, and write their manifest
last. What they find follows from their inputs' content alone.
"""

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pharmacist.core.files import write_text
from pharmacist.core.hashing import sha256_json
from pharmacist.core.manifest import read_manifest
from pharmacist.core.rundir import RunDir, as_json, identifying
from pharmacist.pipeline.bench.stages import KINDS


STEPS = 4
SECONDS = "PHARMACIST_FAKE_SECONDS"
BROKEN = "PHARMACIST_FAKE_BROKEN"
PARTIAL = "PHARMACIST_FAKE_PARTIAL"
LOG = "PHARMACIST_FAKE_LOG"
OTHER = "PHARMACIST_FAKE_OTHER"
"""Makes other results of the same inputs, as another machine may."""


def content(folder: str) -> str:
    """What stands for a fake model or a fake ranking."""
    for place in (Path(folder), Path(folder).parent, Path(folder).parents[1]):
        if (place / "result.txt").is_file():
            return (place / "result.txt").read_text() + str(Path(folder).relative_to(place))
    return "-"


def run_fake(kind: str, options: Any) -> None:
    known = KINDS[kind]
    inputs = {
        name: content(value)
        for name in (*known.files, *known.models)
        if isinstance(value := getattr(options, name), str) and "/stages/" in value
    }
    run = RunDir.open(options, stage=kind, version=1, inputs=inputs)
    try:
        if run.complete:
            return
        log("began", kind, run.root)
        if os.environ.get(BROKEN) and os.environ[BROKEN] in str(as_json(options)):
            raise ValueError("this stage is broken")
        state = run.work("train", "step.txt")
        state.parent.mkdir(parents=True, exist_ok=True)
        first = int(state.read_text()) if state.is_file() else 0
        with run.phase("train") as phase, run.phase("repair"):
            for step in range(first, STEPS):
                time.sleep(float(os.environ.get(SECONDS, "0")))
                write_text(state, str(step + 1))
            phase.tokens = 1000
            phase.extra["peak_memory"] = 5.0
        own = {name: value for name, value in identifying(as_json(options)).items() if name not in inputs}
        own = {name: value for name, value in own.items() if name not in (*known.files, *known.models)}
        result = sha256_json([kind, own, inputs, os.environ.get(OTHER, "")])
        write_text(run.path("result.txt"), result)
        write_text(run.path("selected.jsonl"), "{}\n")
        write_text(run.path("items.jsonl"), "")
        value = int(result[:4], 16) / 655.36
        names = ("harmful_score", "hs_plus", "fine_tune_accuracy", "win_rate", "over_refusal", "lm_eval_arc_easy")
        metrics: dict[str, Any] = {"steps": 8} if kind == "attack" else {}
        metrics |= {name: {"value": value, "n": 10} for name in names if kind == "evaluate"}
        failed = kind == "evaluate" and os.environ.get(PARTIAL, "no model") in options.model
        counts = {"ranked": 10, "trained": 3}
        run.finish(outputs=["result.txt"], counts=counts, metrics=metrics, partial=failed)
        log("ended", kind, run.root)
    finally:
        run.close()


def log(event: str, kind: str, folder: Path) -> None:
    if path := os.environ.get(LOG):
        with open(path, "a") as file:
            file.write(f"{event} {kind} {folder.name}\n")


def __getattr__(kind: str) -> Callable[[Any], None]:
    """The fake of a kind of stages, as a function of this module by which a stage names it."""
    if kind not in KINDS:
        raise AttributeError(kind)
    return partial(run_fake, kind)


class Stages:
    """What the fake stages did."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def began(self) -> Counter[str]:
        """How many stages of each kind began since this was asked last."""
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.path.unlink(missing_ok=True)
        return Counter(line.split()[1] for line in lines if line.startswith("began"))


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    """Puts the fakes in the place of the real stages, for as long as a test runs."""
    install(monkeypatch.setitem)
    monkeypatch.setenv(LOG, str(tmp_path / "stages.log"))
    monkeypatch.setattr("pharmacist.pipeline.bench.command.bench_page", lambda *_: None)  # it has tests of its own
    return Stages(tmp_path / "stages.log")


def install(setitem: Any = lambda table, key, value: table.__setitem__(key, value)) -> None:
    for kind, known in list(KINDS.items()):
        setitem(KINDS, kind, dataclasses.replace(known, run=f"{__name__}:{kind}", version=1))


def finished(root: Path) -> set[str]:
    """Names of the stages whose results lie in a benchmark's folder."""
    return {path.parent.name for path in root.glob("stages/*/manifest.json") if read_manifest(path.parent).finished}
