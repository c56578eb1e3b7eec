r"""Reasoning and answer told apart, behind every engine and in front of every judge and task.

A refusal that comes after a page of thought is a refusal, and a thought that never ends is no answer. Known are tags
(``<think>``, ``[THINK]``, ``<|START_THINKING|>`` and their kin), the channels of harmony (gpt-oss) and Gemma, and
Granite's headings. A closing tag without an opening one means that the chat template had opened it; an opening one
that is never closed, that the answer ended in its reasoning. Separating twice does no more than separating once.
"""

import re
from typing import NamedTuple


ENDED = "ended inside its reasoning"
CUT = "cut before the answer began"
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Where endpoints and tokenizers put what they told apart themselves."""

_NAME = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)"
_OPEN = (
    rf"<{_NAME}(?:\s[^<>]{{0,100}})?>|<\|{_NAME}\|>|\[THINK(?:ING)?\]|◁think▷|<\|begin_of_thought\|>"
    r"|<\|START_THINKING\|>|<\|inner_prefix\|>|<\|channel>thought\b"
)
_CLOSE = (
    rf"</{_NAME}\s*>|<\|/{_NAME}\|>|\[/THINK(?:ING)?\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>"
    r"|<\|inner_suffix\|>|<channel\|>"
)
# Tags that answers have too: reasoning only where a message starts.
_RARE = r"(?:reason|reflection|scratchpad|analysis)"
_CHANNEL = (
    r"(?:<\|start\|>\s?\w{1,40}(?:\s[^<>|]{0,200})?)?<\|channel\|>\s?(?P<channel>\w{1,40})[^<>]{0,200}"
    r"(?:<\|constrain\|>[^<>]{0,200})?<\|message\|>"
)
# A tag begins or ends a line, or comes right after another one; within a sentence it is spoken about.
_OPENS = re.compile(
    rf"(?:\A|(?<=[\n>\]▷]))[ \t]*(?P<own>{_OPEN})|(?P<late>{_OPEN})(?=\s*(?:\n|$))|\A\s*(?P<rare><{_RARE}>)"
    rf"|(?P<spoken>{_OPEN})",
    re.IGNORECASE,
)
_CLOSES = re.compile(rf"(?<![`'\"])(?:{_CLOSE})|(?P<rare></{_RARE}>)", re.IGNORECASE)
_BEGUN = re.compile(rf"(?:{_OPEN}|{_CHANNEL})\s*$", re.IGNORECASE)
_HEADER = re.compile(_CHANNEL)
_MESSAGE_END = re.compile(r"<\|(?:end|return|call|start)\|>.*", re.DOTALL)
_WHOLE = (
    (re.compile(r"analysis(?=[A-Z])"), "assistantfinal"),  # harmony, decoded without its special tokens
    (re.compile(r"Here(?:'s| is) my thought process:"), "Here is my response:"),  # Granite
)
"""Texts that begin like this are reasoning until the second mark."""
_WRAPPED = re.compile(
    r"(?:<answer>|<response>|<\|begin_of_solution\|>|<\|START_(?:RESPONSE|TEXT)\|>)"
    r"(.*?)(?:(?:</answer>|</response>|<\|end_of_solution\|>|<\|END_(?:RESPONSE|TEXT)\|>)\s*)?",
    re.DOTALL | re.IGNORECASE,
)
MARKER = re.compile(rf"{_OPEN}|{_CLOSE}|<\|channel\|>|<\|channel>", re.IGNORECASE)
"""Matches, in full, a token that tells reasoning from answer and must not be lost in decoding."""
FRAME = re.compile(
    r"<\|(?:message|start|end|constrain|call|return)\|>|<\|(?:begin|end)_of_solution\|>"
    r"|<\|(?:START|END)_(?:RESPONSE|TEXT)\|>"
)
"""Matches a token that means something in the company of a `MARKER` only."""


class Separated(NamedTuple):
    """A model's message in its two parts, without the marks around its reasoning.

    It is `open` where it ends inside the reasoning, and `closes` one where it did not open that itself.
    """

    answer: str
    reasoning: str
    open: bool = False
    closes: bool = False


def separate(text: str) -> Separated:
    r"""Tells a message's reasoning from its answer; a text without any comes back as it is.

    >>> separate("<think>\nMay I? No.\n</think>\n\nI cannot help.")
    Separated(answer='I cannot help.', reasoning='May I? No.', open=False, closes=False)
    >>> separate("May I?</think>No.").answer, separate("<think>May I").open, separate("Write <think> there.").answer
    ('No.', True, 'Write <think> there.')
    >>> separate("<|channel|>analysis<|message|>May I?<|end|><|start|>assistant<|channel|>final<|message|>No.")
    Separated(answer='No.', reasoning='May I?', open=False, closes=False)
    """
    if _HEADER.search(text):
        return _channels(text)
    for begins, ends in _WHOLE:
        if found := begins.match(text.lstrip()):
            reasoning, ended, answer = text.lstrip()[found.end() :].partition(ends)
            return Separated(answer.strip(), reasoning.strip(), not ended)
    return _tags(text)


def begun(prompt: str) -> str:
    r"""The mark with which a rendered prompt begins the reasoning already; empty where it does not.

    >>> begun("<|assistant|>\n<think>\n"), begun("<|assistant|>\n<think>\n\n</think>\n\n")
    ('<think>\n', '')
    """
    found = _BEGUN.search(prompt)
    return found[0] if found else ""


def _channels(text: str) -> Separated:
    """Messages of harmony: those of the channel ``final`` are the answer."""
    headers = list(_HEADER.finditer(text))
    ends = [*(header.start() for header in headers[1:]), len(text)]
    before = _MESSAGE_END.sub("", text[: headers[0].start()]).strip()  # the template may have opened the first one
    answer, reasoning = list[str](), [before]
    for header, end in zip(headers, ends, strict=True):
        message = _MESSAGE_END.sub("", text[header.end() : end]).strip()
        (answer if header["channel"] == "final" else reasoning).append(message)
    return Separated("\n\n".join(answer), "\n\n".join(filter(None, reasoning)), not answer, bool(before))


def _tags(text: str) -> Separated:
    answer, reasoning = list[str](), list[str]()
    place, opened, spoken, closes = 0, "", False, False
    for mark in sorted([*_OPENS.finditer(text), *_CLOSES.finditer(text)], key=lambda mark: mark.start()):
        part = text[place : mark.start()]
        if mark.re is _CLOSES:
            if opened and not (mark["rare"] and opened != "rare"):
                reasoning.append(part)
            elif opened or mark["rare"] or spoken:
                continue  # it closes nothing that was opened
            else:  # opened by the template, or closed twice: all so far was reasoning
                closes = closes or not reasoning
                reasoning.append("".join([*answer, part]))
                answer = []
            opened, spoken = "", False
        elif opened or mark["spoken"]:
            spoken = spoken or not opened
            continue
        else:
            answer.append(part)
            opened, spoken = mark.lastgroup or "", False
        place = mark.end()
    if not opened and not reasoning:
        return Separated(text, "")
    (reasoning if opened else answer).append(text[place:])
    whole = "".join(answer).strip()
    wrapped = _WRAPPED.fullmatch(whole)
    thought = "\n\n".join(filter(None, map(str.strip, reasoning)))
    return Separated((wrapped[1] if wrapped else whole).strip(), thought, bool(opened), closes)
