r"""Separates a model's reasoning from its answer, for every engine, judge and grader.

A refusal after a page of reasoning is a refusal, and reasoning that never ends is no answer. Known formats are tags
(``<think>``, ``[THINK]``, ``<|START_THINKING|>`` and the like), the channels of harmony (gpt-oss) and Gemma, and
Granite's headings. A closing tag without an opening one means that the chat template had opened it; an opening tag
that is never closed means that the answer ended in its reasoning.
"""

import re
from typing import NamedTuple


ENDED = "ended inside its reasoning"
CUT = "cut before the answer began"
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields in which endpoints and tokenizers return reasoning that they have separated."""

_NAME = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)"
_OPEN = (
    rf"<{_NAME}(?:\s[^<>]{{0,100}})?>|<\|{_NAME}\|>|\[THINK(?:ING)?\]|◁think▷|<\|begin_of_thought\|>"
    r"|<\|START_THINKING\|>|<\|inner_prefix\|>|<\|channel>thought\b"
)
_CLOSE = (
    rf"</{_NAME}\s*>|<\|/{_NAME}\|>|\[/THINK(?:ING)?\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>"
    r"|<\|inner_suffix\|>|<channel\|>"
)
# Tags that occur in answers too: they hold reasoning only at the start of a message.
_RARE = r"(?:reason|reflection|scratchpad|analysis)"
_CHANNEL = (
    r"(?:<\|start\|>\s?\w{1,40}(?:\s[^<>|]{0,200})?)?<\|channel\|>\s?(?P<channel>\w{1,40})[^<>]{0,200}"
    r"(?:<\|constrain\|>[^<>]{0,200})?<\|message\|>"
)
# A tag begins or ends a line, or follows another one; a tag within a sentence is only mentioned.
_OPENS = re.compile(
    rf"(?:\A|(?<=[\n>\]▷]))[ \t]*(?P<line_start>{_OPEN})|(?P<line_end>{_OPEN})(?=\s*(?:\n|$))|\A\s*(?P<rare><{_RARE}>)"
    rf"|(?P<mentioned>{_OPEN})",
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
"""Start of texts that are reasoning, and the mark that ends it."""
_WRAPPED = re.compile(
    r"(?:<answer>|<response>|<\|begin_of_solution\|>|<\|START_(?:RESPONSE|TEXT)\|>)"
    r"(.*?)(?:(?:</answer>|</response>|<\|end_of_solution\|>|<\|END_(?:RESPONSE|TEXT)\|>)\s*)?",
    re.DOTALL | re.IGNORECASE,
)
MARKER = re.compile(rf"{_OPEN}|{_CLOSE}|<\|channel\|>|<\|channel>", re.IGNORECASE)
"""Matches, in full, a token that separates reasoning from answer and must be kept in decoding."""
FRAME = re.compile(
    r"<\|(?:message|start|end|constrain|call|return)\|>|<\|(?:begin|end)_of_solution\|>"
    r"|<\|(?:START|END)_(?:RESPONSE|TEXT)\|>"
)
"""Matches a token that has a meaning only beside a `MARKER`."""


class Separated(NamedTuple):
    """Answer and reasoning of a model's message, without the marks between them.

    Attributes:
        answer: What is addressed to the user.
        reasoning: What comes before it.
        open: Whether the message ends inside its reasoning.
        closes: Whether it closes reasoning that it did not open itself.
    """

    answer: str
    reasoning: str
    open: bool = False
    closes: bool = False


def separate(text: str) -> Separated:
    r"""Separates reasoning and answer of a message; a text without reasoning is returned as it is.

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
    r"""The mark at the end of a rendered prompt that opens the reasoning; empty if there is none.

    >>> begun("<|assistant|>\n<think>\n"), begun("<|assistant|>\n<think>\n\n</think>\n\n")
    ('<think>\n', '')
    """
    found = _BEGUN.search(prompt)
    return found[0] if found else ""


def _channels(text: str) -> Separated:
    """Separates messages of harmony: those of the channel ``final`` are the answer."""
    headers = list(_HEADER.finditer(text))
    ends = [*(header.start() for header in headers[1:]), len(text)]
    before = _MESSAGE_END.sub("", text[: headers[0].start()]).strip()  # the template may have opened the first one
    answer, reasoning = list[str](), [before]
    for header, end in zip(headers, ends, strict=True):
        message = _MESSAGE_END.sub("", text[header.end() : end]).strip()
        (answer if header["channel"] == "final" else reasoning).append(message)
    return Separated("\n\n".join(answer), "\n\n".join(filter(None, reasoning)), not answer, bool(before))


def _tags(text: str) -> Separated:
    """Separates what tags enclose from the rest."""
    answer, reasoning = list[str](), list[str]()
    start, opened, mentioned, closes = 0, "", False, False
    for mark in sorted([*_OPENS.finditer(text), *_CLOSES.finditer(text)], key=lambda mark: mark.start()):
        part = text[start : mark.start()]
        if mark.re is _CLOSES:
            if opened and not (mark["rare"] and opened != "rare"):
                reasoning.append(part)
            elif opened or mark["rare"] or mentioned:
                continue  # it closes nothing that was opened
            else:  # opened by the template, or closed twice: all so far was reasoning
                closes = closes or not reasoning
                reasoning.append("".join([*answer, part]))
                answer = []
            opened, mentioned = "", False
        elif opened or mark["mentioned"]:
            mentioned = mentioned or not opened
            continue
        else:
            answer.append(part)
            opened, mentioned = mark.lastgroup or "", False
        start = mark.end()
    if not opened and not reasoning:
        return Separated(text, "")
    (reasoning if opened else answer).append(text[start:])
    whole = "".join(answer).strip()
    wrapped = _WRAPPED.fullmatch(whole)
    thought = "\n\n".join(filter(None, map(str.strip, reasoning)))
    return Separated((wrapped[1] if wrapped else whole).strip(), thought, bool(opened), closes)
