"""A server for the page alone: the files of web/page/ under the server's security headers, and answers as scripted.

It keeps to what the page relies on: streamed chat completions with their `chatdoctor` object, /api/about, ratings and
errors in OpenAI's shape. No model, so that a test says word by word what comes and when it breaks off.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from web.guard import SECURITY

PAGE = Path(__file__).resolve().parents[2] / "web" / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
GOUT = {
    "id": 712,
    "name": "Gout",
    "symptoms": ["Sudden pain in a big toe", "Swollen joint", "Red skin over the joint"],
    "tests": ["Uric acid in the blood", "Joint fluid under the microscope"],
    "medications": ["Colchicine", "Naproxen"],
    "source": "built-in table",
    "url": "https://example.org/gout?part=1",
}
BURSITIS = {**GOUT, "id": 88, "name": "Bursitis", "medications": ["Rest"], "url": "javascript:alert(1)"}


@dataclass
class Reply:
    """What comes of a question. holds: the answer stops before its last word until the test lets it go."""

    text: str = "This sounds like a cold. Rest, and drink enough."
    before: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    left_out_turns: int = 0
    finish_reason: str = "stop"
    status: int = 200
    retry_after: str = ""
    error: str = "The stub declines."
    cut: str = ""  # "abrupt", "quiet" (ends without [DONE]) or "error" (an error in the stream), before the last word
    holds: bool = False


class PageServer:
    """Answers with `replies` one after the other, then with Reply(). What was asked is kept for the test."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.asked: list[dict[str, Any]] = []  # bodies of requests for answers
        self.ratings: list[dict[str, Any]] = []  # as they came
        self.kept: dict[str, dict[str, Any]] = {}  # those that were not taken back, by their receipts
        self.paths: list[str] = []  # of all requests
        self.about: dict[str, Any] = {"model": "stub", "description": "0.9M parameters, float32", "context": 512}
        self.about |= {"disclaimer": "Not medical advice, and\nnot a doctor.", "diseases": True, "feedback": True}
        self.key = ""
        self.gone = threading.Event()  # a reader has left before its answer's end
        self.go_on = threading.Event()
        page_server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and content are two writes: the second would wait 40 ms

            def do_GET(self) -> None:
                page_server.handle(self)

            do_POST = do_DELETE = do_GET

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Readers that stop an answer cut connections: nothing to print."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def handle(self, http: BaseHTTPRequestHandler) -> None:
        self.paths.append(http.path)
        length = int(http.headers["Content-Length"] or 0)
        body = json.loads(http.rfile.read(length)) if length else {}
        page = re.fullmatch(r"/|/page/([a-z]+\.[a-z]+)", http.path)
        if page:
            path = PAGE / (page[1] or "index.html")
            return self._send(http, 200, path.read_bytes(), KINDS[path.suffix])
        if self.key and http.headers["Authorization"] != f"Bearer {self.key}":
            return self._send_json(http, 401, {"error": {"message": "Wrong key", "type": "authentication_error"}})
        if http.path == "/api/about":
            return self._send_json(http, 200, self.about)
        if http.path.startswith("/api/feedback/"):
            erased = self.kept.pop(http.path.rpartition("/")[2], None)
            return self._send_json(http, 200, {"erased": int(erased is not None)})
        if http.path == "/api/feedback":
            self.ratings.append(body)
            self.kept[f"receipt-{len(self.ratings)}"] = body
            return self._send_json(http, 200, {"id": len(self.ratings), "receipt": f"receipt-{len(self.ratings)}"})
        self.asked.append(body)
        return self._answer(http, self.replies.pop(0) if self.replies else Reply())

    def _answer(self, http: BaseHTTPRequestHandler, reply: Reply) -> None:
        if reply.status != 200:
            error = {"message": reply.error, "type": "server_error", "param": None, "code": None}
            return self._send_json(http, reply.status, {"error": error}, reply.retry_after)
        http.send_response(200)
        http.send_header("Content-Type", "text/event-stream")
        http.send_header("Transfer-Encoding", "chunked")
        http.end_headers()
        try:
            self._stream(http, reply)
        except OSError:
            self.gone.set()
            http.close_connection = True

    def _stream(self, http: BaseHTTPRequestHandler, reply: Reply) -> None:
        opening = {"before": reply.before, "rows": reply.rows, "left_out_turns": reply.left_out_turns}
        _event(http, _chunk({"role": "assistant", "content": ""}) | {"chatdoctor": opening})
        words = re.findall(r"\S*\s+|\S+$", reply.text)
        for i, word in enumerate(words):
            last = i == len(words) - 1
            while last and reply.holds and not self.go_on.wait(0.02):
                _piece(http, b": still here\n\n")
            if last and reply.cut == "error":
                _event(http, {"error": {"message": "The model's numbers\nare not finite."}})
            if last and reply.cut:
                http.close_connection = True
                return None if reply.cut == "abrupt" else _piece(http, b"")
            _event(http, _chunk({"content": word}))
        _event(http, _chunk({}, reply.finish_reason) | {"chatdoctor": {"after": reply.after}})
        _event(http, {"choices": [], "usage": {"completion_tokens": len(words)}})
        _piece(http, b"data: [DONE]\n\n")
        return _piece(http, b"")

    def _send_json(self, http: BaseHTTPRequestHandler, status: int, value: object, retry_after: str = "") -> None:
        self._send(http, status, json.dumps(value).encode(), "application/json", retry_after)

    def _send(self, http: BaseHTTPRequestHandler, status: int, data: bytes, kind: str, retry_after: str = "") -> None:
        http.send_response(status)
        http.send_header("Content-Type", kind)
        http.send_header("Content-Length", str(len(data)))
        for name, value in SECURITY.items():
            http.send_header(name, value)
        if retry_after:
            http.send_header("Retry-After", retry_after)
        http.end_headers()
        http.wfile.write(data)


def _chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"object": "chat.completion.chunk", "model": "stub", "choices": [choice]}


def _event(http: BaseHTTPRequestHandler, value: dict[str, Any]) -> None:
    _piece(http, b"data: " + json.dumps(value).encode() + b"\n\n")


def _piece(http: BaseHTTPRequestHandler, data: bytes) -> None:
    http.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
    http.wfile.flush()
