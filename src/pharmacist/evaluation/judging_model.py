"""The base of judges and graders that ask a judging model behind an endpoint for verdicts."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import append_json_lines, read_json_log
from pharmacist.core.hashing import sha256_json
from pharmacist.core.typed import AtLeast1
from pharmacist.evaluation.decider import Decider
from pharmacist.evaluation.endpoint import Endpoint, EndpointConfig, Failure, count_reasons, json_object, remedy
from pharmacist.evaluation.reasoning import separate
from pharmacist.nn.distributed import on_main


UNREADABLE = "verdict cannot be read"


@dataclass
class JudgingModelConfig(EndpointConfig):
    """Options of a judging model."""

    model: str = ""
    """Name of the LLM judge at the endpoint."""
    max_tokens: AtLeast1 = 1024
    """Longest reply of the LLM judge in tokens."""

    def identity(self) -> dict[str, Any]:
        """The options that can change the replies: address, model, and length of replies."""
        return super().identity() | {"model": self.model, "max_tokens": self.max_tokens}


class JudgingModel(Decider):
    """Base of judges and graders that ask a judging model; its options are a `JudgingModelConfig`."""

    system: ClassVar[str]
    """System message of every question."""
    version: ClassVar[int]
    """Raised whenever the question changes, or the same reply gives another verdict; older replies are not used."""
    numbers: ClassVar[Mapping[str, Collection[int]]]
    """Name -> allowed values of the numbers in the JSON at the end of a reply."""

    def check(self) -> None:
        """Checks that an address and a model are given."""
        Endpoint(self.config, self.who)
        if not self.config.model:
            raise ConfigError(f"{self.who}: give the LLM judge with {self.option}.model NAME")

    def ask(self, questions: Sequence[str], description: str) -> list[list[int] | str]:
        """Asks questions, texts of the user's turn; returns the `numbers` of each reply, or why there are none.

        Equal questions are asked once, by the first process of a launcher. What arrives is kept in `replies`, without
        its reasoning. Failures, such as a reply that was cut, are not kept: the next call asks again. A DataError
        where the endpoint cannot be reached or refuses.
        """
        replies = on_main(lambda: self._replies(questions, description))
        self.missing += sum(isinstance(reply, Failure) for reply in replies)
        read = (str(reply) if isinstance(reply, Failure) else last_numbers(reply, self.numbers) for reply in replies)
        return [UNREADABLE if numbers is None else numbers for numbers in read]

    def _replies(self, questions: Sequence[str], description: str) -> list[str | Failure]:
        """Replies without their reasoning."""
        config: JudgingModelConfig = self.config
        turns = ([{"role": "system", "content": self.system}, {"role": "user", "content": text}] for text in questions)
        bodies = [config.request(config.model, messages, config.max_tokens) for messages in turns]
        keys = [sha256_json([self.version, EndpointConfig.identity(config), body]) for body in bodies]
        log = None if self.replies is None else self.replies / f"{self.name}.jsonl"
        found: dict[str, str | Failure] = {}
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            found |= {line["key"]: line["reply"] for line in read_json_log(log)}
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in found}
        for key, reply in Endpoint(config, self.who).ask_all(missing, description, answered=bool(found)):
            if isinstance(reply, Failure):
                found[key] = reply
            elif not reply.finished:
                found[key] = Failure("reply cut at its limit of tokens; raise max_tokens")
            else:
                found[key] = separate(reply.text).answer
                if log is not None:
                    append_json_lines(log, [{"key": key, "reply": found[key]}])
        return [found[key] for key in keys]

    def check_verdicts(self, unscored: Sequence[str], asked: int) -> None:
        """Raises a DataError with the reasons if all of `asked` answers are unscored."""
        if asked and len(unscored) == asked:
            raise DataError(
                f"{self.who}: {self.config.shown} gave no verdict on any of {asked} answers "
                f"({count_reasons(unscored)}); {remedy(unscored, self.option)}, or choose another {self.option}; the "
                "answers are kept"
            )


def last_numbers(reply: str, allowed: Mapping[str, Collection[int]]) -> list[int] | None:
    """Whole numbers by name (`allowed`: their values) from the last JSON object of a reply that has such a name.

    The object has none inside. Numbers may be written as text or with decimals, 0 and 1 also as false and true.

    >>> last_numbers('first {"a": 1}, then {"a": "2",}, {"b": 3}', {"a": (1, 2)}), last_numbers("none", {"a": (1, 2)})
    ([2], None)
    """
    for text in reversed(re.findall(r"\{[^{}]*\}", reply)):
        try:
            found = json_object(json.loads(re.sub(r",\s*\}", "}", text)))
        except ValueError:
            continue
        if found.keys() & allowed.keys():
            numbers = [_number(found.get(name), known) for name, known in allowed.items()]
            read = [number for number in numbers if number is not None]
            return read if len(read) == len(allowed) else None
    return None


def _number(value: Any, known: Collection[int]) -> int | None:
    """The one of the `known` numbers that a value of JSON stands for."""
    if not isinstance(value, bool | int | float | str) or isinstance(value, bool) and set(known) != {0, 1}:
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return int(number) if number in known else None
