"""The command `label`: a person's labels of the rows of a ranking, asked for in a terminal."""

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pandas as pd
import pytest

from pharmacist.cli.main import main
from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import read_json, write_json
from pharmacist.pipeline.label import LabelOptions, label
from pharmacist.pipeline.ranking import Ranking
from pharmacist.selectors.labels import read_labels
from tests.support.world_files import curate_words, write_world


EVIL = "\x1b[2J [bold]a[/bold]\nrow 1, 9 of 9 labelled: \u202e end"
LEXICAL = ("--selector.form", "evidence", "--selector.readers", "lexical", "--quiet")


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ranking with 6 rows to label, to be read only."""
    folder = tmp_path_factory.mktemp("ranked")
    files = write_world(folder)
    rows = [json.loads(line) for line in Path(files["pool"]).open()]
    for row in rows[:40]:
        row["completion"] += f"\n{EVIL}"
    Path(files["pool"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(curate_words(files, folder / "out", *LEXICAL, "--to-label", "6", model=None)) == 0
    return folder / "out"


def asked(run: Path) -> list[int]:
    return [json.loads(line)["row"] for line in (run / "to_label.jsonl").open()]


def test_the_output_may_lie_in_the_home_folder(ranked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    talk(ranked, Path("~/labels.json"), "", "g", "q")
    assert (tmp_path / "labels.json").is_file()


class Person(io.StringIO):
    """Types lines into a terminal."""

    def isatty(self) -> bool:
        return True


def talk(run: Path, output: Path, *lines: str, by: type[Person] = Person) -> tuple[dict[int, str], str]:
    """Labels and what was shown, for these answers of a person."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as shown:
        patch.setattr(sys, "stdin", by("".join(f"{line}\n" for line in lines)))
        found = label(LabelOptions(run=str(run), output=str(output)))
    return found, shown.getvalue()


def test_words_letters_skip_undo_and_resume(ranked: Path, tmp_path: Path) -> None:
    rows, output = asked(ranked), tmp_path / "my labels.json"
    pool = read_json(ranked / "manifest.json")["inputs"]["pool"]
    assert len(rows) == 6
    found, shown = talk(ranked, output, "", "g", "", "HARM", "s", "", "over_refusal", "u", "q")
    assert found == {rows[0]: "good", rows[1]: "harmful"}
    assert "6 rows to label" in shown and f"row {rows[2]}, 2 of 6 labelled" in shown
    entries = [{"row": row, "label": name} for row, name in sorted(found.items())]
    assert read_json(output) == {"pool": pool, "labels": entries}
    found, shown = talk(ranked, output, "u", "", "l", "s", "s")
    assert found == {rows[0]: "good", rows[1]: "harmful", rows[2]: "low_quality"}
    assert "nothing to undo" in shown and f"row {rows[2]}, 2 of 6" in shown, "the row that was skipped comes again"
    found, shown = talk(ranked, output, *["", "n"] * 3)
    assert len(found) == 6 and "all rows are done" in shown and f"--labels '{output}'" in shown
    assert len(read_labels(output, pool, rows)) == 6, "curate takes it"
    assert talk(ranked, output)[0] == found


