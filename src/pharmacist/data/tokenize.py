"""From canonical rows to token ids, and from token ids to batches.

A row is the ids of its rendered prompt, then the ids of its completion, tokenised by themselves, then EOS. Because the
two are joined as ids, the border is exact whatever a tokenizer would merge across it; masks come from lengths, so that
a padding token that equals EOS changes nothing.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import xxhash

from pharmacist.core.errors import CompatibilityError, DataError
from pharmacist.core.files import atomic_path
from pharmacist.core.progress import bar
from pharmacist.data.templates import Template


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of positions without a target."""

_SCHEMA = pa.schema([
    pa.field("row", pa.int64()),
    pa.field("input_ids", pa.list_(pa.int32())),
    pa.field("n_prompt", pa.int32()),
    pa.field("content_key", pa.uint64()),
])  # fmt: skip
_BATCH = 1024
_NAMED = 10


@dataclass
class Encoded:
    """Tokenised rows.

    Attributes:
        dataset: Columns ``row`` (number in the source), ``input_ids`` (int32) and ``n_prompt`` (tokens before the
            completion), memory-mapped.
        truncated: Rows whose completion was cut on the right to fit the length.
        lost_eos: Rows that end without EOS for that reason.
        refused: ``row`` of those left out because their prompt alone fills the length.
        cut_prompts: ``row`` of those whose prompt was shortened for that reason.
        lengths: Tokens per row, shape [rows].
        prompt_lengths: Tokens before the completion, shape [rows]; always less than `lengths`.
        content_keys: 64-bit hash of a row's ids and prompt length, shape [rows].
    """

    dataset: datasets.Dataset
    truncated: int
    lost_eos: int
    refused: list[int]
    cut_prompts: list[int]
    lengths: npt.NDArray[np.int32]
    prompt_lengths: npt.NDArray[np.int32]
    content_keys: npt.NDArray[np.uint64]
    _table: pa.Table = field(repr=False)

    def __post_init__(self) -> None:
        column = self._table.column("input_ids")
        self._starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
        # Views into the memory map: nothing is read before it is asked for.
        self._chunks = [
            (chunk.offsets.to_numpy(zero_copy_only=False), chunk.values.to_numpy(zero_copy_only=False))
            for chunk in column.chunks
        ]

    def __len__(self) -> int:
        return len(self.lengths)

    def token_ids(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> list[npt.NDArray[np.int32]]:
        """The ids of the rows at these positions."""
        positions = np.asarray(rows, dtype=np.int64)
        where = np.searchsorted(self._starts, positions, side="right") - 1
        found = []
        for position, chunk in zip(positions, where, strict=True):
            offsets, values = self._chunks[chunk]
            within = position - self._starts[chunk]
            found.append(values[offsets[within] : offsets[within + 1]])
        return found


def encode(
    rows: datasets.Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    *,
    max_length: int,
    work_dir: str | os.PathLike[str] | None = None,
    on_long_prompt: Literal["fail", "skip", "cut"] = "fail",
) -> Encoded:
    """Tokenises canonical rows.

    Args:
        rows: Canonical rows (`data.records`); only ``prompt`` and ``completion`` must be there.
        tokenizer: The model's.
        template: Renders the prompts.
        max_length: Longest row in tokens; completions are cut on the right to fit.
        work_dir: Folder for the memory-mapped result; kept in memory without one.
        on_long_prompt: What to do with rows whose prompt leaves no room for a completion token: ``fail`` names them;
            ``skip`` leaves them out, see `Encoded.refused`; ``cut`` takes tokens from the middle of the prompt, so
            that its frame stays whole and at most half of the length is the completion's, see `Encoded.cut_prompts`.

    Raises:
        DataError: Such rows, under ``fail``; or nothing is left.
    """
    if max_length < 2:
        raise DataError(f"max_length {max_length}: a row needs at least 2 tokens")
    state = _Counts()
    path = None if work_dir is None else Path(work_dir) / "tokens.arrow"
    if path is None:
        sink = pa.BufferOutputStream()
        _write(sink, rows, tokenizer, template, max_length, on_long_prompt == "cut", state)
        table = pa.ipc.open_stream(sink.getvalue()).read_all()
    else:
        with atomic_path(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
            _write(file, rows, tokenizer, template, max_length, on_long_prompt == "cut", state)
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    if state.refused and on_long_prompt == "fail":
        named = ", ".join(map(str, state.refused[:_NAMED])) + (", ..." if len(state.refused) > _NAMED else "")
        raise DataError(
            f"the prompt alone fills all {max_length} tokens in {len(state.refused)} rows (row {named}); "
            "shorten or delete them, or raise max_length where the model allows it"
        )
    if not len(table):
        raise DataError("no row is left to work on")
    lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in table.column("input_ids").chunks])
    return Encoded(
        dataset=datasets.Dataset(table.drop_columns(["content_key"])),
        truncated=state.truncated, lost_eos=state.lost_eos, refused=state.refused, cut_prompts=state.cut_prompts,
        lengths=lengths.astype(np.int32), prompt_lengths=table.column("n_prompt").to_numpy(),
        content_keys=table.column("content_key").to_numpy(), _table=table,
    )  # fmt: skip


