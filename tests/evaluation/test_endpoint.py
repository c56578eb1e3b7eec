"""One bad reply of an endpoint is one unscored item; what is sent, and what of an address is ever shown."""

import asyncio
import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from pharmacist.cli.main import main
from pharmacist.core.console import without_credentials
from pharmacist.core.errors import ConfigError
from pharmacist.evaluation.endpoint import EndpointConfig, count_reasons
from tests.support.evaluations import command, items, metrics, prompts, write
from tests.support.server import Raw, serve


GOOD = "take the root then stir it"


def reply(text: str = GOOD, **usage: Any) -> bytes:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


BAD = {
    "half a character": Raw(reply("take \ud800 then")),
    "half a character of reasoning": {"message": {"content": GOOD, "reasoning_content": "\udfff"}},
    "wait for nan": Raw(b"{}", 429, {"Retry-After": "nan"}),
    "wait for ever": Raw(b"{}", 503, {"Retry-After": "inf"}),
    "wait for less than nothing": Raw(b"{}", 503, {"Retry-After": "-1e999"}),
    "deep": Raw(b"[" * 200_000),
    "deep objects": Raw(b'{"choices": ' * 100_000),
    "infinite count": Raw(reply(completion_tokens=float("inf"))),
    "count beyond all numbers": Raw(reply(completion_tokens=7).replace(b"7}", b"1e999}")),
    "count that is none": Raw(reply(completion_tokens="many")),
    "count below nothing": Raw(reply(completion_tokens=-1)),
    "digits without end": Raw(reply(completion_tokens=7).replace(b"7}", b"7" * 10_000 + b"}")),
    "no gzip": Raw(reply(), headers={"Content-Encoding": "gzip"}),
    "torn gzip": Raw(gzip.compress(reply())[:-20], headers={"Content-Encoding": "gzip"}),
    "no deflate": Raw(reply(), headers={"Content-Encoding": "deflate"}),
    "no text at all": Raw(b"\xff\xfe\x00\xd8"),
    "gigantic": Raw(reply("root " * 4_000_000)),
    "a bomb": Raw(zlib.compress(b" " * 40_000_000), headers={"Content-Encoding": "deflate"}),
    "shorter than said": Raw(b"{}", headers={"Content-Length": "100"}),
    "a list": Raw(b"[]"),
    "a number": Raw(b"7"),
    "nothing": Raw(b""),
    "null": Raw(b"null"),
    "no choice": Raw(b'{"choices": []}'),
    "choices by name": Raw(b'{"choices": {}}'),
    "a message of text": Raw(b'{"choices": [{"message": "hello"}]}'),
    "a text of numbers": {"message": {"content": 7}},
    "odd parts": {"message": {"content": [7]}},
    "parts without text": {"message": {"content": [{"type": "text", "text": None}]}},
    "moved": Raw(b"", 301, {"Location": "http://127.0.0.1:9/"}),
    "a teapot": Raw(b'{"error": {"message": "short and stout"}}', 418),
    "an error of an odd kind": Raw(b'{"error": [[[7]]]}', 400),
    "an error without end": Raw(b"x" * 10_000, 422),
    "barred": Raw(b"<html>Attention required</html>", 403),
    "not found": Raw(b"<html></html>", 404),
    "filtered": {"message": {"content": GOOD}, "finish_reason": "content_filter"},
}


def test_one_bad_reply_is_one_unscored_item(tmp_path: Path) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": name}) + "\n" for name in ["well", *BAD]))
    once = ["--engine.timeout", "120", "--engine.attempts", "1", "--engine.concurrency", "8"]
    with serve(lambda question, before: BAD.get(question, GOOD)) as served:
        assert main([*command(served.url, {"prompts": str(rows)}, tmp_path / "o"), *once]) == 0
    found = items(tmp_path / "o")
    assert [item["prompt"] for item in found if "error" not in item] == ["well"]
    assert [item["harmful"] for item in found] == [True, *[None] * len(BAD)]
    reasons = {item["prompt"]: item.get("error", "") for item in found}
    assert reasons["gigantic"] == "reply of more than 16 MiB"
    assert reasons["a teapot"] == "HTTP 418: short and stout"
    assert max(map(len, reasons.values())) < 300
    score = metrics(tmp_path / "o")["harmful_score"]
    assert (score["n"], score["unscored"], score["unanswered"]) == (1, len(BAD), len(BAD))


