"""What a model said, and what it thought before."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pharmacist.core.files import append_json_lines, read_json_log
from pharmacist.evaluation.reasoning import ENDED, separate


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: The new tokens up to EOS, decoded without special tokens other than those around reasoning; of an answer
            that `separated` has seen, what the model says to its user.
        tokens: How many, EOS not counted.
        finished: Whether EOS came; otherwise the limit cut the answer.
        error: Why there is no answer, where an endpoint failed to give one: unscored, in no rate, asked for again.
        reasoning: What the model thought before it answered, where tokenizer or endpoint tell that apart; of an answer
            that `separated` has seen, in any case.
        unanswered: Why there is nothing to judge although the model was heard out: unscored, in no rate.
    """

    text: str
    tokens: int
    finished: bool
    error: str = ""
    reasoning: str = ""
    unanswered: str = ""

    @property
    def missing(self) -> str:
        """Why there is nothing to judge; empty where there is an answer."""
        return self.error or self.unanswered


def separated(answers: Sequence[Answer]) -> list[Answer]:
    """A model's answers without their reasoning, which is kept beside them; one that ended inside of it is none.

    Where some close a reasoning that their template had opened, all began in it: one that was cut before it closed any
    is reasoning alone.
    """
    parts = [separate(answer.text) for answer in answers]
    template_opens = any(part.closes for part in parts)
    found = []
    for answer, (text, reasoning, is_open, _) in zip(answers, parts, strict=True):
        if template_opens and not answer.finished and not (reasoning or is_open or answer.reasoning):
            text, reasoning, is_open = "", text, True
        reasoning = "\n\n".join(filter(None, (answer.reasoning, reasoning)))
        ended = ENDED if not text.strip() and (is_open or reasoning.strip()) else ""
        found.append(answer if answer.missing else replace(answer, text=text, reasoning=reasoning, unanswered=ended))
    return found


def append_answers(log: Path, answers: Mapping[int, Answer]) -> None:
    """Adds answers by row to a log, from which an interrupted call continues."""
    append_json_lines(log, ({"row": row} | asdict(answer) for row, answer in answers.items()))


def read_answers(logs: Iterable[Path], own: Path | None = None) -> dict[int, Answer]:
    """Answers by row of earlier calls, out of the logs of all processes, of which this one writes to `own`."""
    found: dict[int, Answer] = {}
    for log in logs:
        for value in read_json_log(log, mend=log == own):
            found.setdefault(value.pop("row"), Answer(**value))
    return found
