"""Which rows the commands read: chosen by ``--where``, refused by the chat template; and what they say about it."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import pharmacist as ph
from pharmacist.cli.main import main
from pharmacist.core.errors import DataError
from pharmacist.core.manifest import read_manifest
from pharmacist.selectors.base import Scores, SelectionContext
from pharmacist.worlds import BASE_MODEL, World
from tests.support.tiny import save_tiny_model
from tests.support.world_files import curate_words, write_rows, write_world


FEW = ["--train.max_steps", "1", "--train.per_device_train_batch_size", "4", "--lora.r", "2", "--device", "cpu"]
CHEAP = ["--selector.form", "evidence", "--selector.readers", "lexical", "--top-k", "20"]


def lines_of(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).open()]


def with_system(row: dict[str, Any]) -> dict[str, Any]:
    """A conversation with a system prompt, for which the tiny model's chat template has no place."""
    return talk(row) | {"system": "be brief"}


def talk(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    }


def test_curate_chooses_rows_of_every_file_that_has_the_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_world(tmp_path)
    pool = [row | {"label": i % 3 != 0} for i, row in enumerate(lines_of(files["pool"]))]
    files["pool"] = write_rows(tmp_path / "pool.jsonl", pool)
    both = [row | {"is_safe": False} for row in lines_of(files["harmful"])]
    both += [row | {"is_safe": True} for row in lines_of(files["safe"])]
    files["safe"] = files["harmful"] = write_rows(tmp_path / "both.jsonl", both)
    chosen = ["--where", "label=true", "safe:is_safe=true", "--where", "harmful:is_safe=false"]
    assert main(curate_words(files, tmp_path / "out", *CHEAP, *chosen, model=None)) == 0
    rows = [i for i, row in enumerate(pool) if row["label"]]
    assert pd.read_parquet(tmp_path / "out/scores.parquet")["row"].tolist() == rows
    counts = read_manifest(tmp_path / "out").counts
    assert {"in": 60, "refused": 0, "filtered": 20, "ranked": 40, "references_safe": 16}.items() <= counts.items()
    said = capsys.readouterr().err
    assert f"--pool {files['pool']}: 20 of 60 rows are left out by --where" in said and "not read" not in said
    # The page can be written again.
    (tmp_path / "out/report.html").unlink()
    assert main(["report", str(tmp_path / "out")]) == 0 and (tmp_path / "out/report.html").is_file()
    # Without the choice it says what it does not read.
    capsys.readouterr()
    assert main(curate_words(files | {"safe": str(tmp_path / "safe.jsonl")}, tmp_path / "b", *CHEAP, model=None)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning") and "not read" in line]
    assert said == [
        f"warning: --pool {files['pool']}: not read: column label; --where label=VALUE chooses rows by it",
        f"warning: --harmful {files['harmful']}: not read: column is_safe; --where is_safe=VALUE chooses rows by it",
    ]
    # So do the manifest and the page.
    kept = [f"warning: {text}" for text in read_manifest(tmp_path / "b").warnings]
    assert set(said) <= set(kept) and len(kept) == len(set(kept))
    page = (tmp_path / "b/report.html").read_text()
    assert all(text.removeprefix("warning: ") in page for text in said)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["labl=true"], "--where labl=true: there is no column 'labl' in --pool"),
        (["harmful:label=true"], "--where label=true: there is no column 'label' in --harmful, which is not given"),
        (["label"], "--where label: write it as label=true"),
        (["=true"], "--where =true: write it as"),
        (["label=maybe"], "none of 4 rows has label=maybe; check the value of --where"),
    ],
)
def test_a_choice_that_cannot_be(where: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    rows = [{"prompt": f"p{i}", "completion": "c", "label": True} for i in range(4)]
    words = curate_words(
        {"pool": write_rows(tmp_path / "pool.jsonl", rows)}, tmp_path / "out", "--selector", "random", model=None
    )
    assert main([*words, "--where", *where]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out/manifest.json").exists()


def test_training_on_chosen_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"label": i % 4 == 0} for i, row in enumerate(World(3).rows("safe", 16))]
    data = write_rows(tmp_path / "data.jsonl", rows)
    words = ["align", "--data", data, "--model", str(BASE_MODEL), *FEW, "--quiet"]
    assert main([*words, "--output-dir", str(tmp_path / "a"), "--where", "label=true"]) == 0
    assert {"in": 16, "filtered": 12, "trained": 4}.items() <= read_manifest(tmp_path / "a").counts.items()
    assert capsys.readouterr().err == ""
    assert main([*words, "--output-dir", str(tmp_path / "b")]) == 0
    assert read_manifest(tmp_path / "b").counts["trained"] == 16
    said = capsys.readouterr().err
    assert said == f"warning: --data {data}: not read: column label; --where label=VALUE chooses rows by it\n"


def test_an_attack_set_of_chosen_rows(tmp_path: Path) -> None:
    world = World(3)
    harmful = [row | {"is_safe": i >= 5} for i, row in enumerate(world.rows("attack", 12))]
    files = ["--task", write_rows(tmp_path / "task.jsonl", world.rows("task", 30))]
    files += ["--harmful", write_rows(tmp_path / "harmful.jsonl", harmful)]
    words = ["attack", *files, "--model", str(BASE_MODEL), "--samples", "20", "--build-only", "--quiet"]
    elsewhere = write_rows(tmp_path / "other.jsonl", [{"prompt": "elsewhere", "is_safe": True}])
    words += ["--disjoint-from", f"[{elsewhere}]"]
    given = [*words, "--output-dir", str(tmp_path / "out"), "--where", "is_safe=false"]
    assert main([*given, "--poison-ratio", "0.25"]) == 0
    taken = {row["source_row"] for row in lines_of(tmp_path / "out/attack_set.jsonl") if row["is_harmful"]}
    assert taken == {0, 1, 2, 3, 4}