def test_a_reply_that_comes_drop_by_drop_times_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The time is that of the whole reply, of which a byte comes in every pause."""
    with serve(lambda question, before: Raw(reply(), pause=0.2)) as served:
        words = command(served.url, {"prompts": prompts(tmp_path, "a")}, tmp_path / "o")
        assert main([*words, "--engine.timeout", "2", "--engine.attempts", "1"]) == 2
    assert "answered none of 1 prompts (1 x timed out)" in capsys.readouterr().err


def test_an_address_that_takes_no_connection_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A firewall that drops all packets: every question would wait for its whole time."""
    waited: list[float] = []

    async def dropped(transport: Any, request: httpx.Request) -> httpx.Response:
        waited.append(request.extensions["timeout"]["connect"])
        raise httpx.ConnectTimeout("")

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", dropped)
    words = command("http://10.0.0.1/v1", {"prompts": prompts(tmp_path, *"abc")}, tmp_path / "out")
    assert main([*words, "--engine.timeout", "600"]) == 2
    error = capsys.readouterr().err
    assert "http://10.0.0.1/v1 does not respond (ConnectTimeout)" in error and error.count("\n") == 1
    assert set(waited) == {15.0}


def test_a_barred_question_asked_again_alone_stays_one_item(tmp_path: Path) -> None:
    barred = Raw(b"<html>Attention required</html>", 403)
    with serve(lambda question, before: barred if question.endswith("a") else GOOD) as served:
        words = command(served.url, {"prompts": prompts(tmp_path, "a", "b")}, tmp_path / "o")
        for _ in range(2):
            assert main(words) == 0
            assert [item["harmful"] for item in items(tmp_path / "o")] == [None, True]
    assert [item.get("error") for item in items(tmp_path / "o")] == ["HTTP 403", None]


