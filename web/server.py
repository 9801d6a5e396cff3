"""A service on a socket: loads its model, serves, and ends in good order when asked to. serve.py runs it.

The first SIGTERM or SIGINT ends it when what is running has ended, or its time is up; the second at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from llama.engine import Engine
from llama.generation import Doctor
from web.protocol import Config, Connection
from web.service import Service

PATIENCE = 30.0  # seconds that running answers get to end


def listen(host: str, port: int) -> socket.socket:
    """The socket that connections come to. ValueError if it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as e:
        used = e.errno == errno.EADDRINUSE
        why = "another program does; choose another one with --port" if used else e.strerror or str(e)
        raise ValueError(f"cannot listen on {host}, port {port}: {why}") from None


class Server(uvicorn.Server):
    """The server of one service."""

    def __init__(self, app: ASGIApp, service: Service, patience: float = PATIENCE) -> None:
        limits = service.limits
        config = Config(
            app,
            http=Connection,  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(limits.idle_time),
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=limits.headers,
        )
        config.limits = limits
        super().__init__(config)
        self._service, self._patience = service, patience
        self._ending: asyncio.Task[None] | None = None
        self._asked = False
        self._hurried = False
        self._failed: BaseException | None = None

    def serve_on(self, listener: socket.socket, load: Callable[[], tuple[Doctor, Engine]]) -> bool:
        """Serve until asked to stop; whether every answer came to its end. What load raises is raised.

        Requests are answered with 503 until the model is there.
        """
        threading.Thread(target=self._load, args=(load,), name="load", daemon=True).start()
        self.run([listener])
        if self._failed is not None:
            raise self._failed
        return not self._hurried

    def _load(self, load: Callable[[], tuple[Doctor, Engine]]) -> None:
        """In a thread: bring the model in."""
        try:
            self._service.begin(*load())
        except BaseException as e:
            self._failed = e
            self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, but who asks the server to end is not answered with death by that signal."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._hurried = self.force_exit = self._asked
        self._asked = True

    async def on_tick(self, counter: int) -> bool:
        if self._asked and self._ending is None:
            self._ending = asyncio.create_task(self._end())
        return await super().on_tick(counter) or self.force_exit

    async def _end(self) -> None:
        """Refuse what comes, wait for what runs, then leave."""
        service = self._service
        service.stopping = True
        if service.engine is not None:
            await asyncio.to_thread(service.engine.close, self._patience)
        while service.running and self._patience > 0:  # their last words are on the way
            await asyncio.sleep(0.02)
            self._patience -= 0.02
        self.should_exit = True
