"""Questions to an OpenAI-compatible endpoint: bounded concurrency, retries with back-off, failures by name.

httpx does the talking and tenacity the waiting. A question that stays without an answer is a `Failure`, never an empty
answer; an endpoint that refuses all questions (wrong key, wrong address, unknown model) stops the run at once.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import tenacity

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.hashing import sha256_json
from pharmacist.core.progress import bar


_REFUSED = {
    401: "set the key that it wants in ${key}", 403: "the key in ${key} may not use it",
    404: "check the address and the model's name",
}  # fmt: skip
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


@dataclass
class EndpointConfig:
    """Options of an endpoint."""

    base_url: str = ""
    """Address of the OpenAI-compatible endpoint, up to and with /v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never written anywhere."""
    concurrency: int = 8
    """Questions that are under way at a time."""
    timeout: float = 120.0
    """Seconds to wait for one reply."""
    attempts: int = 6
    """Tries per question, counting the first."""
    max_wait: float = 60.0
    """Longest pause between two tries, in seconds; pauses double from one second on."""

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.attempts < 1 or self.timeout <= 0 or self.max_wait < 0:
            raise ConfigError("endpoint: concurrency and attempts must be at least 1, timeout positive")
        if self.base_url and not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint: base_url {self.base_url}: must begin with http:// or https://")

    def where(self) -> dict[str, Any]:
        """What decides on the replies; the rest of the options only decide on the waiting."""
        return {"base_url": self.base_url.rstrip("/")}


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: The message, or the refusal that some endpoints give in its place.
        tokens: New tokens as the endpoint counts them; 0 where it does not.
        finished: Whether the model ended by itself.
    """

    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Failure:
    """Why a question has no answer; short and without the question's text."""

    reason: str


class _Transient(Exception):
    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _Final(Exception):
    pass


