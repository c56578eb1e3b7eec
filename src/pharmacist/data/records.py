"""One canonical row: a prompt and a completion, whatever the layout of the input."""

import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import atomic_path
from pharmacist.core.progress import bar, console, warn
from pharmacist.data.conversations import ROLE_KEYS, ROLES, as_list, as_messages
from pharmacist.data.formats import Source, place, spelled
from pharmacist.data.where import Condition


if TYPE_CHECKING:
    import datasets

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("prompt", pa.string()),
        pa.field("completion", pa.string()),
        pa.field("turns", pa.string()),
        pa.field("instruction", pa.string()),
        pa.field("input", pa.string()),
        pa.field("prompt_key", pa.uint64()),
    ]
)
"""Columns of a canonical row.

``row``: its number in the source. ``prompt``: the whole prompt as plain text. ``completion``: the last answer.
``turns``: JSON list of role and content where the prompt is more than one plain user turn. ``instruction`` and
``input``: of an Alpaca row that has an input. ``prompt_key``: `prompt_key` of the prompt.
"""

_FLUSH_ROWS = 4096
_FLUSH_CHARACTERS = 8 * 2**20
_NAMED = 10
_STRANGE = 1000  # rows without any known layout after which no layout is expected any more


@dataclass(frozen=True)
class Refused:
    """A row that cannot be used: its number, its line in a text file, and why."""

    row: int
    line: int | None
    reason: str


@dataclass
class Records:
    """The usable rows of a source.

    Attributes:
        dataset: Memory-mapped rows with the columns of `SCHEMA`, in input order.
        source: Where they come from.
        layout: How the input was laid out: ``prompt-completion``, ``preference``, ``messages``,
            ``instruction-output`` or ``prompt-response``; of prompts alone ``prompt``, ``messages``, ``instruction``.
        refused: The other rows.
        filtered: Rows that were left out because they lack what was asked for (``where``).
        warnings: What of the input is not read although it may matter; one line each.
    """

    dataset: "datasets.Dataset"
    source: Source
    layout: str
    refused: list[Refused] = field(default_factory=list)
    filtered: int = 0
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def row_numbers(self) -> npt.NDArray[np.int64]:
        """Number in the source of every row, shape [rows]."""
        tables = self.dataset.select_columns(["row"]).with_format("arrow").iter(_FLUSH_ROWS)
        return np.concatenate([np.empty(0, dtype=np.int64), *(table.column(0).to_numpy() for table in tables)])

    @property
    def counts(self) -> dict[str, int]:
        """For manifests: how many rows were read, refused, and left out by ``where`` if any were."""
        filtered = {"filtered": self.filtered} if self.filtered else {}
        return {"in": len(self) + len(self.refused) + self.filtered, "refused": len(self.refused), **filtered}

    def announce(self) -> None:
        """Says at the console what whoever gave the rows should know: how many were left out, what is not read."""
        if self.filtered:
            said = f"{self.source.where}: {self.filtered} of {self.counts['in']} rows are left out by --where"
            console().print(said, soft_wrap=True, markup=False)
        for text in self.warnings:
            warn(text)

    def without(self, positions: Iterable[int]) -> "Records":
        """A copy that lacks the rows at these positions of `dataset`."""
        kept = np.setdiff1d(np.arange(len(self)), np.fromiter(positions, dtype=np.int64))
        return replace(self, dataset=self.dataset.select(kept))


