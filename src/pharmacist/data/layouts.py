"""How rows are laid out, told by their columns, and one row of any layout as a prompt and a completion."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.data.conversations import ROLE_KEYS, ROLES, as_list, as_messages
from pharmacist.data.formats import Row, Source, spelled
from pharmacist.data.normalise import is_blank, normalised_prompt


class BadRow(Exception):
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
_TYPE: dict[type, str] = {str: "text", list: "a list of messages"}
_TOOL_CALLS = frozenset({"tool_calls", "tool_call", "function_call"})

# Columns and keys of messages that change what a row means, and that nothing here reads.
_LABELS = frozenset(
    "label labels is_safe is_unsafe is_harmful is_toxic is_refusal safe unsafe harmful toxic toxicity flagged "
    "safety_label kto_tag is_response_safe is_response_0_safe is_response_1_safe prompt_label response_label "
    "prompt_harm_label response_harm_label response_refusal_label".split()
)
_MEDIA = frozenset("image images audio audios video videos".split())
_TEXTS = frozenset(
    "input context system_prompt system_message tools functions tool_calls reasoning_content reasoning thinking "
    "weight weights sample_weight loss_weight train loss".split()
)
_MESSAGE_KEYS = _MEDIA | set("name tools functions reasoning_content reasoning thinking weight train loss".split())

Canonical = tuple[str, str, str | None, str | None, str | None]
"""prompt, completion, turns, instruction, input"""
Turns = list[dict[str, str]]
"""Messages, each with ``role`` (one of the values of `ROLES`) and ``content``."""


class RowReader:
    """Turns rows of one layout into canonical ones; the first usable row decides the layout.

    Args:
        source: Where the rows come from.
        columns: Name of a layout's column -> the source's own.
        side: Which answer of a preference row is its completion.
        prompts_only: Whether rows need no completion.

    Attributes:
        layout: Name of the layout; None before the first row that has one.
        known: The layouts, for messages.
        wanted: Columns that are looked at.
        strange: Rows that were read before the first one that has a layout.

    Raises:
        ConfigError: No layout has such columns.
    """

    def __init__(self, source: Source, columns: Mapping[str, str], side: str, prompts_only: bool) -> None:
        self.source, self.side, self.prompts_only = source, side, prompts_only
        for name in columns:
            if name not in _NAMES:
                raise ConfigError(f"columns: no row format has a column '{name}'; known are {', '.join(_NAMES)}")
        self.column = {name: columns.get(name, name) for name in _NAMES}
        own = set(columns) - set(_BEFORE)
        known = _PROMPT_LAYOUTS if prompts_only else _LAYOUTS
        self.candidates = [layout for layout in known if own <= set(layout.required + layout.optional)]
        if not self.candidates:
            raise ConfigError(f"columns: {', '.join(columns)} belong to no row format together; known are {_KNOWN}")
        self.mapped = dict(columns)
        self.known = "prompt, messages or instruction[+input]" if prompts_only else _KNOWN
        self.wanted = frozenset(self.column.values()) | _LABELS | _TEXTS
        self._layout: _Layout | None = None
        self.layout: str | None = None
        self.strange = 0
        self.place = ""  # of the row that is read
        self.kinds: dict[str, type] = {}
        self.needed: list[tuple[str, str]] = []
        self.before: Turns = []  # of the row that is read: its system prompt and history
        self.seen_columns: set[str] = set()  # of those that are known and not read
        self.seen_keys: set[str] = set()

    def read(self, source_row: Row) -> Canonical:
        """The canonical row.

        Raises:
            BadRow: This row cannot be used.
            DataError: The file mixes layouts.
        """
        row, self.place = source_row.value, source_row.place
        if row is None:
            raise BadRow(source_row.reason)
        if self._layout is None:
            self._settle(row)
        values: dict[str, Any] = {}
        for name, column in self.needed:
            value = row.get(column)
            if not isinstance(value, str | list):
                self._refuse(name, value, row)
            values[name] = self._turns(value, column, must=name == "messages")
            kind = type(value)
            if self.kinds.get(name, kind) is not kind and name != "messages":
                before = _TYPE[self.kinds[name]]
                raise self._mixed(f"has {_TYPE[kind]} in '{column}' where rows before have {before}")
        self.before = self._turns_before(row)
        canonical = self._prompt(values, row) if self.prompts_only else self._row(values, row)
        for text in canonical:
            try:
                (text or "").encode("utf-8")
            except UnicodeEncodeError as error:
                code = ord(error.object[error.start])
                raise BadRow(f"holds the lone surrogate \\u{code:04x}, which is no character") from None
        if not self.kinds:
            self.kinds = {name: type(row[column]) for name, column in self.needed}
        self.seen_columns |= {name for name in row.keys() & (_LABELS | _MEDIA | _TEXTS) if _is_there(row[name])}
        return canonical

    def unread(self) -> tuple[set[str], set[str], set[str]]:
        """Known labels, other known columns and known keys of messages that the rows hold and that are not read."""
        read = {column for _, column in self.needed} | {self.column[name] for name in _BEFORE}
        if self._layout is not None:
            read |= {self.column[name] for name in self._layout.optional}
        seen = (self.seen_columns | (_MEDIA & set(self.source.columns or ()))) - read
        return seen & _LABELS, seen - _LABELS, self.seen_keys

    def _settle(self, row: Mapping[str, Any]) -> None:
        layout = self._fitting(row)
        if layout is None:
            self.strange += 1
            raise BadRow(self._no_layout(row))
        self._layout, self.layout = layout, layout.name
        used = [name for name in layout.required if name not in ("chosen", "rejected")]
        used += [self.side] if layout.name == "preference" else []
        self.needed = [(name, self.column[name]) for name in used]

    def _fitting(self, row: Mapping[str, Any]) -> _Layout | None:
        for layout in self.candidates:
            if all(row.get(self.column[name]) is not None for name in layout.required):
                if layout.required != ("chosen", "rejected") or _holds_messages(row[self.column["chosen"]]):
                    return layout
        return None

    def _no_layout(self, row: Mapping[str, Any]) -> str:
        columns = f"(its columns: {', '.join(map(str, list(row)[:12])) or 'none'})"
        missing = [column for column in self.mapped.values() if column not in row]
        if missing:
            return f"has no column '{missing[0]}' {columns}"
        for column, value in row.items():
            if isinstance(value, list) and value and isinstance(value[0], Mapping):
                if ROLE_KEYS & value[0].keys():
                    return f"fits no row format {columns} but has messages in {spelled(column)}"
                if not self.wanted & row.keys():
                    return f"is an object with a list under {spelled(column)}; save that list if it is the rows"
        if not self.prompts_only and any(row.get(self.column[name]) for name in ("prompt", "instruction")):
            return f"has no completion {columns}"
        return f"fits no row format {columns}"

    def _refuse(self, name: str, value: Any, row: Mapping[str, Any]) -> NoReturn:
        """Says what is wrong with a cell that holds neither text nor a list."""
        column, other = self.column[name], self._fitting(row)
        if value is not None:
            raise BadRow(f"'{column}' is {_kind(value)}, not text")
        if other is not None and other != self._layout and self._layout is not None:
            here, before = (", ".join(self.column[n] for n in of.required) for of in (other, self._layout))
            raise self._mixed(f"has the columns {here} where rows before have {before}")
        raise BadRow(f"has no '{column}'" if column not in row else f"has an empty '{column}'")

    def _mixed(self, what: str) -> DataError:
        return DataError(
            f"{self.source.where}: mixed row formats: {self.place} {what}; one file needs one row format, so split it"
        )

    def _turns(self, value: str | list[Any], column: str, *, must: bool = False) -> str | Turns:
        """A conversation as turns, given as a list or as text; other text as it is, unless there `must` be turns."""
        read: Any = value
        if isinstance(value, str):
            try:
                read = as_messages(value)
            except ValueError as error:
                raise BadRow(f"'{column}' {error}") from error
            if isinstance(read, str):
                if not must:
                    return read
                _check_filled(value, column)
                read = as_list(read)
                if not isinstance(read, list):
                    raise BadRow(f"'{column}' is text, not a list of messages")
        return [self._turn(message, column) for message in read]

    def _turn(self, message: Any, column: str) -> dict[str, str]:
        if not isinstance(message, Mapping):
            raise BadRow(f"'{column}' holds {_kind(message)} where a message is expected")
        role = message["from"] if message.get("role") is None and "from" in message else message.get("role")
        content = message["value"] if message.get("content") is None and "value" in message else message.get("content")
        name = role.strip().lower() if isinstance(role, str) else ""
        if name in _TOOL_CALLS or any(_is_there(message[key]) for key in message.keys() & _TOOL_CALLS):
            raise BadRow(f"'{column}' has a message with a tool call, which cannot be kept")
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRow(f"'{column}' has a message without text in 'role' and 'content'")
        if name not in ROLES:
            known = "known are system, user, assistant and tool"
            raise BadRow(f"'{column}' has a message of the role {spelled(role)}; {known}")
        if ROLES[name] == "assistant":
            _check_filled(content, column)
        self.seen_keys |= {key for key in message.keys() & _MESSAGE_KEYS if _is_there(message[key])}
        return {"role": ROLES[name], "content": content}

    def _turns_before(self, row: Mapping[str, Any]) -> Turns:
        """What the columns of a system prompt and of earlier turns hold."""
        found: Turns = []
        column = self.column["system"]
        if _is_there(system := row.get(column)) and not is_blank(text := _text(system, column)):
            found.append({"role": "system", "content": text})
        column = self.column["history"]
        if _is_there(history := row.get(column)):
            history = as_list(history) if isinstance(history, str) else history
            if not isinstance(history, list):
                raise BadRow(f"'{column}' is {_kind(history)}, not a list of earlier turns")
            for turn in history:
                if isinstance(turn, list | tuple):
                    if len(turn) != 2:
                        raise BadRow(f"'{column}' holds a list that is no pair of question and answer")
                    pair = zip(("user", "assistant"), turn, strict=True)
                    found += [self._turn({"role": role, "content": text}, column) for role, text in pair]
                else:
                    found.append(self._turn(turn, column))
        return found

    def _prompt(self, values: Mapping[str, Any], row: Mapping[str, Any]) -> Canonical:
        """The canonical row without its completion."""
        ((name, value),) = values.items()
        answer, column = {"role": "assistant", "content": "-"}, self.column[name]
        if name == "instruction":
            canonical = self._alpaca(value, answer["content"], row)
        elif isinstance(value, str):
            canonical = self._single(value, answer["content"], column)
        else:
            open_end = not value or value[-1]["role"] != "assistant"
            canonical = self._conversation([*value, answer] if open_end else value, column)
        return canonical[0], "", *canonical[2:]

    def _row(self, values: Mapping[str, Any], row: Mapping[str, Any]) -> Canonical:
        if "messages" in values:
            return self._conversation(values["messages"], self.column["messages"])
        if "instruction" in values:
            return self._alpaca(values["instruction"], values["output"], row)
        answer = self.needed[-1][0]
        prompt, completion, column = values.get("prompt"), values[answer], self.column[answer]
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        _check_filled(completion, column)
        # A list that starts with another speaker is the whole conversation, its prompt included.
        if isinstance(completion, list) and completion[0]["role"] != "assistant" and answer in ("chosen", "rejected"):
            there = normalised_prompt("\n".join(turn["content"] for turn in completion))
            if any(normalised_prompt(turn["content"]) not in there for turn in asked or ()):
                missing = self.column["prompt"]
                raise BadRow(f"'{column}' is a whole conversation in which the text of '{missing}' is missing")
            return self._conversation(completion, column)
        if asked is None:
            what = "is an answer alone" if isinstance(completion, str) else "starts with an answer"
            raise BadRow(f"'{column}' {what} and there is no prompt")
        if isinstance(prompt, str):
            _check_filled(prompt, self.column["prompt"])
        if isinstance(completion, str):
            column, completion = self.column["prompt"], [{"role": "assistant", "content": completion}]
        return self._conversation([*asked, *completion], column)

    def _single(self, prompt: str, completion: str, column: str) -> Canonical:
        """One user turn and its answer, after what comes before."""
        _check_filled(prompt, column)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return self._conversation(turns, column)

    def _conversation(self, turns: Turns, column: str) -> Canonical:
        """Splits at the last answer; what follows it is not part of the row."""
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
        if last is None:
            raise BadRow(f"'{column}' has no assistant turn")
        completion, turns = turns[last]["content"], turns[:last]
        if not any(turn["role"] != "system" and not is_blank(turn["content"]) for turn in turns):
            raise BadRow(f"'{column}' has no prompt before the answer")
        before = [turn for turn in self.before if turn["role"] != "system" or turn not in turns]
        if {"system"} <= {turn["role"] for turn in before} & {turn["role"] for turn in turns}:
            raise BadRow(f"has one system prompt in '{self.column['system']}' and another in '{column}'")
        # Earlier turns follow a system prompt, whichever of the two brings it.
        lead = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), 0)
        turns = [*turns[:lead], *before, *turns[lead:]]
        if len(turns) == 1 and turns[0]["role"] == "user":
            return turns[0]["content"], completion, None, None, None
        prompt = "\n".join(turn["content"] for turn in turns)
        return prompt, completion, json.dumps(turns, ensure_ascii=False), None, None

    def _alpaca(self, instruction: Any, output: Any, row: Mapping[str, Any]) -> Canonical:
        columns = [self.column[name] for name in ("instruction", "output", "input")]
        context = row.get(columns[2])
        for column, value in zip(columns, (instruction, output, "" if context is None else context), strict=True):
            _text(value, column)
        _check_filled(instruction, columns[0])
        _check_filled(output, columns[1])
        if context is None or is_blank(context):
            return self._single(instruction, output, columns[0])
        prompt = f"{instruction}\n\n{context}"
        return (
            self._single(prompt, output, columns[0]) if self.before else (prompt, output, None, instruction, context)
        )


def _holds_messages(chosen: Any) -> bool:
    try:
        return isinstance(as_messages(chosen) if isinstance(chosen, str) else chosen, list)
    except ValueError:
        return True


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


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"'{column}' is {_kind(value)}, not text")
    return value


def _check_filled(value: str | Turns, column: str) -> None:
    if not value or (isinstance(value, str) and is_blank(value)):
        raise BadRow(f"has an empty '{column}'")
