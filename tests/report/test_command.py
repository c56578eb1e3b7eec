"""The command `report`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pharmacist.cli.main import main
from pharmacist.core.files import read_json, write_json
from pharmacist.worlds import World
from tests.support.pages import write_demo


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished curate with a refused row and columns of other names."""
    folder, world = tmp_path_factory.mktemp("ranked"), World(1)
    pool = [{"question": row["prompt"], "answer": row["completion"]} for row in world.pool(40)[0]]
    sets: dict[str, list[Any]] = {"pool": [*pool[:5], {"question": "no answer"}, *pool[5:]]}
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sets["pool"]))
    assert (
        main(
            [
                "curate",
                "--pool",
                str(folder / "pool.jsonl"),
                "--columns",
                "prompt=question,completion=answer",
                "--selector",
                "random",
                "--on-bad-row",
                "skip",
                "--output-dir",
                str(folder / "out"),
                "--quiet",
            ]
        )
        == 0
    )
    return folder


def test_a_ranking_is_written_again(ranked: Path) -> None:
    page = ranked / "out/report.html"
    before = page.read_bytes()
    page.unlink()
    assert main(["report", "--run", str(ranked / "out"), "--quiet"]) == 0
    assert page.read_bytes() == before
    assert sorted(path.name for path in (ranked / "out").iterdir() if path.name.startswith(".")) == []


def test_a_pool_that_was_moved_with_the_ranking(ranked: Path, tmp_path: Path) -> None:
    ranked.rename(tmp_path / "moved")
    try:
        (tmp_path / "moved/out/report.html").unlink()
        assert main(["report", str(tmp_path / "moved/out")]) == 0
        assert (tmp_path / "moved/out/report.html").is_file()
    finally:
        (tmp_path / "moved").rename(ranked)


def test_a_pool_that_is_not_what_it_was(ranked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool, page = ranked / "pool.jsonl", ranked / "out/report.html"
    content, before = pool.read_bytes(), page.read_bytes()
    try:
        pool.write_bytes(content + b'{"question": "one", "answer": "more"}\n')
        assert main(["report", "--run", str(ranked / "out")]) == 2
        assert "has changed since it was ranked; restore it" in capsys.readouterr().err
        pool.unlink()
        assert main(["report", "--run", str(ranked / "out")]) == 2
        error = capsys.readouterr().err
        assert f"the pool {pool} is missing; restore it" in error and error.count("\n") == 1
    finally:
        pool.write_bytes(content)
    assert page.read_bytes() == before


def test_a_demo_is_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pharmacist.report.html import render_demo

    render_demo(tmp_path, *write_demo(tmp_path), categories=[[row.category] for row in World(0).labelled(120)])
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    assert main(["report", "--run", str(tmp_path), "--quiet"]) == 0
    assert (tmp_path / "report.html").read_bytes() == before, "with the planted labels and categories"
    lines = (tmp_path / "data/pool.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data/pool.jsonl").write_text("".join(lines[::-1]))
    assert main(["report", "--run", str(tmp_path)]) == 2
    assert "data/pool.jsonl has changed" in capsys.readouterr().err
    (tmp_path / "demo.json").unlink()
    assert main(["report", "--run", str(tmp_path)]) == 2
    assert "demo.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "started"}, "is not finished; run the same command again"),
        ({"stage": "align"}, "a run of 'align', which has no HTML report; give the folder of a curate or demo"),
    ],
)
def test_folders_without_a_page(
    ranked: Path, tmp_path: Path, change: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "manifest.json", read_json(ranked / "out/manifest.json") | change)
    assert main(["report", "--run", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert main(["report", "--run", str(tmp_path / "nowhere")]) == 2
    assert "no manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_ranking_is_compared_with_nothing(ranked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(ranked / "out"), "--baseline", "less"]) == 2
    assert "--baseline less: only selectors of a bench are compared" in " ".join(capsys.readouterr().err.split())


def test_scores_that_cannot_be_read(ranked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "manifest.json", read_json(ranked / "out/manifest.json"))
    assert main(["report", "--run", str(tmp_path)]) == 2
    (tmp_path / "scores.parquet").write_bytes(b"nothing")
    assert main(["report", "--run", str(tmp_path)]) == 2
    gone, changed = capsys.readouterr().err.splitlines()
    assert "scores.parquet: cannot be read" in gone and "scores.parquet: is damaged, or was changed" in changed
    manifest = read_json(ranked / "out/manifest.json")  # as earlier versions wrote it, without the files' hashes
    write_json(tmp_path / "manifest.json", manifest | {"files": {}})
    assert main(["report", "--run", str(tmp_path)]) == 2
    pd.DataFrame({"row": [1]}).to_parquet(tmp_path / "scores.parquet")
    assert main(["report", "--run", str(tmp_path)]) == 2
    write_json(tmp_path / "manifest.json", manifest | {"files": {}, "config": {}})
    assert main(["report", "--run", str(tmp_path)]) == 2
    unread, other, lacking = capsys.readouterr().err.splitlines()
    assert "scores.parquet: cannot be read" in unread and "scores.parquet: has no column score" in other
    assert "manifest.json lacks the option pool" in lacking


def test_pages_need_no_torch(ranked: Path, tmp_path: Path) -> None:
    write_demo(tmp_path)
    code = (
        "import sys; from pharmacist.cli.main import main; "
        f"assert main(['report', '--run', {str(ranked / 'out')!r}, '--quiet']) == 0; "
        f"assert main(['report', '--run', {str(tmp_path)!r}, '--quiet']) == 0; "
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)), 'plotly' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[-2] == "[] True"