# Unicode's Default_Ignorable_Code_Point (zero-width, bidi and tag characters, fillers, variation selectors), the other
# format and control characters, noncharacters, and the Braille blank; white space is not among them.
_HIDDEN = (
    "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufdd0-\ufdef\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_INVISIBLE, _SEEN = re.compile(f"[{_HIDDEN}]"), re.compile(rf"[^\s{_HIDDEN}]")


def visible(text: str) -> str:
    r"""A text without the characters that nobody sees; what to compare, or to call empty, not what a model reads.

    >>> visible("b\u200bread\ufeff")
    'bread'
    """
    return _INVISIBLE.sub("", text)


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen."""
    return _SEEN.search(text) is None


def normalised_prompt(text: str) -> str:
    r"""A prompt as overlap checks see it: without invisible characters, and with compatible characters, case, white
    space and final punctuation made equal.

    >>> normalised_prompt("  How do I\n b\u200bake BREAD?")
    'how do i bake bread'
    """
    text = visible(text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = " ".join(text.casefold().split())
    return text.rstrip(" .?!…\"'") or text


def prompt_key(text: str) -> int:
    """64-bit hash of a prompt's normalised text."""
    return xxhash.xxh3_64_intdigest(normalised_prompt(text).encode("utf-8", "surrogatepass"))


def parse_columns(text: str | None) -> dict[str, str] | None:
    """Turns ``prompt=question,completion=answer`` into a mapping."""
    if text is None:
        return None
    pairs = [pair.split("=") for pair in text.split(",")]
    if any(len(pair) != 2 or not all(part.strip() for part in pair) for pair in pairs):
        raise ConfigError(f"--columns {text}: write it as prompt=question,completion=answer")
    return {name.strip(): column.strip() for name, column in pairs}


def to_dataset(rows: Iterable[Mapping[str, Any]]) -> "datasets.Dataset":
    """Canonical rows that were made in memory as a dataset.

    Args:
        rows: Each with ``prompt`` and ``completion``; ``row`` is the position where it is missing.
    """
    import datasets

    data: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for position, row in enumerate(rows):
        for name, values in data.items():
            values.append(row.get(name))
        data["row"][-1] = row.get("row", position)
        data["prompt_key"][-1] = prompt_key(row["prompt"])
    return datasets.Dataset(pa.table(data, schema=SCHEMA))


def last_requests(rows: "datasets.Dataset") -> "datasets.Dataset":
    """Canonical rows whose prompt is the last turn before the answer alone; rows of one turn stay as they are."""
    import datasets

    turns = rows.with_format("arrow")
    if all(batch["turns"].null_count == len(batch["turns"]) for batch in turns.iter(_FLUSH_ROWS)):
        return rows

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        prompts = []
        for turns, whole in zip(batch["turns"], batch["prompt"], strict=True):
            last = json.loads(turns)[-1]["content"] if turns else ""
            prompts.append(whole if is_blank(last) else last)
        kept = [
            turns if own == whole else None
            for own, whole, turns in zip(prompts, batch["prompt"], batch["turns"], strict=True)
        ]
        return {"prompt": prompts, "turns": kept}

    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return rows.map(cut, batched=True, batch_size=_FLUSH_ROWS)
    finally:
        if not silent:
            datasets.enable_progress_bars()


# --- layouts ------------------------------------------------------------------------------------------------------


class _Bad(Exception):
    """A row that cannot be used; the text says why."""


class _Layout(NamedTuple):
    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


_LAYOUTS = (
    _Layout("prompt-completion", ("prompt", "completion")),
    _Layout("preference", ("prompt", "chosen", "rejected")),
    _Layout("messages", ("messages",)),
    _Layout("instruction-output", ("instruction", "output"), ("input",)),
    _Layout("prompt-response", ("prompt", "response")),
    _Layout("preference", ("chosen", "rejected")),  # message lists that hold the prompt themselves
)
_PROMPT_LAYOUTS = (
    _Layout("prompt", ("prompt",)),
    _Layout("messages", ("messages",)),
    _Layout("instruction", ("instruction",), ("input",)),
)
_BEFORE = ("system", "history")
"""Columns of any layout whose texts come before the row's own turns."""
_NAMES = tuple(dict.fromkeys([*(name for of in _LAYOUTS for name in of.required + of.optional), *_BEFORE]))
_KNOWN = "prompt+completion, messages, instruction[+input]+output, prompt+chosen+rejected or prompt+response"
_TOOL_CALLS = frozenset({"tool_calls", "tool_call", "function_call"})

# Columns and keys of messages that change what a row means, and that nothing here reads.
_LABELS = frozenset(
    {
        "label",
        "labels",
        "is_safe",
        "is_unsafe",
        "is_harmful",
        "is_toxic",
        "is_refusal",
        "safe",
        "unsafe",
        "harmful",
        "toxic",
        "toxicity",
        "flagged",
        "safety_label",
        "kto_tag",
        "is_response_safe",
        "is_response_0_safe",
        "is_response_1_safe",
        "prompt_label",
        "response_label",
        "prompt_harm_label",
        "response_harm_label",
        "response_refusal_label",
    }
)
_MEDIA = frozenset({"image", "images", "audio", "audios", "video", "videos"})
_TEXTS = frozenset(
    {
        "input",
        "context",
        "system_prompt",
        "system_message",
        "tools",
        "functions",
        "tool_calls",
        "reasoning_content",
        "reasoning",
        "thinking",
        "weight",
        "weights",
        "sample_weight",
        "loss_weight",
        "train",
        "loss",
    }
)
_MESSAGE_KEYS = frozenset(
    {"name", "tools", "functions", "reasoning_content", "reasoning", "thinking", "weight", "train", "loss", *_MEDIA}
)

Canonical = tuple[str, str, str | None, str | None, str | None]
"""prompt, completion, turns, instruction, input"""
Turns = list[dict[str, str]]
"""Messages, each with ``role`` (one of the values of `ROLES`) and ``content``."""


class _Reader:
    """Turns rows of one layout into canonical ones; the first usable row decides the layout."""

    def __init__(self, source: Source, columns: Mapping[str, str], side: str, prompts_only: bool) -> None:
        self.source, self.side, self.prompts_only = source, side, prompts_only
        for name in columns:
            if name not in _NAMES:
                raise ConfigError(f"columns: no row format has a column '{name}'; known are {', '.join(_NAMES)}")
        self.column = {name: columns.get(name, name) for name in _NAMES}
        known = _PROMPT_LAYOUTS if prompts_only else _LAYOUTS
        own = set(columns) - set(_BEFORE)
        self.candidates = [layout for layout in known if own <= set(layout.required + layout.optional)]
        if not self.candidates:
            raise ConfigError(f"columns: {', '.join(columns)} belong to no row format together; known are {_KNOWN}")
        self.mapped = dict(columns)
        self.layout: _Layout | None = None
        self.strange = 0  # rows read before the layout was known
        self.kinds: dict[str, type] = {}
        self.needed: tuple[tuple[str, str], ...] = ()
        self.before: Turns = []  # of the row that is read: its system prompt and history
        self.seen_columns: set[str] = set()  # of those that are known and not read
        self.seen_keys: set[str] = set()

    @property
    def wanted(self) -> frozenset[str]:
        return frozenset(self.column.values()) | _LABELS | _TEXTS

    def detect(self, row: Mapping[str, Any]) -> _Layout | None:
        for layout in self.candidates:
            if all(row.get(self.column[name]) is not None for name in layout.required):
                if "prompt" in layout.required or layout.name != "preference" or self.holds_messages(row):
                    return layout
        return None

    def holds_messages(self, row: Mapping[str, Any]) -> bool:
        chosen = row[self.column["chosen"]]
        if isinstance(chosen, str):
            try:
                chosen = as_messages(chosen)
            except ValueError:
                return True
        return isinstance(chosen, list)

    def settle(self, layout: _Layout) -> None:
        self.layout = layout
        answer = (self.side,) if layout.name == "preference" else ()
        used = tuple(name for name in layout.required if name not in ("chosen", "rejected")) + answer
        self.needed = tuple((name, self.column[name]) for name in used)

    def read(self, row: Mapping[str, Any], number: int, line: int | None) -> Canonical:
        """The canonical row.

        Raises:
            _Bad: This row cannot be used.
            DataError: The file mixes layouts.
        """
        if self.layout is None:
            layout = self.detect(row)
            if layout is None:
                self.strange += 1
                raise _Bad(self.no_layout(row))
            self.settle(layout)
        assert self.layout is not None
        values: dict[str, Any] = {}
        for name, column in self.needed:
            value = row.get(column)
            if not isinstance(value, str):
                value = self.not_text(name, value, row, number, line)
            values[name] = self.turns(value, column, must=name == "messages")
            kind = type(value)
            if self.kinds.get(name, kind) is not kind and name != "messages":
                before = _TYPE[self.kinds[name]]
                raise self.mixed(number, line, f"has {_TYPE[kind]} in '{column}' where rows before have {before}")
        self.before = self.turns_before(row)
        canonical = self.prompt(values, row) if self.prompts_only else self.convert(values, row)
        for text in canonical:
            if text is not None and not text.isascii():
                _check_unicode(text)
        if not self.kinds:
            self.kinds = {name: type(row[column]) for name, column in self.needed}
        self.seen_columns |= {name for name in row.keys() & (_LABELS | _MEDIA | _TEXTS) if _is_there(row[name])}
        return canonical

    def turns(self, value: Any, column: str, *, must: bool = False) -> Any:
        """A conversation as turns, given as a list or as text; other text as it is, unless there `must` be turns."""
        if isinstance(value, str):
            try:
                value = as_messages(value)
            except ValueError as error:
                raise _Bad(f"'{column}' {error}") from error
        if isinstance(value, str):
            if not must:
                return value
            read = as_list(value)
            if not isinstance(read, list):
                empty = is_blank(value)
                raise _Bad(f"has an empty '{column}'" if empty else f"'{column}' is text, not a list of messages")
            value = read
        return [self.turn(message, column) for message in value]

    def turn(self, message: Any, column: str) -> dict[str, str]:
        if not isinstance(message, Mapping):
            raise _Bad(f"'{column}' holds {_kind(message)} where a message is expected")
        if any(_is_there(message[key]) for key in message.keys() & _TOOL_CALLS):
            raise _Bad(f"'{column}' has a message with a tool call, which cannot be kept")
        role = message["from"] if message.get("role") is None and "from" in message else message.get("role")
        content = message["value"] if message.get("content") is None and "value" in message else message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise _Bad(f"'{column}' has a message without text in 'role' and 'content'")
        known = ROLES.get(role.strip().lower())
        if known is None:
            call = role.strip().lower() in _TOOL_CALLS
            raise _Bad(
                f"'{column}' has a message with a tool call, which cannot be kept"
                if call
                else f"'{column}' has a message of the role {spelled(role)}; known are system, user, assistant and "
                "tool"
            )
        if known == "assistant" and is_blank(content):
            raise _Bad(f"has an empty '{column}'")
        self.seen_keys |= {key for key in message.keys() & _MESSAGE_KEYS if _is_there(message[key])}
        return {"role": known, "content": content}

    def turns_before(self, row: Mapping[str, Any]) -> Turns:
        """What the columns of a system prompt and of earlier turns hold."""
        found: Turns = []
        column = self.column["system"]
        if _is_there(system := row.get(column)):
            if not isinstance(system, str):
                raise _Bad(f"'{column}' is {_kind(system)}, not text")
            if not is_blank(system):
                found.append({"role": "system", "content": system})
        column = self.column["history"]
        if _is_there(history := row.get(column)):
            history = as_list(history) if isinstance(history, str) else history
            if not isinstance(history, list):
                raise _Bad(f"'{column}' is {_kind(history)}, not a list of earlier turns")
            for turn in history:
                if isinstance(turn, list | tuple):
                    if len(turn) != 2:
                        raise _Bad(f"'{column}' holds a list that is no pair of question and answer")
                    found += [
                        self.turn({"role": role, "content": text}, column)
                        for role, text in zip(("user", "assistant"), turn, strict=True)
                    ]
                else:
                    found.append(self.turn(turn, column))
        return found

    def not_text(self, name: str, value: Any, row: Mapping[str, Any], number: int, line: int | None) -> Any:
        column = self.column[name]
        if isinstance(value, list):
            return value
        if value is None:
            other = self.detect(row)
            if other is not None and other != self.layout:
                assert self.layout is not None
                raise self.mixed(
                    number,
                    line,
                    f"has the columns {', '.join(self.column[n] for n in other.required)} where rows before have "
                    f"{', '.join(self.column[n] for n in self.layout.required)}",
                )
            raise _Bad(f"has no '{column}'" if column not in row else f"has an empty '{column}'")
        raise _Bad(f"'{column}' is {_kind(value)}, not text")

    def mixed(self, number: int, line: int | None, what: str) -> DataError:
        return DataError(
            f"{self.source.where}: mixed row formats: {place(number, line)} {what}; "
            "one file needs one row format, so split it"
        )

    def no_layout(self, row: Mapping[str, Any]) -> str:
        columns = ", ".join(map(str, list(row)[:12])) or "none"
        missing = [column for column in self.mapped.values() if column not in row]
        if missing:
            return f"has no column '{missing[0]}' (its columns: {columns})"
        for column, value in row.items():
            if isinstance(value, list) and value and isinstance(value[0], Mapping):
                if ROLE_KEYS & value[0].keys():
                    return f"fits no row format (its columns: {columns}) but has messages in {spelled(column)}"
                if not self.wanted & row.keys():
                    return f"is an object with a list under {spelled(column)}; save that list if it is the rows"
        if not self.prompts_only and any(row.get(self.column[name]) for name in ("prompt", "instruction")):
            return f"has no completion (its columns: {columns})"
        return f"fits no row format (its columns: {columns})"

    def prompt(self, values: Mapping[str, Any], row: Mapping[str, Any]) -> Canonical:
        """The canonical row without its completion."""
        answer = {"role": "assistant", "content": "-"}
        name, value = next(iter(values.items()))
        column = self.column[name]
        if name == "instruction":
            canonical = self.alpaca(value, answer["content"], row)
        elif isinstance(value, str):
            _check_prompt(value, column)
            canonical = self.single(value, answer["content"], column)
        else:
            open_end = not value or value[-1]["role"] != "assistant"
            canonical = self.conversation([*value, answer] if open_end else value, column)
        return canonical[0], "", *canonical[2:]

    def convert(self, values: Mapping[str, Any], row: Mapping[str, Any]) -> Canonical:
        assert self.layout is not None
        match self.layout.name:
            case "messages":
                return self.conversation(values["messages"], self.column["messages"])
            case "instruction-output":
                return self.alpaca(values["instruction"], values["output"], row)
            case "prompt-completion":
                answer = "completion"
            case "prompt-response":
                answer = "response"
            case _:
                answer = self.side
        return self.pair(values.get("prompt"), values[answer], answer)

    def pair(self, prompt: Any, completion: Any, answer: str) -> Canonical:
        column, prompt_column = self.column[answer], self.column["prompt"]
        if isinstance(completion, str):
            _check_completion(completion, column)
            if isinstance(prompt, str):
                _check_prompt(prompt, prompt_column)
                return self.single(prompt, completion, prompt_column)
            if prompt is None:
                raise _Bad(f"'{column}' is an answer alone and there is no prompt")
            return self.conversation([*prompt, {"role": "assistant", "content": completion}], prompt_column)
        if not completion:
            raise _Bad(f"has an empty '{column}'")
        # A list that starts with another speaker is the whole conversation, its prompt included.
        if completion[0]["role"] != "assistant" and answer in ("chosen", "rejected"):
            there = normalised_prompt("\n".join(turn["content"] for turn in completion))
            asked = [prompt or ""] if not isinstance(prompt, list) else [turn["content"] for turn in prompt]
            if any(normalised_prompt(text) not in there for text in asked):
                raise _Bad(f"'{column}' is a whole conversation in which the text of '{prompt_column}' is missing")
            return self.conversation(completion, column)
        if prompt is None:
            raise _Bad(f"'{column}' starts with an answer and there is no prompt")
        if isinstance(prompt, str):
            _check_prompt(prompt, prompt_column)
            prompt = [{"role": "user", "content": prompt}]
        return self.conversation([*prompt, *completion], column)

    def single(self, prompt: str, completion: str, column: str) -> Canonical:
        """One user turn and its answer, after what comes before."""
        if not self.before:
            return prompt, completion, None, None, None
        return self.conversation(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], column
        )

    def conversation(self, turns: Turns, column: str) -> Canonical:
        """Splits at the last answer; what follows it is not part of the row."""
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
        if last is None:
            raise _Bad(f"'{column}' has no assistant turn")
        completion, turns = turns[last]["content"], turns[:last]
        if not any(turn["role"] != "system" and not is_blank(turn["content"]) for turn in turns):
            raise _Bad(f"'{column}' has no prompt before the answer")
        before = [turn for turn in self.before if turn["role"] != "system" or turn not in turns]
        if {"system"} <= {turn["role"] for turn in before} & {turn["role"] for turn in turns}:
            raise _Bad(f"has one system prompt in '{self.column['system']}' and another in '{column}'")
        # Earlier turns follow a system prompt, whichever of the two brings it.
        lead = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), 0)
        turns = [*turns[:lead], *before, *turns[lead:]]
        if len(turns) == 1 and turns[0]["role"] == "user":
            return turns[0]["content"], completion, None, None, None
        prompt = "\n".join(turn["content"] for turn in turns)
        return prompt, completion, json.dumps(turns, ensure_ascii=False), None, None

    def alpaca(self, instruction: Any, output: Any, row: Mapping[str, Any]) -> Canonical:
        for name, value in (("instruction", instruction), ("output", output)):
            if not isinstance(value, str):
                raise _Bad(f"'{self.column[name]}' is {_kind(value)}, not text")
        context = row.get(self.column["input"])
        if context is not None and not isinstance(context, str):
            raise _Bad(f"'{self.column['input']}' is {_kind(context)}, not text")
        _check_prompt(instruction, self.column["instruction"])
        _check_completion(output, self.column["output"])
        if context is None or is_blank(context):
            return self.single(instruction, output, self.column["instruction"])
        prompt = f"{instruction}\n\n{context}"
        if self.before:
            return self.single(prompt, output, self.column["instruction"])
        return prompt, output, None, instruction, context

    def unread(self) -> tuple[set[str], set[str], set[str]]:
        """Known labels, other known columns and known keys of messages that the rows hold and that are not read."""
        read = {column for _, column in self.needed} | {self.column[name] for name in _BEFORE}
        if self.layout is not None:
            read |= {self.column[name] for name in self.layout.optional}
        seen = (self.seen_columns | (_MEDIA & set(self.source.columns or ()))) - read
        return seen & _LABELS, seen - _LABELS, self.seen_keys


