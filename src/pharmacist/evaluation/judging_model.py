"""A model behind an endpoint that is asked for verdicts, by judges and graders alike."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import append_json_lines, read_json_log
from pharmacist.core.hashing import sha256_json
from pharmacist.core.typed import AtLeast1
from pharmacist.evaluation.answers import Answer
from pharmacist.evaluation.endpoint import Endpoint, EndpointConfig, Failure, count_reasons, json_object
from pharmacist.evaluation.reasoning import separate


@dataclass
class JudgingModelConfig(EndpointConfig):
    """Options of a judging model."""

    model: str = ""
    """What the endpoint calls the judging model."""
    max_tokens: AtLeast1 = 1024
    """Longest reply of the judging model."""

    def where(self) -> dict[str, Any]:
        """What decides on the replies: address, model, and length of replies."""
        return super().where() | {"model": self.model, "max_tokens": self.max_tokens}


class JudgingModel:
    """Asks a judging model.

    Args:
        config: Its options.
        option: Who asks, as messages name it (``--judge strongreject``).
        system: System message of every question.
        version: Of the questions: replies to other ones are not taken.
    """

    def __init__(self, config: JudgingModelConfig, option: str, system: str, version: int) -> None:
        self.config, self.option, self.system, self.version = config, option, system, version

    def check(self) -> None:
        """Asks for what is missing before any answer is generated.

        Raises:
            ConfigError: There is no address or no model.
        """
        Endpoint(self.config, self.option)
        if not self.config.model:
            raise ConfigError(f"{self.option}: give the judging model with {self.option.split()[0]}.model NAME")

    def ask(self, questions: Sequence[str], work: Path | None, description: str) -> list[str | Failure]:
        """Asks what was not asked before, equal questions once; replies are kept as they come.

        Args:
            questions: One per reply.
            work: Folder of the replies; None keeps nothing.
            description: For the progress bar.

        Returns:
            Text without reasoning, or failure, per question, in order. Failures are not kept: the next call asks
            again. A reply that was cut is a failure: what it says before its end is no verdict.

        Raises:
            DataError: The endpoint cannot be reached or refuses.
        """
        config = self.config
        turns = ([{"role": "system", "content": self.system}, {"role": "user", "content": text}] for text in questions)
        bodies = [config.request(config.model, messages, config.max_tokens) for messages in turns]
        keys = [sha256_json([self.version, EndpointConfig.where(config), body]) for body in bodies]
        log = None if work is None else work / f"{self.option.split()[1]}.jsonl"
        found: dict[str, str | Failure] = {}
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            found |= {line["key"]: line["reply"] for line in read_json_log(log)}
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in found}
        order = list(missing)

        def done(position: int, result: Answer | Failure) -> None:
            key, reply = order[position], result if isinstance(result, Failure) else _whole(result)
            found[key] = reply
            if log is not None and isinstance(reply, str):
                append_json_lines(log, [{"key": key, "reply": reply}])

        Endpoint(config, self.option).ask_all(list(missing.values()), done, description, answered=bool(found))
        return [found[key] for key in keys]

    def check_verdicts(self, unscored: Sequence[str], asked: int) -> None:
        """Raises where no verdict came at all.

        Args:
            unscored: Why, per answer without a verdict.
            asked: Number of answers.

        Raises:
            DataError: All are unscored.
        """
        if asked and len(unscored) == asked:
            raise DataError(
                f"{self.option}: {self.config.shown} gave no verdict on any of {asked} answers "
                f"({count_reasons(unscored)}); mend it or take another {self.option.split()[0]}; the answers are kept"
            )


def _whole(reply: Answer) -> str | Failure:
    """A judging model's reply without its reasoning."""
    if not reply.finished:
        return Failure("reply cut at its limit of tokens; raise max_tokens")
    return separate(reply.text).answer


def last_numbers(reply: str, allowed: Mapping[str, Collection[int]]) -> list[int] | None:
    """Whole numbers from the last JSON object in a reply that has none inside it; None where one is not there.

    Args:
        reply: Of a judging model.
        allowed: Name -> what it may be.

    >>> last_numbers('first {"a": 1}, then {"a": 2}', {"a": (1, 2)}), last_numbers("none", {"a": (1, 2)})
    ([2], None)
    """
    for text in reversed(re.findall(r"\{[^{}]*\}", reply)):
        try:
            found = json_object(json.loads(text))
        except ValueError:
            continue
        numbers: list[Any] = [found.get(name) for name in allowed]
        fit = all(type(own) is int and own in known for own, known in zip(numbers, allowed.values(), strict=True))
        return numbers if fit else None
    return None
