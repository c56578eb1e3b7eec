"""Client of an OpenAI-compatible endpoint: bounded concurrency, retries with back-off, failures by name.

A question without an answer gives a `Failure`, never an empty answer, and no broken reply ends the run; an endpoint
that refuses all questions (wrong key, wrong address, unknown model) stops it at once.

The package ``openai`` (tried: 3.57) bounds neither the time nor the size of a whole reply, does not repeat malformed
ones, follows redirects with the prompt, and fixes its longest pause.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import anyio
import httpx
import tenacity
from anyio.from_thread import start_blocking_portal

from pharmacist.core.console import plain, without_credentials
from pharmacist.core.errors import ConfigError, DataError, one_line
from pharmacist.core.progress import bar
from pharmacist.core.typed import AtLeast1, Checked, NotNegative, Positive
from pharmacist.evaluation.answers import Answer
from pharmacist.evaluation.reasoning import CUT, ENDED, REASONING_FIELDS
from pharmacist.evaluation.text import writable


K = TypeVar("K")

_REFUSED = {
    401: "set the key that it expects in ${key}",
    403: "the key in ${key} has no access to it",
    404: "check the address and the model's name",
}
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_CONNECT_SECONDS = 15.0
_MOST_BYTES = 16 * 2**20  # of one reply, unpacked
_MOST_TOKENS = 2**40
_REASON_CHARACTERS = 200
_PATIENCE = 16  # questions that may be refused before any is answered
_REASONS = 8  # named at most
_CUT = frozenset({"length", "max_tokens"})
_FILTERED = frozenset({"content_filter", "safety", "prohibited_content", "blocklist"})
_FILTER = re.compile(
    r"content[\W_]*(?:filter|polic|management|moderat)|responsible\W*ai|moderation|safety[\W_]*(?:system|filter|polic)"
    r"|flagged|inappropriate[\W_]*content|data_inspection|guardrail",
    re.IGNORECASE,
)


@dataclass
class EndpointConfig(Checked):
    """Options of an endpoint."""

    base_url: str = ""
    """Address of the OpenAI-compatible endpoint, up to and including /v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never written anywhere."""
    concurrency: AtLeast1 = 8
    """Maximum number of concurrent requests."""
    timeout: Positive = 120.0
    """Longest time for a whole reply, in seconds."""
    attempts: AtLeast1 = 6
    """Maximum number of attempts per request, including the first."""
    max_wait: NotNegative = 60.0
    """Longest pause between two attempts, in seconds; pauses double, starting at one second."""
    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of the request field for the longest reply; OpenAI's reasoning models expect max_completion_tokens."""
    body: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request, such as {chat_template_kwargs: {enable_thinking: false}}; null removes a field,
    as in {temperature: null}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"(?!hf_|gsk_)[A-Za-z_]\w*", self.api_key_env):  # it may be the key itself: not shown
            raise ConfigError("endpoint: api_key_env is the name of a variable that holds the key, not the key")
        if self.base_url:
            try:
                url = httpx.URL(self.base_url)
                known = url.scheme in ("http", "https") and bool(url.host) and (url.port or 0) < 2**16
            except (httpx.InvalidURL, ValueError):
                known = False
            if not known:
                where = f"endpoint: base_url {self.shown}"
                raise ConfigError(f"{where}: must begin with http:// or https:// and a host; ports go up to 65535")

    @property
    def shown(self) -> str:
        """The address without credentials, for files and messages."""
        return without_credentials(self.base_url).rstrip("/")

    def identity(self) -> dict[str, Any]:
        """The options that can change the replies; the others only change waiting times."""
        found: dict[str, Any] = {"base_url": self.shown}
        found |= {"token_limit": self.token_limit} if self.token_limit != "max_tokens" else {}
        return found | ({"body": self.body} if self.body else {})

    def request(self, model: str, messages: Sequence[Mapping[str, str]], longest: int) -> dict[str, Any]:
        """The body of a request to ``chat/completions`` for one greedy answer of at most `longest` tokens."""
        sent = {"model": model, "messages": messages, "temperature": 0, self.token_limit: longest} | self.body
        return {name: value for name, value in sent.items() if value is not None}


