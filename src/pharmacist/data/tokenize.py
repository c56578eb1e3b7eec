"""From canonical rows to token ids.

A row is the ids of its rendered prompt, then the ids of its completion, tokenised by themselves, then EOS. Because the
two are joined as ids, the border is exact whatever a tokenizer would merge across it; masks come from lengths, so that
a padding token that equals EOS changes nothing.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from pharmacist.core.console import named
from pharmacist.core.errors import CompatibilityError, DataError
from pharmacist.core.files import atomic_path
from pharmacist.core.progress import bar, warn
from pharmacist.data.batches import without_middle
from pharmacist.data.formats.base import Row
from pharmacist.data.records import SCHEMA, Records
from pharmacist.data.templates import Template, conversation, refusal


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SCHEMA = pa.schema(
    {"row": pa.int64(), "input_ids": pa.list_(pa.int32()), "n_prompt": pa.int32(), "content_key": pa.uint64()}
)
_BATCH = 1024
_SKIP = ", leave them out with --on-bad-row skip"


class Encoded:
    """Tokenised rows.

    Attributes:
        dataset: Columns ``row`` (number in the source), ``input_ids`` (int32) and ``n_prompt`` (tokens before the
            completion), memory-mapped.
        lengths: Tokens per row, shape [rows].
        prompt_lengths: Tokens before the completion, shape [rows]; always less than `lengths`.
        content_keys: 64-bit hash of a row's ids and prompt length, shape [rows].
        truncated: Rows whose completion was cut on the right to fit the length.
        lost_eos: Rows that end without EOS for that reason.
        refused: ``row`` of those left out because their prompt alone fills the length.
        not_rendered: ``row`` and reason of those left out because the chat template refuses them.
        with_control: ``row`` of those with control tokens of the model in their text, which are read as plain text.
        cut_prompts: ``row`` of those whose prompt was shortened to fit the length.
    """

    def __init__(self) -> None:
        self.truncated = self.lost_eos = 0
        self.refused: list[int] = []
        self.not_rendered: list[tuple[int, str]] = []
        self.with_control: list[int] = []
        self.cut_prompts: list[int] = []

    def _open(self, table: pa.Table) -> None:
        self.dataset = datasets.Dataset(table.drop_columns(["content_key"]))
        self.prompt_lengths: npt.NDArray[np.int32] = table.column("n_prompt").to_numpy()
        self.content_keys: npt.NDArray[np.uint64] = table.column("content_key").to_numpy()
        chunks = table.column("input_ids").chunks
        # Views into the memory map: nothing is read before it is asked for.
        self._chunks = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks]
        self._starts = np.cumsum([0, *map(len, chunks)])
        self.lengths = np.concatenate([np.diff(offsets) for offsets, _ in self._chunks]).astype(np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def token_ids(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> list[npt.NDArray[np.int32]]:
        """The ids of the rows at these positions."""
        positions, found = np.asarray(rows, dtype=np.int64), []
        where = np.searchsorted(self._starts, positions, side="right") - 1
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
    on_bad_row: Literal["fail", "skip"] | None = None,
    name: str = "",
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
        on_bad_row: What to do with rows that the chat template refuses: ``fail`` names them, ``skip`` leaves them out,
            see `Encoded.not_rendered`; None is ``fail`` where the caller has no such option.
        name: What the rows are, in messages.

    Raises:
        DataError: Such rows, under ``fail``; or nothing is left.
    """
    if max_length < 2:
        raise DataError(f"max_length {max_length}: a row needs at least 2 tokens")
    encoded, texts, cut = Encoded(), _Texts(tokenizer, template), on_long_prompt == "cut"
    if work_dir is None:
        sink = pa.BufferOutputStream()
        _write(encoded, sink, rows, texts, max_length, cut)
        written = sink.getvalue()
    else:
        path = Path(work_dir) / "tokens.arrow"
        with atomic_path(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
            _write(encoded, file, rows, texts, max_length, cut)
        written = pa.memory_map(str(path))
    table = pa.ipc.open_stream(written).read_all()
    about = f"{name}: " if name else ""
    if encoded.not_rendered and (on_bad_row != "skip" or len(encoded.not_rendered) == len(rows)):
        raise DataError(about + refusal(encoded.not_rendered, _SKIP if on_bad_row == "fail" else ""))
    if found := encoded.with_control:
        warn(
            f"{about}{len(found)} of {len(rows)} rows ({named(found)}) have control tokens of the model in their "
            "text, which are read as plain text"
        )
    if (long := encoded.refused) and on_long_prompt == "fail":
        raise DataError(
            f"{about}the prompt alone fills all {max_length} tokens in {len(long)} rows ({named(long)}); "
            "shorten or delete them, or raise max_length where the model allows it"
        )
    if not len(table):
        raise DataError(f"{about}no row is left to work on")
    encoded._open(table)
    return encoded


def rendered_rows(
    records: Records, tokenizer: "PreTrainedTokenizerBase", template: Template, on_bad_row: Literal["fail", "skip"]
) -> Records:
    """The rows that the chat template takes, for methods that need each of their rows in tokens.

    `on_bad_row` is that of `encode`; ``skip`` moves the others to `Records.refused`.
    """
    texts, reasons = _Texts(tokenizer, template), list[tuple[int, str]]()
    for batch in _batches(records.dataset):
        _, refused = template.try_render(list(map(texts.parted, batch)), tokenizer)
        reasons += [(batch[position]["row"], reason) for position, reason in refused.items()]
    if not reasons:
        return records
    where = records.source.where
    if on_bad_row != "skip" or len(reasons) == len(records):
        raise DataError(f"{where}: {refusal(reasons, _SKIP if on_bad_row != 'skip' else '')}")
    refused_too = [Row(row, None, None, reason) for row, reason in reasons]
    left = records.without(np.flatnonzero(np.isin(records.row_numbers, [row.number for row in refused_too])))
    return replace(left, refused=sorted([*records.refused, *refused_too], key=lambda row: row.number))


def _write(counts: Encoded, sink: Any, rows: datasets.Dataset, texts: "_Texts", max_length: int, cut: bool) -> None:
    """Writes the ids of the rows, and notes in `counts` which rows were cut or left out."""
    eos = texts.tokenizer.eos_token_id
    if eos is None:
        raise CompatibilityError("the tokenizer has no end-of-sequence token, so no answer could end; set eos_token")
    with pa.ipc.new_stream(sink, _SCHEMA) as out, bar("tokenise", len(rows)) as progress:
        for batch in _batches(rows):
            parted = list(map(texts.parted, batch))
            rendered, refused = texts.template.try_render(parted, texts.tokenizer)
            counts.not_rendered += [(batch[position]["row"], reason) for position, reason in refused.items()]
            answers = [row["completion"] for row in parted]
            kept: list[tuple[int, npt.NDArray[np.int32], int, int]] = []
            for position, (row, prompt, completion) in enumerate(
                zip(batch, texts.prompt_ids(rendered), texts.ids(answers), strict=True)
            ):
                if _BORDER in rendered[position] or _BORDER in answers[position]:
                    counts.with_control.append(row["row"])
                if position in refused:
                    continue
                if len(prompt) >= max_length:
                    (counts.cut_prompts if cut else counts.refused).append(row["row"])
                    if not cut:
                        continue
                    prompt = without_middle(prompt, max_length - min(len(completion) + 1, max_length // 2))
                n_prompt = len(prompt)
                ids = np.array([*prompt, *completion, eos][:max_length], dtype=np.int32)
                counts.truncated += n_prompt + len(completion) > max_length
                counts.lost_eos += n_prompt + len(completion) >= max_length
                key = xxhash.xxh3_64_intdigest(ids.tobytes(), seed=n_prompt)
                kept.append((row["row"], ids, n_prompt, key))
            if kept:
                out.write_batch(pa.record_batch(list(map(list, zip(*kept, strict=True))), schema=_SCHEMA))
            progress.advance(len(batch))


def _batches(rows: datasets.Dataset) -> Iterator[list[dict[str, Any]]]:
    names = [name for name in SCHEMA.names if name in rows.column_names]
    start = 0
    for table in rows.select_columns(names).with_format("arrow").iter(_BATCH):
        yield [{"row": start + position} | row for position, row in enumerate(table.to_pylist())]
        start += table.num_rows


def prompt_ids(
    rows: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase", template: Template
) -> list[list[int]]:
    """Token ids of the prompts of canonical rows, exactly as `encode` puts them in front of a completion."""
    texts = _Texts(tokenizer, template)
    return texts.prompt_ids(template.render(list(map(texts.parted, rows)), tokenizer))


_BORDER = "\ufdd0"  # no character of any text, for that is what Unicode keeps it free for


class _Texts:
    """Texts as token ids, in which no text of a row becomes a control token such as ``</s>``.

    Control tokens in a row's text get a border in the middle, and the text on each side of it is tokenised by
    itself; those that the template writes stay whole. They are the tokenizer's special ones, and those of its added
    ones that frame the turns in the template, for some models add them as ordinary ones.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: Template) -> None:
        self.tokenizer, self.template = tokenizer, template
        frame = template.frame(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        control = {str(token) for token in added if token.special or str(token) in frame}
        control = {token for token in control | set(tokenizer.all_special_tokens) if len(token) > 1}
        longest_first = sorted(control, key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def parted(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A canonical row with borders; itself where it holds no control token."""
        texts = {name: row[name] for name in ("prompt", "completion", "instruction", "input") if row.get(name)}
        turns = conversation(row) if row.get("turns") else []
        if not any(self._pattern.search(text) for text in (*texts.values(), *(turn["content"] for turn in turns))):
            return row
        parted = {name: self._part(text) for name, text in texts.items()}
        if turns:
            turns = [turn | {"content": self._part(turn["content"])} for turn in turns]
            parted["turns"] = json.dumps(turns, ensure_ascii=False)
        return {**row, **parted}

    def _part(self, text: str) -> str:
        return self._pattern.sub(lambda match: f"{match[0][0]}{_BORDER}{match[0][1:]}", text)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts with borders."""
        pieces = [text.split(_BORDER) for text in texts]
        # One call per batch, so that fast tokenizers use all cores.
        encoded = self.tokenizer(
            [piece for parts in pieces for piece in parts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: Iterator[list[int]] = iter(encoded["input_ids"])
        return [[token for _ in parts for token in next(ids)] for parts in pieces]

    def prompt_ids(self, rendered: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts, after BOS where the tokenizer itself puts it in front of a text."""
        start: list[int] = []
        if self.template.kind == "alpaca":  # a chat template holds its own; what comes behind a text is left to EOS
            start = [token for token in self.tokenizer("")["input_ids"][:1] if token == self.tokenizer.bos_token_id]
        return [start + row for row in self.ids(rendered)]