_TYPE: dict[type, str] = {str: "text", list: "a list of messages"}


def _kind(value: Any) -> str:
    if isinstance(value, float) and value != value:
        return "NaN"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    known: dict[type, str] = {list: "a list", dict: "an object", bytes: "bytes"}
    return known.get(type(value), type(value).__name__)


def _is_there(value: Any) -> bool:
    """Whether a cell holds anything."""
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def _check_prompt(text: str, column: str) -> None:
    if is_blank(text):
        raise _Bad(f"has an empty '{column}'")


_check_completion = _check_prompt


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise _Bad(f"holds the lone surrogate \\u{code:04x}, which is no character") from None


# --- reading ------------------------------------------------------------------------------------------------------


def read_records(
    source: Source,
    *,
    work_dir: str | os.PathLike[str],
    side: Literal["chosen", "rejected"] = "chosen",
    columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
    prompts_only: bool = False,
    where: Sequence[Condition] | None = None,
) -> Records:
    """Reads a source into canonical rows on disk, in one pass and flat memory.

    Args:
        source: The rows.
        work_dir: Folder for the memory-mapped result.
        side: Which answer of a preference row is its completion.
        columns: Column that stands for a known one, ``{"prompt": "question"}``.
        on_bad_row: ``fail`` names the first ten rows that cannot be used; ``skip`` leaves them out, see
            `Records.refused`.
        prompts_only: Only prompts are needed: rows need no completion, and one that is there becomes an empty text.
        where: Only the rows for which all of these hold, see `Records.filtered`; None where the caller has no such
            option.

    Raises:
        DataError: Rows cannot be used, formats are mixed, or there is no row at all, or none as `where` asks.
        ConfigError: `columns` names something unknown.
    """
    import datasets

    reader = _Reader(source, columns or {}, side, prompts_only)
    if source.columns is not None:
        missing = [column for column in reader.mapped.values() if column not in source.columns]
        if missing:
            names = ", ".join(source.columns)
            raise DataError(f"{source.where}: has no column '{missing[0]}'; its columns are {names}")
    refused: list[Refused] = []
    bad = total = filtered = 0
    path = Path(work_dir) / "rows.arrow"
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as out,
        bar(f"read {source.name}") as progress,
    ):
        rows = _RowBuffer(out.write_batch)
        for row in source.scan(reader.wanted | {condition.column for condition in where or ()}):
            if where and row.value is not None and not _chosen(row.value, where, source):
                filtered += 1
                continue
            total += 1
            if not total % _FLUSH_ROWS:
                progress.advance(_FLUSH_ROWS)
            reason = row.reason
            if reason is None:
                assert row.value is not None
                try:
                    rows.add(row.number, reader.read(row.value, row.number, row.line))
                    continue
                except _Bad as error:
                    reason = str(error)
            bad += 1
            if on_bad_row == "skip" or len(refused) < _NAMED:
                refused.append(Refused(row.number, row.line, reason))
            if reader.layout is None and reader.strange >= _STRANGE:
                break
        rows.flush()
        if filtered and not total:
            asked = " and ".join(map(str, where or ()))
            raise DataError(f"{source.where}: none of {filtered} rows has {asked}; check the value of --where")
        _check(source, reader, refused, bad, total, on_bad_row)
    layout = reader.layout
    assert layout is not None
    return Records(
        datasets.Dataset.from_file(str(path)), source, layout.name, refused, filtered, _warnings(reader, where)
    )


