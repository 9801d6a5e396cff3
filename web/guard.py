"""What every request passes before a route sees it: host, origin, key; and what every response gets on its way out.

The outermost layer of the application. It also counts, writes the log, turns every failure into an answer of OpenAI's
shape, and reads on where a body is not wanted. No text of a request or an answer goes into the log unless that is
asked for.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from web.refusal import Refusal
from web.service import Service

LINGER_BYTES, LINGER_TIME = 4 << 20, 10.0  # of a body that is not wanted, read so that its sender sees the answer
OPEN = (
    "/healthz",
    "/",
    "/favicon.ico",
)  # and what is below /page/: files of this repository; the page asks for the key
SECURITY = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    # A string that is used as markup is an error of the page.
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    key: str | None = None
    hosts: frozenset[str] | None = None  # names that a Host header may have; None: any
    origins: frozenset[str] = frozenset()  # pages of other hosts that may ask, as "https://name"


@dataclass
class Note:
    """What is known of a request for log and metrics; routes add to it."""

    id: str
    route: str = "other"
    status: int = 0
    counts: dict[str, Any] = field(default_factory=dict)


def note_of(scope: MutableMapping[str, Any]) -> Note:
    """The note that goes with a request."""
    return scope["state"]["note"]


class Guard:
    """The application, guarded."""

    def __init__(
        self, app: ASGIApp, service: Service, access: Access, log: Callable[[str], None], log_texts: bool
    ) -> None:
        self._app, self._service, self._access = app, service, access
        self._log, self._log_texts = log, log_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, note = time.perf_counter(), Note(secrets.token_hex(8))
        scope.setdefault("state", {})["note"] = note
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
        origin = next((v for k, v in headers if k == "origin"), None)
        extra = {"x-request-id": note.id, **SECURITY, **self._for_origin(origin)}
        body = Body(receive, headers)

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                note.status = message["status"]
                given = {k for k, _ in message["headers"]}
                added = [(k.encode(), v.encode()) for k, v in extra.items() if k.encode() not in given]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        try:
            try:
                self._check(scope, headers, origin)
                if scope["method"] == "OPTIONS" and origin in self._access.origins:
                    await respond(send_on, 204, b"", {})
                else:
                    await self._app(scope, body.receive, send_on)
            except HTTPException as e:
                raise Refusal(e.status_code, e.detail, headers=e.headers) from None
            except (Refusal, asyncio.CancelledError):
                raise
            except Exception as e:
                self._log(f"{note.id} failed: {_where(e)}" + (f": {e}" if self._log_texts else ""))
                raise Refusal(500, f"the server failed on this request; its log says where, by {note.id}") from None
        except Refusal as refusal:
            if note.status == 0:
                await body.refuse(refusal, send_on)
        finally:
            self._service.metrics.requests.labels(note.route, str(note.status)).inc()
            self._service.metrics.seconds.observe(time.perf_counter() - began)
            counts = "".join(f" {k}={v}" for k, v in note.counts.items())
            self._log(f"{note.id} {note.route} {note.status} {time.perf_counter() - began:.3f} s{counts}")

    def _check(self, scope: Scope, headers: list[tuple[str, str]], origin: str | None) -> None:
        """Refusal for who may not ask this."""
        if sum(len(k) + len(v) + 4 for k, v in headers) > self._service.limits.headers:
            raise Refusal(431, f"the headers are over {self._service.limits.headers:,} bytes")
        access, host = self._access, next((v for k, v in headers if k == "host"), "")
        if access.hosts is not None and _name(host) not in access.hosts:
            raise Refusal(
                403, "this server does not answer to that host name; serve.py has --allowed_host", code="host"
            )
        if origin is not None and origin not in access.origins and _place(origin) != host.lower():
            raise Refusal(
                403, "pages of other hosts may not ask this server; serve.py has --allow_origin", code="origin"
            )
        if scope["method"] == "OPTIONS" and origin in access.origins:  # a preflight, which carries no key
            return
        if access.key is None or scope["path"] in OPEN or scope["path"].startswith("/page/"):
            return
        given = next((v for k, v in headers if k == "authorization"), "")
        scheme, _, key = given.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), access.key.encode()):
            message = "this server wants its key: Authorization: Bearer KEY"
            raise Refusal(401, message, code="invalid_api_key")

    def _for_origin(self, origin: str | None) -> dict[str, str]:
        if origin is None or origin not in self._access.origins:
            return {"vary": "origin"} if self._access.origins else {}
        return {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-allow-headers": "authorization, content-type",
            "cross-origin-resource-policy": "cross-origin",
            "vary": "origin",
        }


class Body:
    """The body of a request, read within a limit or not at all."""

    def __init__(self, receive: Receive, headers: list[tuple[str, str]]) -> None:
        self._receive = receive
        names = dict(headers)
        self._unread = names.get("content-length", "0") != "0" or "transfer-encoding" in names

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._unread = False
        return message

    async def refuse(self, refusal: Refusal, send: Send) -> None:
        """Say so. Who is still sending a body is read for a moment, or a reset would overtake the answer."""
        body, headers = json.dumps(refusal.to_json(), ensure_ascii=False).encode("utf-8", "replace"), refusal.headers
        if not self._unread:
            await respond(send, refusal.status, body, headers)
            return
        await respond(send, refusal.status, body, {**headers, "connection": "close"}, more=True)
        size = 0
        try:
            async with asyncio.timeout(LINGER_TIME):
                while self._unread and size < LINGER_BYTES:
                    size += len((await self.receive()).get("body", b""))
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def respond(
    send: Callable[[Message], Awaitable[None]], status: int, body: bytes, headers: dict[str, str], more: bool = False
) -> None:
    """A whole response, JSON unless the headers say otherwise. more: the caller ends it."""
    named = {
        "content-type": "application/json",
        "cache-control": "no-store",
        **headers,
        "content-length": str(len(body)),
    }
    if status == 204:
        named = {k: v for k, v in named.items() if k not in ("content-type", "content-length")}
    pairs = [(k.encode(), v.encode()) for k, v in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": more})


def stderr(line: str) -> None:
    """The log."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=sys.stderr, flush=True)


def _where(error: Exception) -> str:
    """An exception's kind and lines, without its words: they may quote what a patient said."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return f"{type(error).__name__} at " + " < ".join(f"{f.filename}:{f.lineno}" for f in reversed(frames))


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
