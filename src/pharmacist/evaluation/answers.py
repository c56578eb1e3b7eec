"""A model's answers, the reasoning before them, and the log that keeps them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pharmacist.core.env import process_index
from pharmacist.core.files import append_json_lines, read_json_log
from pharmacist.core.hashing import sha256_json
from pharmacist.evaluation.reasoning import ENDED, Separated, separate


@dataclass(frozen=True)
class Answer:
    """A model's answer to one prompt.

    Attributes:
        text: The new tokens up to EOS, decoded without special tokens other than those around reasoning; after
            `separated`, the part that is addressed to the user.
        tokens: Number of new tokens, EOS not counted.
        finished: Whether EOS came; otherwise the token limit cut the answer.
        error: Why an endpoint gave no answer; such an answer is unscored, in no rate, and asked for again.
        reasoning: What the model wrote before its answer, where tokenizer or endpoint separate the two; after
            `separated`, always.
        unanswered: Why a complete reply holds nothing to judge; such an answer is unscored and in no rate.
        separated: Whether `separated` has had it, which then leaves it as it is.
    """

    text: str
    tokens: int
    finished: bool
    error: str = ""
    reasoning: str = ""
    unanswered: str = ""
    separated: bool = False

    @property
    def missing(self) -> str:
        """Why there is nothing to judge; empty for a usable answer."""
        return self.error or self.unanswered


def separated(answers: Sequence[Answer]) -> list[Answer]:
    """Moves the reasoning of answers from `Answer.text` to `Answer.reasoning`.

    An answer that ends inside its reasoning counts as unanswered. If some answers close reasoning that the chat
    template had opened, all of them began with it: one that was cut before it closed any is reasoning alone.
    """
    parts = [Separated(answer.text, "") if answer.separated else separate(answer.text) for answer in answers]
    template_opens = any(part.closes for part in parts)
    found = []
    for answer, (text, reasoning, is_open, _) in zip(answers, parts, strict=True):
        if answer.separated or answer.missing:
            found.append(answer)
            continue
        if template_opens and not answer.finished and not (reasoning or is_open or answer.reasoning):
            text, reasoning, is_open = "", text, True
        reasoning = "\n\n".join(filter(None, (answer.reasoning, reasoning)))
        ended = ENDED if not text.strip() and (is_open or reasoning.strip()) else ""
        found.append(replace(answer, text=text, reasoning=reasoning, unanswered=ended, separated=True))
    return found


class AnswerLog:
    """Answers on disk, from which an interrupted call continues: one file per process, read by all processes.

    Args:
        folder: Where the files lie.
        content: What was asked, as JSON; answers to anything else lie in files of other names.

    Attributes:
        file: The file of this process.
    """

    def __init__(self, folder: Path, content: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name = folder, f"answers-{sha256_json(content)[:16]}"
        self.file = folder / f"{self._name}-{process_index()}.jsonl"

    def append(self, answers: Mapping[int, Answer]) -> None:
        """Adds answers, by the position of their prompts, to the file of this process."""
        append_json_lines(self.file, ({"row": row} | asdict(answer) for row, answer in answers.items()))

    def read(self) -> dict[int, Answer]:
        """The answers of all processes, by the position of their prompts."""
        found: dict[int, Answer] = {}
        for file in sorted(self._folder.glob(f"{self._name}-*.jsonl")):
            for value in read_json_log(file, mend=file == self.file):
                found.setdefault(value.pop("row"), Answer(**value))
        return found