class Failure(Exception):
    """Why a question has no answer.

    Args:
        reason: A few words, without the question's text.
        remedy: What to do if the endpoint refuses all questions like this one.
        retry: Whether the same question may be asked again.
        wait: Least time before that, in seconds.
    """

    def __init__(self, reason: str, remedy: str = "", *, retry: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.remedy, self.retry, self.wait = remedy, retry, wait


class Endpoint:
    """An endpoint; messages call its user `name`, such as ``--engine openai``."""

    def __init__(self, config: EndpointConfig, name: str) -> None:
        if not config.base_url:
            option = name.removeprefix("--").split()[0]
            raise ConfigError(f"{name}: give the endpoint's address, such as --{option}.base_url http://host:8000/v1")
        self.config, self.name = config, name
        self._key = os.environ.get(config.api_key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"{name}: the key in ${config.api_key_env} contains invalid characters; set it again")
        base = httpx.URL(config.base_url)
        if self._key and base.userinfo:  # of the two only the address's would be sent
            where = f"{name}: its address contains credentials, and ${config.api_key_env} a key"
            raise ConfigError(f"{where}; leave one out, or name another variable by api_key_env")
        self._address, self._password = base.copy_with(path=base.path.rstrip("/") + "/chat/completions"), base.password

    def ask_all(
        self, bodies: Mapping[K, Mapping[str, Any]], description: str, *, answered: bool = False
    ) -> Iterator[tuple[K, Answer | Failure]]:
        """Posts each body to ``chat/completions``; yields keys and results in the order in which replies arrive.

        `answered` says that the endpoint has answered other questions of this kind before. A DataError where it cannot
        be reached, or refuses.
        """
        headers = {"Accept-Encoding": "gzip, deflate"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=self.config.concurrency)
        timeout = httpx.Timeout(self.config.timeout, connect=min(self.config.timeout, _CONNECT_SECONDS))
        client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)
        turn = anyio.Semaphore(self.config.concurrency)
        # The event loop runs in a separate thread, because a notebook has one already.
        with (
            start_blocking_portal() as portal,
            portal.wrap_async_context_manager(client),
            bar(description, len(bodies)) as progress,
        ):
            waiting = {portal.start_task_soon(self._ask, client, turn, body): key for key, body in bodies.items()}
            refused = 0
            try:
                for future in as_completed(waiting):
                    result = future.result()
                    yield waiting[future], result
                    progress.advance(1)
                    answered = answered or isinstance(result, Answer)
                    if isinstance(result, Failure) and result.remedy:
                        refused += 1
                        # A single question may be barred; if no other is answered either, it is not the question.
                        if not answered and refused >= min(len(bodies), _PATIENCE):
                            reason = f"{self.config.shown} refuses ({result}); {result.remedy}"
                            raise DataError(f"{self.name}: {reason}")
            finally:  # also where the caller stops early
                for future in waiting:
                    future.cancel()

    async def _ask(
        self, client: httpx.AsyncClient, turn: anyio.Semaphore, body: Mapping[str, Any]
    ) -> Answer | Failure:
        most = self.config.max_wait
        backoff = tenacity.wait_random_exponential(multiplier=min(1.0, most), max=most)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return min(max(getattr(error, "wait", 0.0), backoff(state)), most)

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.config.attempts),
            wait=wait,
            reraise=True,
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, httpx.RequestError | TimeoutError) or getattr(error, "retry", False)
            ),
        )
        async with turn:
            try:
                return await retrying(self._once, client, body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                what = f"{self.name}: {self.config.shown} does not respond ({plain(one_line(error))})"
                remedy = "start the server or fix base_url, then run the same command again; what was answered is kept"
                raise DataError(f"{what}; {remedy}") from error
            except (TimeoutError, httpx.TimeoutException):
                return Failure("timed out")
            except httpx.RequestError as error:
                return Failure("malformed reply" if isinstance(error, httpx.DecodingError) else "connection dropped")
            except Failure as failure:  # without its traceback, which holds the reply
                return Failure(str(failure), failure.remedy)

    async def _once(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> Answer:
        content = bytearray()
        with anyio.fail_after(self.config.timeout):  # the whole reply: a server may send a byte now and then for ever
            async with client.stream("POST", self._address, json=body) as response:
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > _MOST_BYTES:
                        raise Failure(f"reply of more than {_MOST_BYTES >> 20} MiB")
        status = response.status_code
        if status == 200:
            return _reply(content)
        reason, filtered = self._reason(content, body) if 400 <= status < 500 else ("", False)
        response_status = f"HTTP {status}" + (f": {reason}" if reason else "")
        if filtered and status != 429:
            raise Failure(f"prompt filter of the endpoint ({response_status})")
        remedy = _REFUSED.get(status, "").replace("${key}", f"${self.config.api_key_env}")
        if status == 401:  # whatever the question
            raise DataError(f"{self.name}: {self.config.shown} refuses ({response_status}); {remedy}")
        # A number of seconds; a date, or nonsense, is not waited for.
        pause = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*", response.headers.get("retry-after", ""))
        raise Failure(response_status, remedy, retry=status in _TRANSIENT, wait=float(pause[1]) if pause else 0.0)

    def _reason(self, content: bytearray, body: Mapping[str, Any]) -> tuple[str, bool]:
        """The reason that a server gives for refusing a request, and whether that is a filter of prompts."""
        try:
            error: Any = json_object(_parsed(content))
            error = error.get("error") or error.get("detail") or error.get("message") or ""
        except Failure:
            error = content.decode("utf-8", "replace") if b"<" not in content[:200] else ""
        words = error.get("message") if isinstance(error, Mapping) else error
        words = words if isinstance(words, str) else json.dumps(words) if words else ""
        every = words if isinstance(error, str) else json.dumps(error)
        for text in (self._key, self._password, *(str(turn["content"]) for turn in body["messages"])):
            for hidden in filter(None, (text, json.dumps(text)[1:-1])):  # neither a key nor the question's text
                words, every = words.replace(hidden, "***"), every.replace(hidden, "***")
        filtered = _FILTER.search(every) is not None
        words = " ".join(words.split())
        return plain(words[:_REASON_CHARACTERS] + ("..." if len(words) > _REASON_CHARACTERS else "")), filtered


def _parsed(content: bytearray) -> Any:
    def no_number(name: str) -> float:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(content, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise Failure("malformed reply", retry=True) from error


def _reply(content: bytearray) -> Answer:
    """The message of a reply, or the refusal that some endpoints give instead."""
    value = _parsed(content)
    try:
        choice = value["choices"][0]
        message, ended = choice["message"], str(choice.get("finish_reason")).lower()
        text, reasoning = _texts(message.get("content"))
        fields = (message.get(name) for name in REASONING_FIELDS)
        thought = next((value for value in fields if value and isinstance(value, str)), "")
        refusal = message.get("refusal")
        tokens = int(json_object(value.get("usage")).get("completion_tokens") or 0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise Failure("malformed reply", retry=True) from error
    if ended in _FILTERED:
        raise Failure("content filter of the endpoint")
    if not 0 <= tokens <= _MOST_TOKENS or not isinstance(refusal, str | None):
        raise Failure("malformed reply", retry=True)
    reasoning = "\n\n".join(filter(None, (thought, reasoning)))
    text = text or refusal or text
    why = ""
    if not (text or "").strip():
        why = ENDED if reasoning.strip() else CUT if ended in _CUT else "no text in the reply" if text is None else ""
    if not writable(reasoning + (text or "")):
        raise Failure("reply with half a character (a lone surrogate)")
    return Answer(text or "", tokens, ended not in _CUT, reasoning=reasoning, unanswered=why)


def _texts(content: Any) -> tuple[str | None, str]:
    """Text and reasoning of a message's content: a text, a list of parts, or nothing."""
    if content is None or isinstance(content, str):
        return content, ""
    said: dict[bool, list[str]] = {True: [], False: []}
    for part in content:
        kind = str(part["type"])
        thinks = kind in ("thinking", "reasoning")
        text = part.get(kind, part.get("text"))  # also that of a refusal
        if isinstance(text, list):  # Mistral's parts within a part
            text = "".join(inner["text"] for inner in text)
        if not isinstance(text, str):
            raise TypeError(f"{kind} without text")
        said[thinks].append(text)
    return "".join(said[False]) if said[False] else None, "\n\n".join(said[True])


def json_object(value: Any) -> Mapping[str, Any]:
    """The value where it is a JSON object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def count_reasons(reasons: Sequence[str]) -> str:
    """Failures with their counts, ``3 x HTTP 500, 1 x timed out``; of many kinds, the most frequent."""
    counts = Counter(sorted(reasons)).most_common()
    named = ", ".join(f"{count} x {reason}" for reason, count in sorted(counts[:_REASONS]))
    more = sum(count for _, count in counts[_REASONS:])
    return named + (f", {more} x other reasons" if more else "")


def remedy(reasons: Sequence[str], option: str) -> str:
    """What to do if no question was answered, for these reasons; `option` chooses what asks the endpoint."""
    if any("max_completion_tokens" in reason for reason in reasons):
        return f"give {option}.token_limit max_completion_tokens"
    if any("temperature" in reason for reason in reasons):
        return f"give {option}.body '{{temperature: null}}'"
    if all("filter of the endpoint" in reason for reason in reasons):
        return "use an endpoint without that filter"
    return "fix it"
