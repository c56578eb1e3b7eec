"""Parsing of conversations that are text (JSON, Python's notation, transcripts); names of roles."""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from pharmacist.data.formats.json_text import decode_json


ROLES = {
    "system": "system",
    "developer": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "ai", "chatgpt", "chatbot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "environment"), "tool"),
}
"""Role as files name it -> role as chat templates name it."""

ROLE_KEYS, _CONTENT = ({"role", "from"}, {"content", "value"})
_ROLE_KEY, _CONTENT_KEY, _SPEAKER_KEY = (
    re.compile(rf"""\\?["'](?:{"|".join(sorted(keys))})\\?["']\s*:""")
    for keys in (ROLE_KEYS, _CONTENT, {"user", "human"})
)
# Each run of white space is tried once, from its beginning, however long it is.
_SPEAKER = re.compile(r"(?<!\s)(?:\A|(?=\s*?\n[ \t\r]*\n))\s*(Human|User|Assistant|System):")


def as_messages(text: str) -> Any:
    """Parses a conversation that is text (JSON, Python's notation, or a transcript); other text stays unchanged.

    A ValueError where it looks like a list of messages but cannot be parsed.
    """
    start = text[:64].lstrip("\"' \t\r\n")
    if start.startswith(("Human:", "User:", "Assistant:", "System:")):
        return _transcript(text)
    if not start.startswith(("[", "{", "(")) or not (_ROLE_KEY.search(text) or _SPEAKER_KEY.search(text)):
        return text
    value = as_list(text)
    if isinstance(value, Mapping):  # a row of messages, one message, or an answer in JSON
        role = value.get("role", value.get("from"))
        one = [value] if isinstance(role, str) and role.strip().lower() in ROLES else None
        value = next((value[key] for key in ("messages", "conversations") if key in value), one)
        if value is None:
            return text
    if isinstance(value, list | tuple) and value and all(isinstance(turn, Mapping) for turn in value):
        turns = [bool(ROLE_KEYS & turn.keys() and _CONTENT & turn.keys()) for turn in value]
        if all(turns):
            return list(value)
        speakers = {key for turn in value for key in turn}
        messages = any(turns) or (len(speakers) > 1 and speakers <= ROLES.keys())
    else:
        found = _ROLE_KEY.search(text) and _CONTENT_KEY.search(text)
        messages = bool(found and (value is not None or re.match(r"[\[(]\s*\{", start)))
    if messages:
        raise ValueError("looks like a list of messages but cannot be parsed")
    return text


def as_list(text: str) -> Any:
    """Parses JSON, or a value in Python's notation as pandas writes it to CSV; None where a text is neither."""
    try:
        return decode_json(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes
            tree = ast.parse(text.strip(), mode="eval")
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict) and len({ast.dump(key) for key in node.keys if key}) < len(node.keys):
                return None  # a key that is given twice
        return ast.literal_eval(tree)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def without_system(prompt: str, turns: str | None) -> str:
    """The prompt of a canonical row without system prompts: what is asked, whatever rows of its file begin with."""
    if turns is None:
        return prompt
    return "\n".join(turn["content"] for turn in json.loads(turns) if turn["role"] != "system")


def _transcript(text: str) -> Any:
    r"""Turns of ``\n\nHuman: ...\n\nAssistant: ...``, as Anthropic's HH files have them; other text as it is."""
    starts = list(_SPEAKER.finditer(text))
    if not starts or starts[0].start() or (len(starts) == 1 and text.count("\n", 0, starts[0].start(1)) < 2):
        return text
    ends = [*(match.start() for match in starts[1:]), len(text)]
    turns = [
        {"role": match[1], "content": text[match.end() : end].strip()} for match, end in zip(starts, ends, strict=True)
    ]
    if turns[-1]["role"] == "Assistant" and not turns[-1]["content"]:
        turns.pop()  # where the answer is to come
    return turns
