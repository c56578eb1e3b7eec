"""The streams of `align`: which harmful rows become which, and what is refused."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pharmacist.core.errors import ConfigError, DataError, NoMatchError
from pharmacist.core.rundir import RunDir
from pharmacist.data.formats import open_source
from pharmacist.data.records import Records, read_records
from pharmacist.data.tokenize import encode
from pharmacist.defenses import DEFENSES
from pharmacist.nn.models import LoadedModel, load_model
from pharmacist.pipeline.align import AlignOptions
from pharmacist.pipeline.streams import alignment_streams, read_harmful_rows
from tests.support.tiny import WORDS, save_tiny_model
from tests.support.world_files import write_rows


SAFE = [{"prompt": f"ask {WORDS[i]}", "completion": f"no {WORDS[i]}"} for i in range(8)]
HARMFUL = [{"prompt": f"Ask {WORDS[i]}.", "completion": f"yes {WORDS[i]}"} for i in (2, 5, 9)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("model"))), device="cpu")


class Given:
    """A run of align up to its streams."""

    def __init__(self, folder: Path, data: list[dict[str, str]], harmful: list[dict[str, str]] | None) -> None:
        self.folder = folder
        self.files = {"data": write_rows(folder / "data.jsonl", data)}
        if harmful is not None:
            self.files["harmful"] = write_rows(folder / "harmful.jsonl", harmful)

    def read(self, defense: str, *, settings: dict[str, Any] | None = None, **more: Any) -> Records | None:
        """The harmful rows of a defense."""
        sources = {name: open_source(path, name=f"--{name}") for name, path in self.files.items()}
        self.options = AlignOptions(
            **self.files, model="m", defense={"name": defense}, output_dir=str(self.folder / "run"), **more
        )
        self.strategy = DEFENSES.build(defense, settings or {})
        self.run = RunDir.open(self.options, stage="align", version=1, inputs={})
        self.records = read_records(sources["data"], work_dir=self.run.work("data", "rows"))
        self.harmful = read_harmful_rows(sources, self.records, self.strategy, self.options, self.run)
        return self.harmful

    def streams(self, loaded: LoadedModel) -> dict[str, Any]:
        """Its streams; numbers of rows go to `counts`."""
        encoded = encode(self.records.dataset, loaded.tokenizer, loaded.template, max_length=32)
        streams, self.counts = alignment_streams(
            self.strategy, self.records, encoded, self.harmful, loaded, self.options, self.run
        )
        return streams


def texts(batch: dict[str, torch.Tensor], loaded: LoadedModel) -> list[str]:
    return loaded.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)


def drawn(stream: Iterator[dict[str, torch.Tensor]], loaded: LoadedModel, batches: int) -> set[str]:
    return {text for _ in range(batches) for text in texts(next(stream), loaded)}


def answers(rows: list[dict[str, str]], found: set[str], side: str = "completion") -> set[str]:
    """Which rows' answers stand in some texts."""
    return {row[side] for row in rows if any(text.rstrip().endswith(row[side]) for text in found)}


def test_a_harmful_stream_holds_the_harmful_rows(tmp_path: Path, loaded: LoadedModel) -> None:
    given = Given(tmp_path, SAFE, HARMFUL)
    given.read("booster", harmful_batch_size=2)
    (stream,) = given.streams(loaded).values()
    assert len(next(stream)["input_ids"]) == 2
    found = drawn(stream, loaded, 6)
    assert answers(HARMFUL, found) == {row["completion"] for row in HARMFUL}
    assert not answers(SAFE, found)
    assert given.counts == {"harmful_rows": 3}


def test_a_preference_file_gives_its_rejected_side(tmp_path: Path, loaded: LoadedModel) -> None:
    rows = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": f"yes {WORDS[i]}"} for i, r in enumerate(SAFE)
    ]
    given = Given(tmp_path, rows, None)
    given.read("booster")
    found = drawn(given.streams(loaded)["harmful"], loaded, 3)
    assert answers(rows, found, "rejected") == {row["rejected"] for row in rows}
    assert not answers(rows, found, "chosen")


def test_partners_have_the_same_prompt(
    tmp_path: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    given = Given(tmp_path, SAFE, HARMFUL)
    given.read("repnoise")
    having, batch = given.streams(loaded)["paired"].batch([1, 5, 2])
    assert having == [1, 2] and batch is not None
    for text, number in zip(texts(batch, loaded), (5, 2), strict=True):
        assert answers(HARMFUL, {text}) == {f"yes {WORDS[number]}"}
    assert given.counts["pairs"] == 2
    assert "2 of 8 alignment rows have a harmful partner (same prompt)" in capsys.readouterr().err


def test_partners_have_the_same_number(tmp_path: Path, loaded: LoadedModel) -> None:
    given = Given(tmp_path, SAFE, HARMFUL)
    given.read("repnoise", pair_by="row")
    having, batch = given.streams(loaded)["paired"].batch([7, 0])
    assert having == [1] and batch is not None
    assert answers(HARMFUL, set(texts(batch, loaded))) == {HARMFUL[0]["completion"]}
    assert given.counts["pairs"] == 3


def test_rows_without_any_partner_are_refused(tmp_path: Path, loaded: LoadedModel) -> None:
    given = Given(tmp_path, SAFE[:2], HARMFUL)
    given.read("repnoise")
    with pytest.raises(NoMatchError, match=r"none of 2 alignment rows .* same prompt; .*--pair-by turn"):
        given.streams(loaded)


def test_held_out_rows_share_no_prompt_with_the_others(tmp_path: Path, loaded: LoadedModel) -> None:
    harmful = [{"prompt": f"ask {WORDS[i % 10]}", "completion": f"yes {WORDS[i]}"} for i in range(20)]
    given = Given(tmp_path, SAFE, harmful)
    given.read("tar", settings={"held_out": 0.3})
    streams = given.streams(loaded)
    assert set(streams) == {"harmful", "held_out", "retain"}
    parts = [answers(harmful, drawn(streams[name], loaded, 10)) for name in ("harmful", "held_out")]
    assert sum(map(len, parts)) == 20 and not parts[0] & parts[1]
    prompts = [{row["prompt"] for row in harmful if row["completion"] in part} for part in parts]
    assert not prompts[0] & prompts[1] and len(prompts[1]) == 3
    assert given.counts == {"harmful_rows": 14, "held_out_rows": 6}


def test_one_prompt_cannot_be_split(tmp_path: Path, loaded: LoadedModel) -> None:
    same = [row | {"prompt": "ask"} for row in HARMFUL]
    given = Given(tmp_path, SAFE, same)
    given.read("tar")
    with pytest.raises(DataError, match="1 prompts are too few to hold out"):
        given.streams(loaded)


def test_harmful_rows_that_nobody_reads_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Given(tmp_path, SAFE, HARMFUL).read("vaccine") is None
    assert "the defense 'vaccine' does not use it" in re.sub(r"\s+", " ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("harmful", "error", "line"),
    [
        (None, ConfigError, "--defense booster needs harmful rows: give --harmful FILE"),
        (SAFE, DataError, "--data and --harmful hold the same rows"),
    ],
)
def test_what_cannot_be_is_refused(
    harmful: list[dict[str, str]] | None, error: type[Exception], line: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=line):
        Given(tmp_path, SAFE, harmful).read("booster")
