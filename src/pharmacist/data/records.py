"""One canonical row: a prompt and a completion, whatever the layout of the input."""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pharmacist.core.console import NAMED_ROWS, by_reason
from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import atomic_path
from pharmacist.core.progress import bar, say, warn
from pharmacist.data.conversations import without_system
from pharmacist.data.formats import Row, Source
from pharmacist.data.formats.text import KeptRows, TextFile
from pharmacist.data.layouts import OPTIONAL, BadRow, RowReader
from pharmacist.data.normalise import is_blank, prompt_key
from pharmacist.data.where import Condition


_TEXTS = ("prompt", "completion", "turns", "instruction", "input")
SCHEMA = pa.schema({"row": pa.int64(), **dict.fromkeys(_TEXTS, pa.string()), "prompt_key": pa.uint64()})
"""Columns of a canonical row.

``row``: its number in the source. ``prompt``: the whole prompt as plain text. ``completion``: the last answer.
``turns``: JSON list of role and content where the prompt is more than one plain user turn. ``instruction`` and
``input``: of an Alpaca row that has an input. ``prompt_key``: `prompt_key` of the prompt without system prompts.
"""

_FLUSH_ROWS = 4096
_FLUSH_CHARACTERS = 8 * 2**20
_MOST_WITHOUT_LAYOUT = 1000  # rows at the beginning of a file after which no layout is expected any more


@dataclass
class Records:
    """The usable rows of a source.

    Attributes:
        dataset: Memory-mapped rows with the columns of `SCHEMA`, in input order.
        source: The source of the rows, which reads them with all their columns.
        layout: How the input was laid out: ``prompt-completion``, ``preference``, ``messages``,
            ``instruction-output`` or ``prompt-response``; of prompts alone ``prompt``, ``messages``, ``instruction``.
        refused: The rows that cannot be used, each with its `reason` and without its value.
        filtered: Number of rows that were left out by ``where``.
        warnings: Lines that name columns and message keys that are not read although they may matter.
    """

    dataset: datasets.Dataset
    source: Source
    layout: str
    refused: list[Row] = field(default_factory=list)
    filtered: int = 0
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def row_numbers(self) -> npt.NDArray[np.int64]:
        """Number in the source of every row, shape [rows]."""
        return column(self.dataset, "row")

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of rows for the manifest: ``in``, ``refused``, and ``filtered`` where ``where`` left rows out."""
        found = {"in": len(self) + len(self.refused) + self.filtered, "refused": len(self.refused)}
        return found | ({"filtered": self.filtered} if self.filtered else {})

    def announce(self) -> None:
        """Prints how many rows were left out, and warnings of what is not read."""
        if self.filtered:
            say(f"{self.source.where}: {self.filtered} of {self.counts['in']} rows are left out by --where")
        for text in self.warnings:
            warn(text)

    def originals(self, columns: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows with their columns in the input (only those in `columns` need be there), in input order."""
        return (row.value or {} for row in self.source.pick(self.row_numbers.tolist(), columns))

    def without(self, positions: Iterable[int]) -> "Records":
        """A copy that lacks the rows at these positions of `dataset`."""
        kept = np.setdiff1d(np.arange(len(self)), np.fromiter(positions, dtype=np.int64))
        return replace(self, dataset=self.dataset.select(kept))


def column(rows: datasets.Dataset, name: str) -> npt.NDArray[Any]:
    """Numbers of canonical rows, ``row`` or ``prompt_key``: shape [rows]."""
    return np.asarray(rows.select_columns([name]).with_format("arrow")[:].column(0))