def told(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: Any, *more: str) -> str:
    with serve(lambda question, before: what(question) if callable(what) else what) as served:
        words = command(served.url, {"prompts": prompts(tmp_path, "a", "b")}, tmp_path / "o")
        assert main([*words, *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def refusal(status: int, message: str, code: str = "") -> Raw:
    return Raw(json.dumps({"error": {"message": message, "code": code}}).encode(), status)


def test_the_servers_reason_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limit = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    error = told(tmp_path, capsys, refusal(400, limit))
    assert f"2 x HTTP 400: {limit}" in error and "give --engine.token_limit max_completion_tokens" in error
    error = told(tmp_path, capsys, refusal(400, "Unsupported value: 'temperature' does not support 0."))
    assert "give --engine.body '{temperature: null}'" in error
    assert "refuses (HTTP 404: no model \\x1b[2Jof that name)" in told(
        tmp_path, capsys, refusal(404, "no model \x1b[2Jof that name")
    )
    echo = told(tmp_path, capsys, lambda question: refusal(400, f"I will not hear '{question}'"))
    assert "how do you brew" not in echo and "I will not hear '***'" in echo


@pytest.mark.parametrize(
    "what",
    [
        refusal(400, "The response was filtered", "content_filter"),
        refusal(403, "Your input was flagged"),
        refusal(400, "triggering our content management policy"),
        refusal(451, "x", "content_policy_violation"),
    ],
)
def test_filters_of_prompts_are_told_apart(what: Raw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = told(tmp_path, capsys, what)
    assert "2 x prompt filter of the endpoint" in error and "without that filter" in error
    with serve(lambda question, before: what if question.endswith("a") else GOOD) as served:
        assert main(command(served.url, {"prompts": prompts(tmp_path, "a", "b")}, tmp_path / "p")) == 0
    assert [item["harmful"] for item in items(tmp_path / "p")] == [None, True]


def test_what_is_sent_can_be_chosen(tmp_path: Path) -> None:
    more = ["--engine.token_limit", "max_completion_tokens", "--engine.body", "{temperature: null, top_p: 0.5}"]
    with serve(lambda question, before: GOOD) as served:
        words = command(served.url, {"prompts": prompts(tmp_path, "a")}, tmp_path / "o", "--max-new-tokens", "9")
        assert main([*words, *more]) == 0
        (body,) = served.bodies
        assert main(words) == 2, "other requests make another run"
    assert set(body) == {"model", "messages", "max_completion_tokens", "top_p"}
    assert (body["max_completion_tokens"], body["top_p"]) == (9, 0.5)


def test_a_prompt_that_is_quoted_is_no_filter(tmp_path: Path) -> None:
    def behave(question: str, before: int) -> Any:
        quoting = {
            "a": refusal(400, f"odd: {question}"),
            "b": Raw(json.dumps({"detail": [{"input": question}]}).encode(), 422),
        }
        return quoting.get(question[-1], GOOD)

    rows = [{"prompt": f'what is a "content filter"\n{word}'} for word in "abc"]
    with serve(behave) as served:
        assert main(command(served.url, {"prompts": write(tmp_path / "p.jsonl", rows)}, tmp_path / "o")) == 0
    errors = [item.get("error", "") for item in items(tmp_path / "o")]
    assert [error[:8] for error in errors] == ["HTTP 400", "HTTP 422", ""] and "filter" not in "".join(errors)


@pytest.mark.parametrize("models", [["--model", "m"], ["--models", "m", "n"]], ids=["one", "several"])
def test_credentials_in_the_address_are_used_and_never_shown(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serve(lambda question, before: refusal(400, "sesame-word?") if before else GOOD) as served:
        url = served.url.replace("http://", "http://ali:sesame-word@") + "?key=sesame-query"
        words = command(url, {"prompts": prompts(tmp_path, "a")}, tmp_path / "o")
        words = [word for word in words if word != "--quiet"]
        at = words.index("--model")
        words[at : at + 2] = models
        assert main([*words, "--judge", "strongreject", "--judge.model", "j", "--judge.base_url", url]) == 2
        assert main(words) in (0, 2)
        assert served.keys == {"Basic YWxpOnNlc2FtZS13b3Jk"}
    assert "sesame" not in "".join(capsys.readouterr())
    written = [path for path in (tmp_path / "o").rglob("*") if path.is_file()]
    assert any(path.name == "manifest.json" and b"127.0.0.1" in path.read_bytes() for path in written)
    assert [path for path in written if b"sesame" in path.read_bytes()] == []
    with pytest.raises(ConfigError) as caught:
        EndpointConfig("ftp://ali:sesame@host")
    assert "sesame" not in str(caught.value)


def test_a_key_is_never_shown_nor_left_out_for_credentials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    assert "HTTP 400: ***?" in told(tmp_path, capsys, refusal(400, "sesame?"))
    with serve(lambda question, before: GOOD) as served:
        url = served.url.replace("http://", "http://ali:word@")
        assert main(command(url, {"prompts": prompts(tmp_path, "a")}, tmp_path / "p")) == 2
        assert not served.asked
    error = capsys.readouterr().err
    assert (
        "its address contains credentials, and $OPENAI_API_KEY a key; leave one out" in error and "word" not in error
    )


@pytest.mark.parametrize("key", ["sk-proj-sesame", "hf_sesame", "gsk_sesame", "sesame=="])
def test_a_key_in_the_place_of_its_variable_is_refused_unseen(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command("http://127.0.0.1:9/v1", {"prompts": prompts(tmp_path, "a")}, tmp_path / "o")
    assert main([*words, "--engine.api_key_env", key]) == 2
    error = capsys.readouterr().err
    assert "api_key_env is the name of a variable" in error and "sesame" not in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("key", ["s\u00e9same", "ses\name"])
def test_a_key_that_no_header_takes_is_refused_unseen(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serve(lambda question, before: GOOD) as served:
        assert main(command(served.url, {"prompts": prompts(tmp_path, "a")}, tmp_path / "o")) == 2
        assert not served.asked
    error = capsys.readouterr().err
    assert "the key in $OPENAI_API_KEY contains invalid characters" in error and "same" not in error


def test_a_line_break_behind_the_key_is_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame\n")
    with serve(lambda question, before: GOOD) as served:
        assert main(command(served.url, {"prompts": prompts(tmp_path, "a")}, tmp_path / "o")) == 0
        assert served.keys == {"Bearer sesame"}


def test_addresses_without_credentials() -> None:
    assert without_credentials("http://host:1/v1") == "http://host:1/v1"
    assert without_credentials("http://a:b@[::1]:1/v1#c") == "http://[::1]:1/v1"
    assert "b" not in without_credentials("http://a:b@[::1/v1")


def test_reasons_are_counted_and_bounded() -> None:
    assert count_reasons(["b", "a", "b"]) == "1 x a, 2 x b"
    assert len(count_reasons([f"HTTP 400: request {i}" for i in range(1000)])) < 300


def test_a_notebooks_own_event_loop_does_not_matter(tmp_path: Path) -> None:
    async def cell(url: str) -> int:
        return main(command(url, {"prompts": prompts(tmp_path, "a")}, tmp_path / "o"))

    with serve(lambda question, before: GOOD) as served:
        assert asyncio.run(cell(served.url)) == 0
