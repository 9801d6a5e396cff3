"""uvicorn's HTTP/1.1 connection with what it lacks: time limits for who sends or reads slowly, refusals in our shape.

server.py gives it to uvicorn. A connection is in one of four states: its headers are awaited, its body is, an answer is
under way, or it is idle between two requests (which uvicorn limits itself).
"""

from __future__ import annotations

import asyncio
import http
import json
import socket

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from web.limits import Limits
from web.refusal import Refusal


class Config(uvicorn.Config):
    """uvicorn's, with ours."""

    limits = Limits()


class Connection(H11Protocol):
    """One connection."""

    config: Config
    _deadline: asyncio.TimerHandle | None = None  # for headers or body
    _unread: asyncio.TimerHandle | None = None  # for what the client leaves in our buffer
    _awaited: str | None = None  # "headers", "body" or None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does so for sockets that name TCP as their protocol, which accepted ones do not: 40 ms a response.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > self.config.limits.connections:
            self._refuse(Refusal(503, "too many connections", code="too_many_connections", retry_after=5))
        else:
            self._await("headers")

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later()
        elif not self._refused:
            self._look()

    def handle_events(self) -> None:
        """As uvicorn does, but a request that is none is refused by its own status, and never twice."""
        if not self._refused:
            super().handle_events()

    def send_400_response(self, msg: str) -> None:
        too_long = len(self.conn.trailing_data[0]) > self.config.limits.headers
        self._refuse(Refusal(431, "the headers are too long") if too_long else Refusal(400, "this is no HTTP request"))

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_later()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None and not self.transport.is_closing():
            self._unread.cancel()
            self._unread = None

    # --- time ---

    def _look(self) -> None:
        """Await what the client owes."""
        if self.transport.is_closing():
            self._await(None)
        elif self.conn.their_state is h11.SEND_BODY:
            self._await("body")
        elif self.conn.their_state is h11.IDLE and (self.conn.trailing_data[0] or self.timeout_keep_alive_task is None):
            self._await("headers")
        else:
            self._await(None)

    def _await(self, what: str | None) -> None:
        """From the moment that something is awaited its time runs, however much comes in the meantime."""
        if what == self._awaited:
            return
        self._awaited = what
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if what is not None:
            limits = self.config.limits
            seconds = limits.header_time if what == "headers" else limits.body_time
            self._deadline = self.loop.call_later(seconds, self._too_slow, what)

    def _too_slow(self, what: str) -> None:
        if what == "headers" and not self.conn.trailing_data[0]:
            self.transport.abort()  # who never said anything is told nothing
        else:
            self._refuse(Refusal(408, f"the {what} took too long", code="timeout"))

    def _abort_later(self) -> None:
        """End the connection if what was written is not read in time."""
        if self._unread is None:
            self._unread = self.loop.call_later(self.config.limits.write_time, self.transport.abort)

    # --- refusals ---

    def _refuse(self, refusal: Refusal) -> None:
        """Say so, unless an answer is under way already, and close."""
        self._refused = True
        self._await(None)
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        body = json.dumps(refusal.to_json()).encode()
        named = {**refusal.headers, "content-type": "application/json", "content-length": str(len(body))}
        head = [f"HTTP/1.1 {refusal.status} {http.HTTPStatus(refusal.status).phrase}"]
        head += [f"{k}: {v}" for k, v in {**named, "connection": "close"}.items()]
        self.transport.write("\r\n".join([*head, "", ""]).encode() + body)
        if self.cycle is not None and not self.cycle.response_complete:  # the application waits for a body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
        self._abort_later()