def parse_columns(text: str | None) -> dict[str, str] | None:
    """Turns ``prompt=question,completion=answer`` into a mapping."""
    if text is None:
        return None
    pairs = [[part.strip() for part in pair.split("=")] for pair in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ConfigError(f"--columns {text}: write it as prompt=question,completion=answer")
    if any(len(set(names)) < len(pairs) for names in zip(*pairs, strict=True)):
        raise ConfigError(f"--columns {text}: names a column twice")
    return dict(pairs)


def first_row(source: Source) -> Mapping[str, Any]:
    """The first row that can be read; empty where there is none."""
    return next((row.value for row in source.scan() if row.value is not None), {})


def columns_in(source: Source, columns: Mapping[str, str]) -> dict[str, str]:
    """Those pairs of ``--columns`` whose column is in a source: in its first row, or in any if rows may lack it."""
    first = first_row(source) if columns and source.columns is None else source.columns or ()
    return {to: name for to, name in columns.items() if name in first or (to in OPTIONAL and source.has(name))}


def own_columns(source: Source, columns: Mapping[str, str]) -> dict[str, str]:
    """Those pairs of ``--columns`` that a source has; none, so the usual names, if it lacks one that rows need."""
    there = columns_in(source, columns)
    return there if columns.keys() - there.keys() <= OPTIONAL else {}


def to_dataset(rows: Iterable[Mapping[str, Any]]) -> datasets.Dataset:
    """A dataset of canonical rows from mappings; where ``row`` is missing, it is the position."""
    made = [
        {"row": position, **row, "prompt_key": prompt_key(without_system(row["prompt"], row.get("turns")))}
        for position, row in enumerate(rows)
    ]
    return datasets.Dataset(pa.Table.from_pylist(made, schema=SCHEMA))


def last_requests(rows: datasets.Dataset) -> datasets.Dataset:
    """Shortens the prompt of canonical rows to the last turn before the answer; rows of one turn stay unchanged."""
    turns = rows.with_format("arrow")
    if all(batch["turns"].null_count == len(batch["turns"]) for batch in turns.iter(_FLUSH_ROWS)):
        return rows

    def last(turns: str | None, whole: str) -> tuple[str, str | None]:
        request = json.loads(turns)[-1]["content"] if turns else ""
        return (whole, turns) if is_blank(request) or request == whole else (request, None)

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = [last(*row) for row in zip(batch["turns"], batch["prompt"], strict=True)]
        return {"prompt": [prompt for prompt, _ in found], "turns": [turns for _, turns in found]}

    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return rows.map(cut, batched=True, batch_size=_FLUSH_ROWS)
    finally:
        if not silent:
            datasets.enable_progress_bars()


def read_records(
    source: Source,
    *,
    work_dir: str | os.PathLike[str],
    side: Literal["chosen", "rejected"] = "chosen",
    columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
    prompts_only: bool = False,
    where: Sequence[Condition] | None = None,
    keep: bool = False,
) -> Records:
    """Reads a source into canonical rows on disk, in one pass and flat memory.

    Args:
        source: The rows.
        work_dir: Folder for the memory-mapped result.
        side: Which answer of a preference row is the completion.
        columns: Column of a layout -> the source's column that stands for it, ``{"prompt": "question"}``.
        on_bad_row: ``fail`` names the first ten rows that cannot be used; ``skip`` leaves them out, see
            `Records.refused`.
        prompts_only: Only prompts are needed: rows need no completion, and one that is there becomes an empty text.
        where: Conditions that rows must fulfil, see `Records.filtered`; None where the caller has no such option.
        keep: Whether the bytes of text rows are kept, so that `Records.source` reads and writes them without a
            second pass over the file.
    """
    reader = RowReader(source, columns or {}, side, prompts_only)
    if source.columns is not None:
        missing = [column for column in reader.mapped.values() if column not in source.columns]
        if missing:
            names = ", ".join(source.columns)
            raise DataError(f"{source.where}: has no column '{missing[0]}'; its columns are {names}")
    held, refused, skip = list[tuple[Any, ...]](), list[Row](), on_bad_row == "skip"
    total = bad = filtered = characters = 0
    path = Path(work_dir) / "rows.arrow"
    kept = KeptRows(path.parent) if keep and isinstance(source, TextFile) else None
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as out,
        bar(f"read {source.name}") as progress,
    ):

        def flush() -> None:
            if held:
                out.write_batch(pa.record_batch(list(zip(*held, strict=True)), schema=SCHEMA))
                held.clear()

        for row in source.scan(reader.read_columns | {condition.column for condition in where or ()}):
            try:
                if where and row.value is not None and not all(one.holds(row.value) for one in where):
                    filtered += 1
                    continue
            except TypeError as error:
                what = f"{', '.join(map(str, where or ()))}: a row {error} there"
                raise DataError(
                    f"{source.where}: --where {what}; a list, an object or bytes cannot be compared"
                ) from error
            total += 1
            if not total % _FLUSH_ROWS:
                progress.advance(_FLUSH_ROWS)
            try:
                canonical = reader.read(row)
                held.append((row.number, *canonical, prompt_key(without_system(canonical[0], canonical[2]))))
                if kept is not None:
                    kept.add(row)
                characters += len(canonical[0]) + len(canonical[1])
                if len(held) >= _FLUSH_ROWS or characters > _FLUSH_CHARACTERS:
                    flush()
                    characters = 0
            except BadRow as error:
                bad += 1
                if skip or bad <= NAMED_ROWS:
                    refused.append(Row(row.number, row.line, None, str(error)))
                if reader.layout is None and reader.without_layout >= _MOST_WITHOUT_LAYOUT:
                    break
        flush()
        if filtered and not total:
            asked = " and ".join(map(str, where or ()))
            raise DataError(f"{source.where}: none of {filtered} rows has {asked}; check the value of --where")
        if not total:
            raise DataError(f"{source.where}: contains no rows; give a file with at least one row")
        if bad and not (skip and bad < total):
            raise DataError(f"{source.where}: {_what_is_wrong(refused, bad, total, skip, reader)}")
    assert reader.layout is not None
    return Records(
        dataset=datasets.Dataset.from_file(str(path)),
        source=source.with_kept(kept) if isinstance(source, TextFile) and kept else source,
        layout=reader.layout.name,
        refused=refused,
        filtered=filtered,
        warnings=reader.warnings(where),
    )


def _what_is_wrong(refused: Sequence[Row], bad: int, total: int, skip: bool, reader: RowReader) -> str:
    """The message for a source of which `bad` of `total` rows cannot be used."""
    if reader.layout is None and reader.without_layout == bad:
        return (
            f"{refused[0].where} {refused[0].reason}; known row formats are {reader.known}; "
            "map other columns with --columns"
        )
    what = by_reason({row.where: row.reason or "" for row in refused[:NAMED_ROWS]}, bad)
    if bad == total and skip:
        return f"none of the {total} rows can be used: {what}; fix them"
    return (
        f"{'1 row' if bad == 1 else f'{bad} rows'} of {total} cannot be used: {what}; "
        "fix or delete them, or leave them out with --on-bad-row skip"
    )