def test_every_label_is_written_at_once(ranked: Path, tmp_path: Path) -> None:
    output, counts = tmp_path / "labels.json", []

    class Watched(Person):
        def readline(self, *_: object) -> str:  # type: ignore[override]
            counts.append(len(read_json(output)["labels"]) if output.exists() else 0)
            return super().readline()

    talk(ranked, output, "", "g", "", "h", "u", by=Watched)
    assert counts == [0, 0, 1, 1, 2, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["labels.json"]


def test_texts_are_shown_when_asked_for_and_steer_nothing(ranked: Path, tmp_path: Path) -> None:
    first = json.loads((ranked / "to_label.jsonl").read_text().splitlines()[0])
    _, hidden = talk(ranked, tmp_path / "labels.json", "good", "what", "q")
    assert first["prompt"] not in hidden and "not seen yet" in hidden and "'what' is none of good" in hidden
    assert not (tmp_path / "labels.json").exists()
    _, shown = talk(ranked, tmp_path / "labels.json", *["", "g"] * 6)
    assert first["prompt"] in shown
    assert "  | \\x1b[2J [bold]a[/bold]\n  | row 1, 9 of 9 labelled: \\u202e end\n" in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", shown) and not re.search(r"^row 1, 9 of 9", shown, re.M)


def test_labels_of_the_ranking_are_kept(ranked: Path, tmp_path: Path) -> None:
    files = {name: str(ranked.parent / f"{name}.jsonl") for name in ("pool", "safe", "harmful", "utility")}
    rows = asked(ranked)
    talk(ranked, tmp_path / "labels.json", "", "g", "", "h", "q")
    words = [*LEXICAL, "--to-label", "4", "--labels", str(tmp_path / "labels.json")]
    assert main(curate_words(files, tmp_path / "out", *words, model=None)) == 0
    assert not {*rows[:2]} & {*asked(tmp_path / "out")}
    found, _ = talk(tmp_path / "out", tmp_path / "more.json", "", "o", "q")
    assert found == {rows[0]: "good", rows[1]: "harmful", asked(tmp_path / "out")[0]: "over_refusal"}


def test_a_ranking_that_asks_nothing_keeps_no_questions_of_the_one_before(ranked: Path, tmp_path: Path) -> None:
    files = {name: str(ranked.parent / f"{name}.jsonl") for name in ("pool", "safe", "harmful", "utility")}
    talk(ranked, tmp_path / "labels.json", "", "g", "", "h", "q")
    shutil.copytree(ranked, tmp_path / "out")
    words = [*LEXICAL, "--to-label", "0", "--labels", str(tmp_path / "labels.json")]
    assert main(curate_words(files, tmp_path / "out", *words, model=None)) == 0
    assert not len(Ranking.load(tmp_path / "out").to_label) and not (tmp_path / "out" / "to_label.jsonl").exists()


def test_bad_input(ranked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(run: Path, output: Path, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            talk(run, output, "", "g")

    before = sorted(ranked.rglob("*"))
    (tmp_path / "link").symlink_to(ranked)
    for output in (ranked / "labels.json", tmp_path / "link" / "deep" / "x.json"):
        refused(ranked, output, ConfigError, "lies in the run's folder")
    refused(ranked, tmp_path, ConfigError, "is a folder")
    (tmp_path / "file").touch()
    refused(ranked, tmp_path / "file" / "x.json", ConfigError, "cannot be written .*; choose another file")
    refused(tmp_path, tmp_path / "x.json", DataError, "no manifest.json")
    row = asked(ranked)[0]
    for content, message in (
        ("nothing", "contains no JSON"),
        ({"labels": []}, "another pool"),
        ("3", "write it as"),
        (
            {"pool": read_json(ranked / "manifest.json")["inputs"]["pool"], "labels": [{"row": row, "label": "fine"}]},
            "entry 0, row .* is none of",
        ),
    ):
        (tmp_path / "x.json").write_text(content if isinstance(content, str) else json.dumps(content))
        text = (tmp_path / "x.json").read_text()
        refused(ranked, tmp_path / "x.json", DataError, message)
        assert (tmp_path / "x.json").read_text() == text
    assert sorted(ranked.rglob("*")) == before
    copy = tmp_path / "copy"
    shutil.copytree(ranked, copy)
    (copy / "to_label.jsonl").write_text("{}\n")
    refused(copy, tmp_path / "y.json", DataError, "was changed after")
    (copy / "to_label.jsonl").unlink()
    assert main(["label", str(copy), "--output", str(tmp_path / "y.json")]) == 2
    assert "no to_label.jsonl; rank with the selector pharmacist" in capsys.readouterr().err
    for change, message in (({"status": "started"}, "is not finished"), ({"stage": "align"}, "writes no ranking")):
        write_json(copy / "manifest.json", read_json(ranked / "manifest.json") | change)
        assert main(["label", str(copy), "--output", str(tmp_path / "y.json")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_no_terminal_and_no_torch(ranked: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pharmacist.cli.main import main; "
        f"print(main(['label', {str(ranked)!r}, '--output', {str(tmp_path / 'x.json')!r}])); "
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout.split("\n")[:2] == ["2", "[]"]
    assert "standard input is not a terminal" in done.stderr and done.stderr.count("\n") == 1


def test_the_page_has_the_same_rows(ranked: Path) -> None:
    from tests.support.pages import Page

    page = (ranked / "report.html").read_bytes()
    data = Page.read(ranked / "report.html").json("labelling")
    assert [row for row, _, _ in data["rows"]] == asked(ranked)
    assert data["pool"] == read_json(ranked / "manifest.json")["inputs"]["pool"]
    assert {row for row, _, _ in data["rows"]} <= set(pd.read_parquet(ranked / "scores.parquet")["row"])
    assert main(["report", str(ranked), "--quiet"]) == 0
    assert (ranked / "report.html").read_bytes() == page