def _chosen(row: Mapping[str, Any], where: Sequence[Condition], source: Source) -> bool:
    try:
        return all(condition.holds(row) for condition in where)
    except TypeError as error:
        asked = ", ".join(map(str, where))
        raise DataError(
            f"{source.where}: --where {asked}: a row {error} there; only text, numbers, true and false can be compared"
        ) from error


def _warnings(reader: _Reader, where: Sequence[Condition] | None) -> list[str]:
    """What the rows hold that is not read although it may matter, in one line."""
    labels, others, keys = reader.unread()
    labels -= {condition.column for condition in where or ()}
    named = [
        f"{kind}{'s' if len(names) > 1 else ''} {', '.join(sorted(names))}"
        for kind, names in (("column", labels | others), ("message key", keys))
        if names
    ]
    if not named:
        return []
    choose = f"; --where {min(labels)}=VALUE chooses rows by it" if labels and where is not None else ""
    return [f"{reader.source.where}: not read: {'; '.join(named)}{choose}"]


class _RowBuffer:
    def __init__(self, write: Callable[[pa.RecordBatch], None]) -> None:
        self._write = write
        self._numbers: list[int] = []
        self._rows: list[Canonical] = []
        self._characters = 0

    def add(self, number: int, row: Canonical) -> None:
        self._numbers.append(number)
        self._rows.append(row)
        self._characters += len(row[0]) + len(row[1])
        if len(self._rows) >= _FLUSH_ROWS or self._characters > _FLUSH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        if not self._rows:
            return
        texts = list(zip(*self._rows, strict=True))
        keys = [prompt_key(prompt) for prompt in texts[0]]
        arrays = [pa.array(self._numbers, pa.int64()), *(pa.array(text, pa.string()) for text in texts)]
        self._write(pa.record_batch([*arrays, pa.array(keys, pa.uint64())], schema=SCHEMA))
        self._numbers, self._rows, self._characters = [], [], 0


