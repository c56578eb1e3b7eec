"""A real HTTP server on 127.0.0.1 that answers like an OpenAI-compatible endpoint, or fails as it is told to."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple


Behaviour = Callable[[str, int], Any]
"""From a question and how often it was asked before to: a text, or what goes wrong: an HTTP status, ``drop`` or
``malformed``; ``slow``, ``filter`` or ``cut`` with a colon and a text; a `Raw` reply; or fields of the choice."""


class Raw(NamedTuple):
    """A reply to the byte."""

    content: bytes
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})
    pause: float = 0.0
    """Seconds between two bytes, status line and headers included."""


class Served:
    """What the server saw."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.url = ""


@contextmanager
def serve(behaviour: Behaviour) -> Iterator[Served]:
    served = Served(behaviour)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][-1]["content"]
            with served.lock:
                before = served.asked[question]
                served.asked[question] += 1
                served.bodies.append(body)
                served.keys.add(self.headers.get("Authorization"))
                served.now += 1
                served.most = max(served.most, served.now)
            try:
                self.reply(served.behaviour(question, before))
            finally:
                with served.lock:
                    served.now -= 1

        def reply(self, what: Any) -> None:
            if what == "drop":
                self.close_connection = True
                self.connection.close()
                return
            finish = "stop"
            if isinstance(what, Raw):
                self.raw(what)
                return
            if isinstance(what, dict):
                choice = {"message": {"role": "assistant"} | what.pop("message", {}), "finish_reason": "stop"} | what
                value = {"choices": [choice], "usage": {"completion_tokens": 7}}
                content, status = json.dumps(value).encode(), 200
            elif isinstance(what, int):
                content, status = b'{"error": {"message": "no"}}', what
            elif what == "malformed":
                content, status = b'{"choices": [{"mess', 200
            else:
                if what.startswith("slow:"):
                    time.sleep(0.3)
                kind, colon, text = what.partition(":")
                finish = {"cut": "length", "filter": "content_filter"}.get(kind, "stop")
                text = text if colon and kind in ("slow", "cut", "filter") else what
                message = {"role": "assistant", "content": text}
                value = {"choices": [{"message": message, "finish_reason": finish}], "usage": {"completion_tokens": 7}}
                content, status = json.dumps(value).encode(), 200
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0.02")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def raw(self, what: Raw) -> None:
            headers = {"Content-Length": str(len(what.content)), "Connection": "close"} | dict(what.headers)
            lines = [f"HTTP/1.1 {what.status} x", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
            content = "\r\n".join(lines).encode() + what.content
            self.close_connection = True
            try:
                for byte in (content[i : i + 1] for i in range(len(content))) if what.pause else [content]:
                    self.wfile.write(byte)
                    time.sleep(what.pause)
            except OSError:
                pass  # whoever asked has given up

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # whoever asked has given up: no traceback among what the command says
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
