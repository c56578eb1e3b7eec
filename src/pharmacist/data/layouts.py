"""Row layouts, recognised by their columns, and the conversion of a row of any layout to a prompt and a completion."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.data.conversations import ROLE_KEYS, ROLES, as_list, as_messages
from pharmacist.data.formats import Row, Source, kind_of, spelled
from pharmacist.data.normalise import is_blank, normalised_prompt
from pharmacist.data.where import Condition


class BadRow(Exception):
    """A row that cannot be used; the text says why."""


class Layout(NamedTuple):
    """A row layout: its name and its columns."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


_LAYOUTS = (
    Layout("prompt-completion", ("prompt", "completion")),
    Layout("preference", ("prompt", "chosen", "rejected")),
    Layout("messages", ("messages",)),
    Layout("instruction-output", ("instruction", "output"), ("input",)),
    Layout("prompt-response", ("prompt", "response")),
    Layout("preference", ("chosen", "rejected")),  # message lists that hold the prompt themselves
)
_PROMPT_LAYOUTS = (
    Layout("prompt", ("prompt",)),
    Layout("messages", ("messages",)),
    Layout("instruction", ("instruction",), ("input",)),
)
_BEFORE = ("system", "history")
"""Columns of any layout that hold turns before those of the layout."""
OPTIONAL = frozenset({"input", *_BEFORE})
"""Columns that rows may lack."""
_PLAIN, _ANSWERS = ({"instruction", "output"}, {"completion", "response"})
_FIRST_ROLE = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from)["']\s*:\s*["'](\w+)""")
_NAMES = tuple(dict.fromkeys([*(name for of in _LAYOUTS for name in of.required + of.optional), *_BEFORE]))
_KNOWN = "prompt+completion, messages, instruction[+input]+output, prompt+chosen+rejected or prompt+response"
_TYPE: dict[type, str] = {str: "text", list: "a list of messages"}
_TOOL_CALLS = frozenset({"tool_calls", "tool_call", "function_call"})

# Columns and keys of messages that can change the meaning of a row and that are not read; `RowReader.warnings`.
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
    """Converts rows of one layout to canonical rows; the first usable row decides the layout.

    The arguments are those of `records.read_records`.

    Attributes:
        layout: The layout of the first usable row; before that one of the last row, None where it has none.
        known: The layouts, for messages.
        read_columns: Columns that are read.
        without_layout: Number of rows without a layout before the first usable one.
    """

    def __init__(self, source: Source, columns: Mapping[str, str], side: str, prompts_only: bool) -> None:
        self.source, self.side, self.prompts_only = source, side, prompts_only
        for name in columns:
            if name not in _NAMES:
                raise ConfigError(f"columns: no row format has a column '{name}'; known are {', '.join(_NAMES)}")
        self.column = {name: columns.get(name, name) for name in _NAMES}
        mapped = set(columns) - set(_BEFORE)
        self.known = "prompt, messages or instruction[+input]" if prompts_only else _KNOWN
        layouts = _PROMPT_LAYOUTS if prompts_only else _LAYOUTS
        self.candidates = [layout for layout in layouts if mapped <= set(layout.required + layout.optional)]
        if not self.candidates:
            names = ", ".join(columns)
            raise ConfigError(f"columns: {names} belong to no row format together; known are {self.known}")
        self.mapped = dict(columns)
        self.read_columns = frozenset(self.column.values()) | _LABELS | _TEXTS
        self.layout: Layout | None = None
        self.without_layout = 0
        self.kinds: dict[str, type] = {}
        self.needed: list[tuple[str, str]] = []
        self.where = ""  # the row that is read, for messages
        self.before: Turns = []  # the system prompt and the history of the row that is read
        self.seen_columns: set[str] = set()  # known ones that are not part of the layout
        self.seen_keys: set[str] = set()

    def read(self, source_row: Row) -> Canonical:
        """The canonical row; a BadRow where it cannot be used, a DataError where the file mixes layouts."""
        row, self.where = source_row.value, source_row.where
        if row is None:
            raise BadRow(source_row.reason)
        if not self.kinds:  # no row could be used so far
            self.layout = self._fitting(row)
            if self.layout is None:
                self.without_layout += 1
                raise BadRow(self._no_layout(row))
            other = "rejected" if self.side == "chosen" else "chosen"
            self.needed = [(name, self.column[name]) for name in self.layout.required if name != other]
        values: dict[str, Any] = {}
        for name, column in self.needed:
            value = row.get(column)
            if not isinstance(value, str | list):
                self._refuse(name, value, row)
            values[name] = _text(value, column) if name in _PLAIN else self._turns(value, name)
            kind = type(value)
            if self.kinds.get(name, kind) is not kind and name != "messages":
                before = _TYPE[self.kinds[name]]
                raise self._mixed(f"has {_TYPE[kind]} in '{column}' where rows before have {before}")
        self.before = self._turns_before(row)
        canonical = self._prompt(values, row) if self.prompts_only else self._row(values, row)
        try:
            "".join(filter(None, canonical)).encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise BadRow(f"holds the lone surrogate \\u{code:04x}, which is not a character") from None
        if not self.kinds:
            self.kinds = {name: type(row[column]) for name, column in self.needed}
        self.seen_columns |= {name for name in row.keys() & (_LABELS | _MEDIA | _TEXTS) if _is_there(row[name])}
        return canonical

    def warnings(self, where: Sequence[Condition] | None) -> list[str]:
        """One line that names the columns and message keys that are not read although they may matter."""
        assert self.layout is not None
        read = {column for _, column in self.needed} | {condition.column for condition in where or ()} & _LABELS
        read |= {self.column[name] for name in (*_BEFORE, *self.layout.optional)}
        seen = (self.seen_columns | (_MEDIA & set(self.source.columns or ()))) - read
        named = [
            f"{kind}{'s' if len(names) > 1 else ''} {', '.join(sorted(names))}"
            for kind, names in (("column", seen), ("message key", self.seen_keys))
            if names
        ]
        labels = seen & _LABELS
        choose = f"; --where {min(labels)}=VALUE chooses rows by it" if labels and where is not None else ""
        return [f"{self.source.where}: not read: {'; '.join(named)}{choose}"] if named else []

    def _fitting(self, row: Mapping[str, Any]) -> Layout | None:
        for layout in self.candidates:
            if all(row.get(self.column[name]) is not None for name in layout.required):
                if layout.required != ("chosen", "rejected") or _holds_messages(row[self.column["chosen"]]):
                    return layout
        return None

    def _no_layout(self, row: Mapping[str, Any]) -> str:
        names = self.source.columns or list(row)  # of some formats only the columns are read that are known
        columns = f"(its columns: {', '.join(map(str, names[:12])) or 'none'})"
        missing = [column for column in self.mapped.values() if column not in row]
        if missing:
            return f"has no column '{missing[0]}' {columns}"
        for column, value in row.items():
            if isinstance(value, list) and value and isinstance(value[0], Mapping):
                if ROLE_KEYS & value[0].keys():
                    return f"fits no row format {columns} but has messages in {spelled(str(column))}"
                if not self.read_columns & row.keys():
                    return f"is an object with a list under {spelled(str(column))}; save that list if it is the rows"
        if not self.prompts_only and any(row.get(self.column[name]) for name in ("prompt", "instruction")):
            return f"has no completion {columns}"
        return f"fits no row format {columns}"

    def _refuse(self, name: str, value: Any, row: Mapping[str, Any]) -> NoReturn:
        """Raises the error for a cell that holds neither text nor a list."""
        column, other = self.column[name], self._fitting(row)
        if value is not None:
            raise BadRow(f"'{column}' is {kind_of(value)}, not text")
        if other is not None and other != self.layout and self.layout is not None:
            here, before = (", ".join(self.column[n] for n in of.required) for of in (other, self.layout))
            raise self._mixed(f"has the columns {here} where rows before have {before}")
        raise BadRow(f"has no '{column}'" if column not in row else f"has an empty '{column}'")

    def _mixed(self, what: str) -> DataError:
        return DataError(
            f"{self.source.where}: mixed row formats: {self.where} {what}; one file needs one row format, so split it"
        )

    def _turns(self, value: str | list[Any], name: str) -> str | Turns:
        """The turns of a conversation, a list or text; other text unchanged, a BadRow where messages are needed."""
        read, column = value, self.column[name]
        if isinstance(value, str):
            try:
                read = as_messages(value)
            except ValueError as error:
                start = _FIRST_ROLE.match(value)
                if name in _ANSWERS and not (start and _is_answer({"role": start[1]})):
                    return value
                raise BadRow(f"'{column}' {error}") from error
            if name in _ANSWERS and read and not (isinstance(read, list) and _is_answer(read[0])):
                return value  # an answer that is itself a dialogue
            if isinstance(read, str):
                if name != "messages":
                    return read
                _check_filled(value, column)
                read = as_list(read)
                if not isinstance(read, list):
                    raise BadRow(f"'{column}' is text, not a list of messages")
        return [self._turn(message, column) for message in read]

    def _turn(self, message: Any, column: str) -> dict[str, str]:
        if not isinstance(message, Mapping):
            raise BadRow(f"'{column}' holds {kind_of(message)} where a message is expected")
        role = _role(message)
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
        """The turns that the columns of a system prompt and of a history hold."""
        found: Turns = []
        column = self.column["system"]
        if _is_there(system := row.get(column)) and not is_blank(text := _text(system, column)):
            found.append({"role": "system", "content": text})
        column = self.column["history"]
        if _is_there(history := row.get(column)):
            history = as_list(history) if isinstance(history, str) else history
            if not isinstance(history, list):
                raise BadRow(f"'{column}' is {kind_of(history)}, not a list of earlier turns")
            for turn in history:
                if isinstance(turn, list | tuple):
                    if len(turn) != 2:
                        raise BadRow(f"'{column}' contains a list that is not a pair of question and answer")
                    pair = zip(("user", "assistant"), turn, strict=True)
                    found += [self._turn({"role": role, "content": text}, column) for role, text in pair]
                else:
                    found.append(self._turn(turn, column))
        return found

    def _prompt(self, values: Mapping[str, Any], row: Mapping[str, Any]) -> Canonical:
        """The canonical row without its completion."""
        ((name, value),) = values.items()
        if name == "instruction":
            canonical = self._alpaca(value, "-", row)
        else:
            turns = [_user(value, self.column[name])] if isinstance(value, str) else value
            open_end = not turns or turns[-1]["role"] != "assistant"
            canonical = self._conversation([*turns, _assistant("-")] if open_end else turns, self.column[name])
        return canonical[0], "", *canonical[2:]

    def _row(self, values: Mapping[str, Any], row: Mapping[str, Any]) -> Canonical:
        if "messages" in values:
            return self._conversation(values["messages"], self.column["messages"])
        if "instruction" in values:
            return self._alpaca(values["instruction"], values["output"], row)
        answer = self.needed[-1][0]
        prompt, completion, column = values.get("prompt"), values[answer], self.column[answer]
        _check_filled(completion, column)
        # A list that starts with another speaker is the whole conversation, its prompt included.
        if isinstance(completion, list) and completion[0]["role"] != "assistant" and answer in ("chosen", "rejected"):
            there = normalised_prompt("\n".join(turn["content"] for turn in completion))
            asked = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt or ()]
            if any(normalised_prompt(text) not in there for text in asked):
                missing = self.column["prompt"]
                raise BadRow(f"'{column}' is a whole conversation in which the text of '{missing}' is missing")
            return self._conversation(completion, column)
        if prompt is None:
            what = "is an answer alone" if isinstance(completion, str) else "starts with an answer"
            raise BadRow(f"'{column}' {what} and there is no prompt")
        turns = [_user(prompt, self.column["prompt"])] if isinstance(prompt, str) else prompt
        if isinstance(completion, str):
            return self._conversation([*turns, _assistant(completion)], self.column["prompt"])
        return self._conversation([*turns, *completion], column)

    def _conversation(self, turns: Turns, column: str) -> Canonical:
        """Splits turns at the last answer; the turns after it are not part of the row."""
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

    def _alpaca(self, instruction: str, output: str, row: Mapping[str, Any]) -> Canonical:
        columns = [self.column[name] for name in ("instruction", "output", "input")]
        context = _text(row[columns[2]], columns[2]) if _is_there(row.get(columns[2])) else ""
        _check_filled(instruction, columns[0])
        _check_filled(output, columns[1])
        alone = is_blank(context)
        prompt = instruction if alone else f"{instruction}\n\n{context}"
        if alone or self.before:
            return self._conversation([_user(prompt, columns[0]), _assistant(output)], columns[0])
        return prompt, output, None, instruction, context


def _user(text: str, column: str) -> dict[str, str]:
    """A prompt as a turn; a BadRow where it is empty."""
    _check_filled(text, column)
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _role(message: Mapping[str, Any]) -> Any:
    return message["from"] if message.get("role") is None and "from" in message else message.get("role")


def _is_answer(message: Mapping[str, Any]) -> bool:
    return ROLES.get(str(_role(message)).strip().lower()) == "assistant"


def _holds_messages(chosen: Any) -> bool:
    try:
        return isinstance(as_messages(chosen) if isinstance(chosen, str) else chosen, list)
    except ValueError:
        return True


def _is_there(value: Any) -> bool:
    """Whether a cell is neither null nor empty, nor NaN, which stands for null in rows of pandas."""
    return value is not None and value == value and not (isinstance(value, str | list | dict) and not value)


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"'{column}' is {kind_of(value)}, not text")
    return value


def _check_filled(value: str | Turns, column: str) -> None:
    if not value or (isinstance(value, str) and is_blank(value)):
        raise BadRow(f"has an empty '{column}'")
