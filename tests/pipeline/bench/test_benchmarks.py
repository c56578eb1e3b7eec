"""The grids in ``benchmarks/`` can be run: each expands to its graph, on files as its head says."""

from pathlib import Path

import pytest

from pharmacist.cli.main import main
from pharmacist.worlds import BASE_MODEL, SETS, World
from tests.support.scripts import ROOT
from tests.support.world_files import write_rows


GRIDS = sorted(ROOT.glob("benchmarks/*.yaml"))


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that grids on data of a user's own name."""
    folder, world = tmp_path / "data", World(0)
    folder.mkdir()
    for name, own in [("pool", world.pool(100)[0]), *((name, world.rows(name)) for name in SETS)]:
        write_rows(folder / f"{name}.jsonl", own)
    pairs = zip(world.rows("safe", 4), world.rows("harmful", 4), strict=True)
    rows = [{"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]} for a, b in pairs]
    write_rows(folder / "margin.jsonl", rows)
    for name in ("MODEL", "proxy"):
        (folder / name).symlink_to(BASE_MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_some() -> None:
    assert len(GRIDS) >= 5


@pytest.mark.parametrize("grid", GRIDS, ids=lambda path: path.stem)
def test_a_grid_expands(grid: Path, own_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--config", str(grid), "--dry-run", "--output-dir", str(own_files / "out")]) == 0
    assert "cells such as" in capsys.readouterr().err
    assert not (own_files / "out").exists()
