"""Prompt templates: rendering of a canonical row to the text in front of its completion.

A template travels with every model that was trained with it (``pharmacist_template.json``), because training and
evaluation must agree to the last newline.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError, TemplateSyntaxError

from pharmacist.core.console import by_reason
from pharmacist.core.errors import CompatibilityError, ConfigError, DataError, one_line
from pharmacist.core.files import read_json, write_json


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_NAME = "pharmacist_template.json"

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Template:
    """How a prompt is rendered.

    Attributes:
        kind: ``chat`` (a Jinja chat template) or ``alpaca`` (the Stanford Alpaca text, ending with a newline).
        chat_template: The Jinja source of a chat template.
    """

    kind: Literal["chat", "alpaca"]
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("chat", "alpaca") or (self.kind == "chat") != (self.chat_template is not None):
            raise ConfigError(f"template '{self.kind}': must be 'chat' with a chat template, or 'alpaca' without one")

    def render(self, records: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
        """The texts of canonical rows' prompts, each up to where its completion starts.

        Only ``prompt``, ``turns``, ``instruction`` and ``input`` are read; the tokenizer gives a chat template its
        special tokens. A DataError where the chat template refuses the turns.
        """
        texts, refused = self.try_render(records, tokenizer)
        if refused:
            raise DataError(refusal([(records[i].get("row", "?"), reason) for i, reason in refused.items()]))
        return texts

    def try_render(
        self, records: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase"
    ) -> tuple[list[str], dict[int, str]]:
        """`render` where the chat template may refuse rows or leave text of them out: their texts are empty.

        Also gives position -> reason of the refused rows.
        """
        if self.kind == "alpaca":
            return [_alpaca(record) for record in records], {}
        conversations = [conversation(record) for record in records]
        refused: dict[int, str] = {}
        try:
            texts = self._chat(conversations, tokenizer)
        except Exception:  # templates raise errors of any type: find the rows
            texts = [""] * len(records)
            for position, turns in enumerate(conversations):
                try:
                    (texts[position],) = self._chat([turns], tokenizer)
                except Exception as error:
                    refused[position] = f"the chat template rejects its turns ({one_line(error)})"
        dropped = cache(partial(self._dropped_role, tokenizer))  # by roles, for templates treat turns by their roles
        for position, turns in enumerate(conversations):
            if position not in refused:
                lost = dropped(*(turn["role"] for turn in turns)) or _lost_role(turns, texts[position])
                if lost is not None:
                    texts[position] = ""
                    refused[position] = f"the chat template leaves out the text of a turn of the role {lost}"
        return texts, refused

    def _dropped_role(self, tokenizer: "PreTrainedTokenizerBase", *roles: str) -> str | None:
        """The first role whose turn is missing when a conversation of these roles is rendered; None if none is."""
        turns = [{"role": role, "content": f"qz{position}zq"} for position, role in enumerate(roles)]
        try:
            (text,) = self._chat([turns], tokenizer)
        except Exception:  # it wants something of the contents, which the row itself may have
            return None
        return next((turn["role"] for turn in turns if turn["content"] not in text), None)

    def frame(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The rendered text of a request, an answer and a second request with a chat template; empty for others."""
        turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
        try:
            return "" if self.kind == "alpaca" else self._chat([turns], tokenizer, open_end=False)[0]
        except Exception:  # a template that takes no second request
            return ""

    def _chat(
        self, conversations: list[list[dict[str, str]]], tokenizer: "PreTrainedTokenizerBase", open_end: bool = True
    ) -> list[str]:
        how = {"chat_template": self.chat_template, "tokenize": False, "add_generation_prompt": open_end}
        return list(tokenizer.apply_chat_template(conversations, **how)) if conversations else []


def refusal(rows: Sequence[tuple[Any, str]], remedy: str = "") -> str:
    """The message for rows that a chat template refuses: the number and the reason of each."""
    what = by_reason({str(row): reason for row, reason in rows}, len(rows), "row {}: {}")
    return f"{what}; delete them{remedy} or choose the template alpaca"


def choose_template(tokenizer: "PreTrainedTokenizerBase", kind: str = "auto") -> Template:
    """The template for a model: with ``auto`` the tokenizer's own chat template where it has one, else Alpaca."""
    if kind not in ("auto", "chat", "alpaca"):
        raise ConfigError(f"template '{kind}': must be auto, chat or alpaca")
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own is not None and not isinstance(own, str):
        raise CompatibilityError("the tokenizer's chat_template is not text; fix it in tokenizer_config.json")
    if kind == "alpaca" or (kind == "auto" and own is None):
        return Template("alpaca")
    if own is None:
        raise CompatibilityError("template 'chat': the tokenizer has no chat template; use alpaca or another model")
    return Template("chat", own)


def check_template(template: Template, tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Refuses a chat template with which nothing can be rendered; one that refuses these turns is left to the rows."""
    if template.kind != "chat":
        return
    try:
        template._chat([[{"role": "user", "content": "x"}]], tokenizer)
    except Exception as error:
        if isinstance(error, TemplateError) and not isinstance(error, TemplateSyntaxError):
            return
        reason = one_line(error)
        raise CompatibilityError(f"{name}: its chat template fails ({reason}); fix it or choose alpaca") from error


def save_template(folder: str | os.PathLike[str], template: Template) -> None:
    """Puts a template beside a model."""
    write_json(Path(folder) / FILE_NAME, asdict(template))


def load_template(folder: str | os.PathLike[str]) -> Template | None:
    """The template that lies beside a model (in the folder, or in its ``adapter`` or ``model``); None without one."""
    for candidate in (Path(folder), Path(folder) / "adapter", Path(folder) / "model"):
        path = candidate / FILE_NAME
        if path.is_file():
            try:
                found = read_json(path)
                return Template(found["kind"], found.get("chat_template"))
            except (ValueError, KeyError, TypeError, AttributeError, ConfigError, DataError) as error:
                raise DataError(f"{path}: is not a template; delete it, or copy it from the original model") from error
    return None


def conversation(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The turns of a prompt, each with ``role`` and ``content``."""
    if record.get("turns"):
        turns: list[dict[str, str]] = json.loads(record["turns"])
        return turns
    return [{"role": "user", "content": record["prompt"]}]


def _lost_role(turns: Sequence[Mapping[str, str]], text: str) -> str | None:
    """The role of a turn whose text is not in the rendered text, or not as often as it is in the turns."""
    expected = Counter((turn["role"], turn["content"].strip()) for turn in turns)
    for (role, content), times in expected.items():
        # Templates leave the reasoning of earlier answers out by design; some write a tool's result as JSON, and some
        # change the white space.
        if role == "assistant":
            content = content.rpartition("</think>")[2].strip()
        if not content or text.count(content) >= times:
            continue
        as_json, words = json.dumps(content, ensure_ascii=False)[1:-1], " ".join(content.split())
        if text.count(as_json) < times and " ".join(text.split()).count(words) < times:
            return role
    return None


def _alpaca(record: Mapping[str, Any]) -> str:
    """The Alpaca text; of a conversation system texts as they are, and several turns with their speakers' names."""
    if record.get("input"):
        return _WITH_INPUT.format(instruction=record["instruction"], input=record["input"])
    turns = conversation(record)
    alone = [turn["role"] for turn in turns if turn["role"] != "system"] == ["user"]
    unnamed = ("system", "user") if alone else ("system",)
    texts = (("" if turn["role"] in unnamed else f"{turn['role'].capitalize()}: ") + turn["content"] for turn in turns)
    return _WITHOUT_INPUT.format(instruction="\n\n".join(texts))