class Endpoint:
    """Asks one endpoint.

    Args:
        config: Its options.
        name: Who asks, in messages (``--engine openai``).
    """

    def __init__(self, config: EndpointConfig, name: str) -> None:
        if not config.base_url:
            option = name.removeprefix("--").split()[0]
            raise ConfigError(f"{name}: give the endpoint's address, such as --{option}.base_url http://host:8000/v1")
        self.config, self.name = config, name

    def ask_all(
        self,
        bodies: Sequence[Mapping[str, Any]],
        done: Callable[[int, Reply | Failure], None],
        description: str,
    ) -> None:
        """Asks many questions.

        Args:
            bodies: What is posted to ``chat/completions``, one object per question.
            done: Called in this thread with a position and its result, in the order in which they come.
            description: For the progress bar.

        Raises:
            DataError: The endpoint cannot be reached or refuses; what came before stays with the caller.
        """
        key = os.environ.get(self.config.api_key_env, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=self.config.concurrency)
        with (
            httpx.Client(headers=headers, timeout=self.config.timeout, limits=limits) as client,
            ThreadPoolExecutor(self.config.concurrency) as pool,
            bar(description, len(bodies)) as progress,
        ):
            waiting = {pool.submit(self._ask, client, body): number for number, body in enumerate(bodies)}
            try:
                for future in as_completed(waiting):
                    done(waiting[future], future.result())
                    progress.advance(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def ask_once(
        self, bodies: Sequence[Mapping[str, Any]], log: Path | None, description: str, version: int
    ) -> list[str | Failure]:
        """Asks for what the log does not hold yet, equal questions once; replies go there as they come.

        Args:
            bodies: As in `ask_all`.
            log: File of replies by question; None keeps nothing.
            description: For the progress bar.
            version: Of whoever asks: replies of another one are not taken.

        Returns:
            Text or failure per question, in order. Failures are not kept: the next call asks again.
        """
        keys = [sha256_json([version, self.config.where(), body]) for body in bodies]
        found: dict[str, str | Failure] = dict(_kept(log))
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in found}
        order = list(missing)
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)

        def done(position: int, result: Reply | Failure) -> None:
            found[order[position]] = result if isinstance(result, Failure) else result.text
            if log is not None and isinstance(result, Reply):
                with log.open("a", encoding="ascii") as file:
                    file.write(dumps({"key": order[position], "reply": result.text}))

        self.ask_all(list(missing.values()), done, description)
        return [found[key] for key in keys]

    def _ask(self, client: httpx.Client, body: Mapping[str, Any]) -> Reply | Failure:
        backoff = tenacity.wait_random_exponential(multiplier=min(1.0, self.config.max_wait), max=self.config.max_wait)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            asked = error.wait if isinstance(error, _Transient) else 0.0
            return min(max(asked, backoff(state)), self.config.max_wait)

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.config.attempts), wait=wait, reraise=True,
            retry=tenacity.retry_if_exception_type((_Transient, httpx.TransportError)),
        )  # fmt: skip
        try:
            return retrying(self._once, client, body)
        except httpx.ConnectError as error:
            raise DataError(
                f"{self.name}: {self.config.base_url} does not answer ({error}); start the server or mend "
                "base_url, then run the same command again; what was answered is kept"
            ) from error
        except httpx.TimeoutException:
            return Failure("timed out")
        except httpx.TransportError:
            return Failure("connection dropped")
        except (_Transient, _Final) as error:
            return Failure(str(error))

    def _once(self, client: httpx.Client, body: Mapping[str, Any]) -> Reply:
        response = client.post(f"{self.config.base_url.rstrip('/')}/chat/completions", json=body)
        status = response.status_code
        if status in _REFUSED:
            remedy = _REFUSED[status].replace("${key}", f"${self.config.api_key_env}")
            raise DataError(f"{self.name}: {self.config.base_url} refuses (HTTP {status}); {remedy}")
        if status in _TRANSIENT:
            try:
                pause = float(response.headers.get("retry-after", "0"))
            except ValueError:  # a date; the own back-off will do
                pause = 0.0
            raise _Transient(f"HTTP {status}", pause)
        if status != 200:
            raise _Final(f"HTTP {status}")
        try:
            choice = response.json()["choices"][0]
            message, ended = choice["message"], choice.get("finish_reason")
            text = message.get("content") or message.get("refusal")
            tokens = int((json_object(response.json().get("usage"))).get("completion_tokens") or 0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Transient("malformed reply") from error
        if ended == "content_filter":
            raise _Final("content filter of the endpoint")
        if not isinstance(text, str) and text is not None:
            raise _Transient("malformed reply")
        return Reply(text or "", tokens, ended != "length")


def _kept(log: Path | None) -> dict[str, str]:
    if log is None or not log.is_file():
        return {}
    content = log.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):  # torn by a kill
        with log.open("r+b") as file:
            file.truncate(len(whole))
    return {line["key"]: line["reply"] for line in map(json.loads, whole.splitlines())}


def last_json(reply: str) -> Mapping[str, Any]:
    """The last JSON object in a reply, that has none inside it; empty where there is none.

    >>> last_json('first {"a": 1}, then {"a": 2}'), last_json("none")
    ({'a': 2}, {})
    """
    for text in reversed(re.findall(r"\{[^{}]*\}", reply)):
        try:
            return json_object(json.loads(text))
        except ValueError:
            continue
    return {}


def json_object(value: Any) -> Mapping[str, Any]:
    """The value where it is a JSON object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def count_reasons(reasons: Sequence[str]) -> str:
    """Failures as messages name them: ``3 x HTTP 500, 1 x timed out``."""
    return ", ".join(f"{reasons.count(reason)} x {reason}" for reason in sorted(set(reasons)))


def dumps(value: Any) -> str:
    """One JSON line in ASCII, so that a torn line is never a torn character."""
    return json.dumps(value, ensure_ascii=True) + "\n"
