"""A server on a socket of this machine, in a thread, with a tiny model and an engine of the test's choice."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from llama.generation import Doctor
from tests.web.fake_engine import FakeEngine
from web.app import PAGE, application
from web.guard import Access
from web.limits import Limits
from web.server import Server, listen
from web.service import Service

HOSTS = frozenset({"127.0.0.1", "localhost"})
QUESTION = [{"role": "user", "content": "I have had a cough for two days"}]


@dataclass
class Running:
    """One that is up."""

    service: Service
    server: Server
    port: int
    thread: threading.Thread
    log: list[str] = field(default_factory=list)
    result: list[Any] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str = "POST", path: str = "/v1/chat/completions", **options: Any) -> httpx2.Response:
        return httpx2.request(method, self.url + path, timeout=30, **options)

    def chat(self, **fields: Any) -> httpx2.Response:
        return self.ask(json={"messages": QUESTION, **fields})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def stop(self) -> None:
        """As SIGTERM does."""
        self.server.handle_exit(15, None)


def start(
    doctor: Doctor,
    engine: Any = None,
    limits: Limits | None = None,
    access: Access | None = None,
    load: Callable[[], Any] | None = None,
    page: Path = PAGE,
    prepare: Callable[[Service], None] = lambda _: None,
    **options: Any,
) -> Running:
    """Up, and with its model, unless `load` keeps that waiting."""
    service = Service("chatdoctor", limits or Limits())
    prepare(service)
    log: list[str] = []
    app = application(service, access or Access(hosts=HOSTS), log=log.append, page=page)
    listener = listen("127.0.0.1", 0)
    server = Server(app, service, **options)
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(server.serve_on(listener, load or (lambda: (doctor, engine or FakeEngine()))))
        except BaseException as e:
            result.append(e)

    thread = threading.Thread(target=work, daemon=True)
    running = Running(service, server, listener.getsockname()[1], thread, log, result)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started or (load is None and service.state == "loading"):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return running
