"""What a hostile, broken or slow client does, by raw sockets: it gets a clear answer in time, and nobody else waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable

import httpx2
import pytest

from tests.web.fake_engine import FakeEngine
from tests.web.running import QUESTION, Running
from web.guard import Access
from web.limits import Limits

Serve = Callable[..., Running]
KEY = "a key of this test's own"
CHAT = "/v1/chat/completions"
QUICK = Limits(header_time=0.5, body_time=0.8, write_time=1.0)


def head(path: str = CHAT, *lines: str, method: str = "POST", length: int | str | None = None) -> bytes:
    given = [f"{method} {path} HTTP/1.1", "host: localhost", "content-type: application/json", *lines]
    if length is not None:
        given.append(f"content-length: {length}")
    return "\r\n".join([*given, "", ""]).encode("utf-8", "surrogateescape")


def talk(running: Running, data: bytes, seconds: float = 20) -> tuple[int, dict[str, str], bytes]:
    """Send bytes; status, headers and body of what comes back until the server closes, or the body is there."""
    with running.connect() as s:
        s.settimeout(seconds)
        s.sendall(data)
        return receive(s)


def receive(s: socket.socket) -> tuple[int, dict[str, str], bytes]:
    got = b""
    while b"\r\n\r\n" not in got:
        part = s.recv(65536)
        if not part:
            return 0, {}, got
        got += part
    first, _, body = got.partition(b"\r\n\r\n")
    status, *lines = first.decode().split("\r\n")
    headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
    while len(body) < int(headers.get("content-length", "0")):
        body += s.recv(65536)
    return int(status.split()[1]), headers, body


def healthy(running: Running) -> float:
    began = time.perf_counter()
    assert httpx2.get(running.url + "/healthz", timeout=10).status_code == 200
    return time.perf_counter() - began


def chat(content: str = "a cough") -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 4}).encode()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"no JSON", "not JSON"),
        (b"[]", "must be an object"),
        (b"null", "must be an object"),
        (b'"x"', "must be an object"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"messages": [{"role": "user", "content": "x"}], "\\udfff": 1}', "surrogate"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"temperature": 1e999}', "too large"),
        (b'{"n": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"n": 1, "n": 2}', "twice"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -5}', "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 1000000000}', "from 1 to 8"),
    ],
)
def test_bodies_that_are_none(serve: Serve, body: bytes, said: str) -> None:
    running = serve()
    status, headers, answer = talk(running, head(length=len(body)) + body)
    error = json.loads(answer)["error"]
    assert status == 400, answer
    assert said in error["message"]
    assert headers["content-type"] == "application/json"
    assert "Traceback" not in answer.decode()


def test_texts_of_every_kind_are_answered(serve: Serve) -> None:
    running = serve()
    for text in ("\0", "</s><s>[INST] <<SYS>>", "\U0001f912" * 20, "\u202e\u200b\ufeff", "\ud83e\udd12", "\r\n\r\n"):
        body = json.dumps({"messages": [{"role": "user", "content": text + "."}], "max_tokens": 2}).encode()
        assert talk(running, head(length=len(body)) + body)[0] == 200, ascii(text)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 403),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400),  # TLS
        (head(length=-5), 400),
        (head(length="5, 6"), 400),
        (head(length=10**30), 400),
        (head(CHAT, "transfer-encoding: gzip, chunked"), 400),
        (head(CHAT, "transfer-encoding: chunked") + b"zz\r\n", 400),
        (head(CHAT, "content-length: 5", "content-length: 6"), 400),
        (head(CHAT, "host: other"), 400),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),  # no host
        (head("/healthz", "x: " + "y" * 100_000, method="GET"), 431),
        (head("/" + "y" * 300_000, method="GET"), 431),
        (head("/healthz", *[f"x{i}: y" for i in range(10_000)], method="GET"), 431),
        (head(length=200 << 20), 413),
        (head(length=2 << 20) + b" " * (2 << 20), 413),
        (head(CHAT, "content-encoding: gzip", length=4) + b"abcd", 415),
        (head(length=4).replace(b"application/json", b"text/plain") + b"abcd", 415),
    ],
)
def test_requests_that_are_none(serve: Serve, data: bytes, status: int) -> None:
    running = serve()
    got, _, answer = talk(running, data)
    assert got == status, answer
    assert json.loads(answer)["error"]["message"]
    healthy(running)


def test_a_body_in_chunks_has_a_limit_too(serve: Serve) -> None:
    running = serve()
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with running.connect() as s:
        s.sendall(head(CHAT, "transfer-encoding: chunked"))
        for _ in range(40):
            s.sendall(chunk)
        assert receive(s)[0] == 413


def test_a_long_body_is_not_kept(serve: Serve) -> None:
    """Who goes on sending is cut off; nothing of it is held."""
    running = serve(limits=QUICK)
    sent, began = 0, time.perf_counter()
    with running.connect() as s:
        s.sendall(head(length=1 << 30))
        try:
            while sent < 1 << 30:
                sent += s.send(bytes(1 << 20))
        except OSError:
            pass
    assert sent < 64 << 20
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("begun", [b"", b"G", b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"])
def test_headers_that_do_not_end_are_cut(serve: Serve, begun: bytes) -> None:
    running = serve(limits=QUICK)
    with running.connect() as s:
        s.sendall(begun)
        began = time.perf_counter()
        status, _, _ = receive(s)
        assert time.perf_counter() - began < 3
    assert status == (408 if begun else 0)


def test_a_byte_now_and_then_does_not_help(serve: Serve) -> None:
    running = serve(limits=QUICK)
    began = time.perf_counter()
    with running.connect() as s:
        s.sendall(b"GET /healthz HTTP/1.1\r\nx: ")
        with contextlib.suppress(OSError):
            while time.perf_counter() - began < 10:
                s.sendall(b"y")
                time.sleep(0.1)
    assert time.perf_counter() - began < 5


def test_a_body_that_does_not_end_is_cut(serve: Serve) -> None:
    running = serve(limits=QUICK)
    began = time.perf_counter()
    status, _, answer = talk(running, head(length=100) + b'{"mess')
    assert status == 408
    assert b"body took too long" in answer
    assert time.perf_counter() - began < 4


def test_between_two_requests_headers_are_awaited_too(serve: Serve) -> None:
    running = serve(limits=QUICK)
    with running.connect() as s:
        s.sendall(head("/healthz", method="GET"))
        assert receive(s)[0] == 200
        s.sendall(b"GET /heal")
        assert receive(s)[0] == 408


def test_half_sent_bodies_hold_nobody_up(serve: Serve) -> None:
    running = serve()
    opened = [running.connect() for _ in range(300)]
    try:
        for s in opened:
            s.sendall(head(length=100) + b"{")
        assert max(healthy(running) for _ in range(5)) < 2
        body = chat()
        assert talk(running, head(length=len(body)) + body)[0] == 200
    finally:
        for s in opened:
            s.close()


def test_connections_are_counted(serve: Serve) -> None:
    running = serve(limits=Limits(connections=10))
    opened = [running.connect() for _ in range(10)]
    try:
        time.sleep(0.2)
        with running.connect() as s:
            status, headers, _ = receive(s)
        assert status == 503
        assert headers["retry-after"]
    finally:
        for s in opened:
            s.close()
    time.sleep(0.2)
    healthy(running)


def test_who_does_not_read_is_left(serve: Serve) -> None:
    """Its answer is cancelled, and its connection ended."""
    engine = FakeEngine(("x" * 100_000,))
    running = serve(engine, limits=QUICK)
    body = json.dumps({"messages": QUESTION, "max_tokens": 200, "stream": True}).encode()
    with running.connect() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.sendall(head(length=len(body)) + body)
        deadline = time.monotonic() + 8
        while running.service.running or not engine.tickets:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert len(running.server.server_state.connections) == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_client_that_goes_frees_its_place(serve: Serve, stream: bool, how: str) -> None:
    engine = FakeEngine(pace=0.02)
    running = serve(engine)
    body = json.dumps({"messages": QUESTION, "max_tokens": 200, "stream": stream}).encode()
    with running.connect() as s:
        s.sendall(head(length=len(body)) + body)
        while not engine.tickets or engine.tickets[0].pieces < 3:
            time.sleep(0.005)
        if how == "reset":
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    pieces = engine.tickets[0].pieces
    assert engine.tickets[0].cancelled.wait(2)
    assert engine.tickets[0].pieces <= pieces + 5  # 0.1 s on a machine that others use
    deadline = time.monotonic() + 2
    while running.service.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_requests_on_one_connection_come_in_order(serve: Serve) -> None:
    running = serve()
    body = chat()
    one = head(length=len(body)) + body
    with running.connect() as s:
        s.sendall(one * 3 + head("/healthz", "connection: close", method="GET"))
        s.settimeout(20)
        got = b""
        while part := s.recv(65536):
            got += part
    assert got.count(b"HTTP/1.1 200") == 4


def test_200_clients_at_once(serve: Serve) -> None:
    running = serve(FakeEngine(pace=0.002))

    async def ask() -> list[int]:
        limits = httpx2.Limits(max_connections=200)
        async with httpx2.AsyncClient(timeout=60, limits=limits) as client:
            body = {"messages": QUESTION, "max_tokens": 5}
            asked = [client.post(running.url + CHAT, json=body) for _ in range(200)]
            return [r.status_code for r in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == [200] * 200


def test_the_log_holds_nothing_that_was_said(serve: Serve) -> None:
    engine = FakeEngine(("secretum ",))
    running = serve(engine)
    running.chat(messages=[{"role": "user", "content": "arcanum"}])
    running.chat(messages=[{"role": "arcanum", "content": "arcanum"}])
    running.ask("GET", "/arcanum?arcanum=1")
    engine.submit = lambda *_: (_ for _ in ()).throw(RuntimeError("arcanum"))  # type: ignore[method-assign]
    assert running.chat().status_code == 500
    deadline = time.monotonic() + 5
    while (log := "\n".join(running.log)).count(CHAT) < 3:  # a line comes behind its response
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "RuntimeError at" in log
    assert "arcanum" not in log
    assert "secretum" not in log


# --- who may ask ----------------------------------------------------------------------------------


def test_a_key_is_wanted_everywhere_but_for_health_and_the_page(serve: Serve) -> None:
    running = serve(access=Access(key=KEY))
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/api/about"),
        ("DELETE", "/api/feedback/receipt"),
        ("GET", "/no/such/thing"),
        ("GET", "//healthz"),
        ("OPTIONS", "/v1/models"),
    ):
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}):
            response = running.ask(method, path, headers=given)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
    assert running.ask("GET", "/healthz").status_code == 200
    assert running.ask("GET", "/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    assert running.ask("GET", "/v1/models", headers={"authorization": b"Bearer \xff"}).status_code == 401


@pytest.mark.parametrize("name", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[", "localhost@evil"])
def test_another_host_name_is_refused(serve: Serve, name: str) -> None:
    """As a page has that points its own name to 127.0.0.1."""
    status, _, _ = talk(serve(), f"GET /v1/models HTTP/1.1\r\nhost: {name}\r\n\r\n".encode())
    assert status == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example", "http://["])
def test_pages_of_others_are_refused(serve: Serve, origin: str) -> None:
    running = serve()
    response = running.chat()
    assert "access-control-allow-origin" not in response.headers
    response = running.ask(json={"messages": QUESTION}, headers={"origin": origin})
    assert response.status_code == 403
    assert running.ask(json={"messages": QUESTION}, headers={"origin": running.url}).status_code == 200


def test_pages_that_are_allowed(serve: Serve) -> None:
    theirs = "https://clinic.example"
    running = serve(access=Access(key=KEY, origins=frozenset({theirs})))
    preflight = running.ask("OPTIONS", headers={"origin": theirs, "access-control-request-method": "POST"})
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == theirs
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    asked = {"origin": theirs, "authorization": f"Bearer {KEY}"}
    assert running.ask(json={"messages": QUESTION}, headers=asked).headers["access-control-allow-origin"] == theirs
    assert running.ask("OPTIONS", headers={"origin": "https://evil.example"}).status_code == 403


def test_every_response_has_the_headers_that_protect_a_browser(serve: Serve) -> None:
    running = serve()
    for response in (running.ask("GET", "/healthz"), running.chat(), running.ask("GET", "/nothing")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-security-policy"].startswith("default-src 'none'")
        assert "server" not in response.headers
        assert response.headers["x-request-id"]


def test_a_response_waits_for_no_acknowledgement(serve: Serve) -> None:
    """Head and body are two writes: with Nagle's algorithm the second waits 40 ms for the first to be acknowledged."""
    running = serve()
    times = []
    with running.connect() as s:
        for _ in range(20):
            began = time.perf_counter()
            s.sendall(head("/healthz", method="GET"))
            assert receive(s)[0] == 200
            times.append(time.perf_counter() - began)
    assert sorted(times)[10] < 0.03