def _check(source: Source, reader: _Reader, refused: list[Refused], bad: int, total: int, on_bad_row: str) -> None:
    if total == 0:
        raise DataError(f"{source.where}: holds no rows; give a file with at least one")
    if bad < total and (not bad or on_bad_row == "skip"):
        return
    named: dict[str, list[str]] = {}
    for row in refused[:_NAMED]:
        named.setdefault(row.reason, []).append(place(row.row, row.line))
    what = "; ".join(f"{', '.join(places)} {reason}" for reason, places in named.items())
    if reader.layout is None and reader.strange == bad:
        first = refused[0]
        known = "prompt, messages or instruction[+input]" if reader.prompts_only else _KNOWN
        raise DataError(
            f"{source.where}: {place(first.row, first.line)} {first.reason}; known row formats are {known}; "
            "map other columns with --columns"
        )
    if bad == total and on_bad_row == "skip":
        raise DataError(f"{source.where}: none of the {total} rows can be used: {what}; mend them")
    more = f" and {bad - _NAMED} more" if bad > _NAMED else ""
    rows = "1 row" if bad == 1 else f"{bad} rows"
    raise DataError(
        f"{source.where}: {rows} of {total} cannot be used: {what}{more}; "
        "mend or delete them, or leave them out with --on-bad-row skip"
    )