@dataclass
class _Counts:
    truncated: int = 0
    lost_eos: int = 0
    refused: list[int] = field(default_factory=list)
    cut_prompts: list[int] = field(default_factory=list)


def _without_middle(ids: list[int], length: int) -> list[int]:
    head = length // 2
    return ids[:head] + ids[len(ids) - (length - head) :]


def _write(
    sink: Any, rows: datasets.Dataset, tokenizer: "PreTrainedTokenizerBase", template: Template, max_length: int,
    cut: bool, state: _Counts,
) -> None:  # fmt: skip
    eos = tokenizer.eos_token_id
    if eos is None:
        raise CompatibilityError("the tokenizer has no end-of-sequence token, so no answer could end; set eos_token")
    with pa.ipc.new_stream(sink, _SCHEMA) as out, bar("tokenise", len(rows)) as progress:
        for batch in _batches(rows):
            prompts = prompt_ids(batch, tokenizer, template)
            completions = _token_ids(tokenizer, [row["completion"] for row in batch])
            kept: list[tuple[int, npt.NDArray[np.int32], int, int]] = []
            for row, prompt, completion in zip(batch, prompts, completions, strict=True):
                if len(prompt) >= max_length:
                    if not cut:
                        state.refused.append(row["row"])
                        continue
                    state.cut_prompts.append(row["row"])
                    prompt = _without_middle(prompt, max_length - min(len(completion) + 1, max_length // 2))
                n_prompt = len(prompt)
                ids = np.array([*prompt, *completion, eos][:max_length], dtype=np.int32)
                state.truncated += n_prompt + len(completion) > max_length
                state.lost_eos += n_prompt + len(completion) >= max_length
                key = xxhash.xxh3_64_intdigest(ids.tobytes(), seed=n_prompt)
                kept.append((row["row"], ids, n_prompt, key))
            if kept:
                out.write_batch(_record_batch(kept))
            progress.advance(len(batch))


def _record_batch(kept: list[tuple[int, npt.NDArray[np.int32], int, int]]) -> pa.RecordBatch:
    numbers, ids, prompts, keys = zip(*kept, strict=True)
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    tokens = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(ids)))
    return pa.record_batch(
        [pa.array(numbers, pa.int64()), tokens, pa.array(prompts, pa.int32()), pa.array(keys, pa.uint64())],
        schema=_SCHEMA,
    )


def _batches(rows: datasets.Dataset) -> Iterator[list[dict[str, Any]]]:
    read = ("row", "prompt", "completion", "turns", "instruction", "input")
    names = [name for name in read if name in rows.column_names]
    start = 0
    for table in rows.select_columns(names).with_format("arrow").iter(_BATCH):
        yield [{"row": start + position} | row for position, row in enumerate(table.to_pylist())]
        start += table.num_rows


def prompt_ids(
    rows: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase", template: Template
) -> list[list[int]]:
    """Token ids of prompts, exactly as `encode` puts them in front of a completion: what a model is to continue.

    Args:
        rows: Canonical rows; their completions are not read.
        tokenizer: The model's.
        template: Renders the prompts.
    """
    ids = _token_ids(tokenizer, template.render_many(rows, tokenizer))
    if template.adds_special_tokens:
        start = _leading_special_tokens(tokenizer)
        return [start + row for row in ids]
    return ids


def _leading_special_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer itself puts in front of a text: BOS or nothing. (What it puts behind is left to EOS.)"""
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []


def _token_ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    # One call per batch, so that fast tokenizers use all cores.
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def collate(
    items: Sequence[Mapping[str, Any]], pad_token_id: int, multiple_of: int = 1
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Pads rows on the right into a batch.

    Args:
        items: Rows with ``input_ids`` and ``n_prompt``.
        pad_token_id: Fills `input_ids`; masks and labels never depend on it.
        multiple_of: The padded length is a multiple of this.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape [rows, length]; a label is its token on the
        completion and its EOS, and `IGNORED` on prompt and padding.
    """
    longest = max(len(item["input_ids"]) for item in items)
    shape = (len(items), -(-longest // multiple_of) * multiple_of)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for i, item in enumerate(items):
        ids = torch.from_numpy(np.array(item["input_ids"], dtype=np.int64))  # a copy: the original is a read-only map
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
        labels[i, item["n_prompt"] : len(ids)] = ids[item["n_prompt"] :]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