def test_rows_that_the_chat_template_refuses_in_curate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [with_system(row) if i in (3, 7) else talk(row) for i, row in enumerate(World(3).rows("safe", 12))]
    pool = {
        "pool": write_rows(
            tmp_path / "pool.jsonl", [row | {"kind": "a" if i < 6 else "b"} for i, row in enumerate(rows)]
        )
    }
    words = ["--selector", "perplexity", "--top", "0.5", "--balance", "kind"]
    model = str(save_tiny_model(tmp_path / "model"))
    capsys.readouterr()  # what transformers says
    assert main(curate_words(pool, tmp_path / "out", *words, model=model)) == 2
    said = capsys.readouterr().err
    assert "row 3, 7: the chat template leaves out the text of a turn of the role system; delete them, leave" in said
    assert "--pool" in said and said.count("\n") == 1
    assert main(curate_words(pool, tmp_path / "out", *words, "--on-bad-row", "skip", model=model)) == 0
    table = pd.read_parquet(tmp_path / "out/scores.parquet")
    assert table["row"].tolist() == [row for row in range(12) if row not in (3, 7)]
    assert [row["row"] for row in lines_of(tmp_path / "out/refused.jsonl")] == [3, 7]
    assert {"in": 12, "refused": 2, "ranked": 10}.items() <= read_manifest(tmp_path / "out").counts.items()
    assert main(["report", str(tmp_path / "out")]) == 0
    # Before the ranking, and not after it.
    capsys.readouterr()
    too_many = ["--selector", "perplexity", "--on-bad-row", "skip", "--top-k", "11"]
    assert main(curate_words(pool, tmp_path / "many", *too_many, model=model)) == 2
    assert "--top-k 11: the pool has 10 rows to rank; give at most that number" in capsys.readouterr().err
    assert not [*(tmp_path / "many").glob("*")], "the folder is free for another number"
    # What does not read the rows with a model has no template that could refuse them.
    assert main(curate_words(pool, tmp_path / "b", "--selector", "length", "--top", "0.5", model=None)) == 0
    assert len(pd.read_parquet(tmp_path / "b/scores.parquet")) == 12


def test_references_that_the_chat_template_refuses_are_those_of_one_file(tmp_path: Path) -> None:
    class Spy(ph.LengthSelector):
        needs = frozenset({"safe", "model"})

        def rank(self, context: SelectionContext) -> Scores:
            found.update(rows=context.references["safe"].row_numbers.tolist(), files=context.sources["safe"].tolist())
            return super().rank(context)

    found: dict[str, list[int]] = {}
    rows = World(3).rows("safe", 28)
    first = [with_system(row) if i == 2 else talk(row) for i, row in enumerate(rows[:8])]
    second = [with_system(row) if i == 5 else talk(row) for i, row in enumerate(rows[8:16])]
    given: dict[str, Any] = {"selector": Spy(), "device": "cpu", "model": save_tiny_model(tmp_path / "model")}
    ranking = ph.rank(rows[16:], safe=[first, second], on_bad_row="skip", **given)
    assert found["rows"] == [0, 1, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 6, 7] and found["files"] == [0] * 7 + [1] * 7
    assert ranking.manifest["counts"]["references_safe"] == 14
    second_file = write_rows(tmp_path / "second.jsonl", second)
    with pytest.raises(DataError, match=r"^safe \S*second.jsonl: row 5: the chat template leaves out"):
        ph.rank(rows[16:], safe=[list(map(talk, rows[:8])), second_file], **given)


@pytest.mark.parametrize("command", ["align", "attack", "repair"])
def test_rows_that_the_chat_template_refuses_in_training(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(3)
    harmful = [with_system(row) if i == 2 else talk(row) for i, row in enumerate(world.rows("attack", 12))]
    file = write_rows(tmp_path / "harmful.jsonl", harmful)
    words = {
        "align": ["--data", file, *FEW],
        "attack": ["--harmful", file, "--kind", "harmful", "--samples", "12", *FEW],
        "repair": ["--harmful", file, "--method", "antidote", "--device", "cpu"],
    }[command]
    model = str(save_tiny_model(tmp_path / "model"))
    capsys.readouterr()  # what transformers says
    words = [command, *words, "--model", model, "--output-dir", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "row 2: the chat template leaves out" in said and "--on-bad-row skip" in said and said.count("\n") == 1
    assert main([*words, "--on-bad-row", "skip"]) == 0
    if command != "repair":
        assert read_manifest(tmp_path / "out").counts["refused"] == 1


def test_what_a_warning_quotes_commands_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "[bold]\x1b[2J"
    folder.mkdir()
    data = write_rows(folder / "data.jsonl", [row | {"label": 1} for row in World(3).rows("safe", 8)])
    words = ["align", "--data", data, "--model", str(BASE_MODEL), *FEW, "--quiet"]
    assert main([*words, "--output-dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert said.startswith("warning: --data ") and "[bold]\\x1b[2J/data.jsonl" in said and "\x1b" not in said
