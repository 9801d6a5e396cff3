"""The routes: OpenAI's /v1, the page and what it asks for, health and metrics. serve.py and tests make one application.

Every route reads its request here, strictly, and answers in JSON; chats and completions are answering.py's.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from llama.terminal import DISCLAIMER
from web import requests
from web.answering import answer
from web.fields import parse
from web.guard import Access, Guard, note_of, respond, stderr
from web.metrics import MEDIA_TYPE
from web.openapi import document
from web.refusal import Refusal
from web.service import Service

PAGE = Path(__file__).parent / "page"
MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
Endpoint = Callable[[Scope, Receive, Send], Awaitable[None]]


def application(
    service: Service,
    access: Access,
    log_texts: bool = False,
    log: Callable[[str], None] = stderr,
    page: Path = PAGE,
) -> ASGIApp:
    """The ASGI application of a service. log_texts: what went wrong is logged with its words."""
    routes = _Routes(service, access, page)
    table: list[tuple[str, str, Endpoint]] = [
        ("POST", "/v1/chat/completions", routes.chat),
        ("POST", "/v1/completions", routes.completion),
        ("GET", "/v1/models", routes.models),
        ("GET", "/v1/models/{model:path}", routes.model),
        ("GET", "/healthz", routes.health),
        ("GET", "/metrics", routes.metrics),
        ("GET", "/openapi.json", routes.openapi),
        ("GET", "/api/about", routes.about),
        ("POST", "/api/feedback", routes.rate),
        ("DELETE", "/api/feedback/{receipt}", routes.take_back),
        ("GET", "/", routes.page),
        ("GET", "/page/{name}", routes.page),
    ]
    methods: dict[str, dict[str, Endpoint]] = {}
    for method, path, endpoint in table:
        methods.setdefault(path, {})[method] = endpoint
    router = Router([Route(path, _Resource(path, by_method)) for path, by_method in methods.items()])
    router.redirect_slashes = False
    router.default = _nothing
    return Guard(router, service, access, log, log_texts)


class _Resource:
    """What stands at a path: an endpoint a method."""

    def __init__(self, path: str, by_method: dict[str, Endpoint]) -> None:
        self._path, self._by_method = path, by_method

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note_of(scope).route = self._path
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        endpoint = self._by_method.get(method)
        if endpoint is None:
            allowed = ", ".join(self._by_method)
            raise Refusal(405, f"{self._path} takes {allowed}", headers={"allow": allowed})
        await endpoint(scope, receive, send)


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    raise Refusal(404, "there is nothing at this address; /openapi.json says what there is", code="not_found")


class _Routes:
    """The endpoints."""

    def __init__(self, service: Service, access: Access, page: Path) -> None:
        self._service, self._access = service, access
        self._began = int(time.time())
        files = sorted(page.iterdir()) if page.is_dir() else []
        self._files = {f.name: (f.read_bytes(), MEDIA[f.suffix]) for f in files if f.suffix in MEDIA}

    # --- /v1 ---

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        doctor, _ = service.answering()
        body = await self._json(scope, receive)
        asked = requests.chat(body, service.chat_body, service.limits, doctor.params, doctor.chat_format)
        await self._answer(asked, scope, receive, send)

    async def completion(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        doctor, _ = service.answering()
        body = await self._json(scope, receive)
        asked = requests.completion(body, service.completion_body, service.limits, doctor.params)
        await self._answer(asked, scope, receive, send)

    async def _answer(self, asked: requests.Asked, scope: Scope, receive: Receive, send: Send) -> None:
        requests.of_this_server(asked, self._service.name)
        await answer(self._service, asked, scope, receive, send)

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _say(send, {"object": "list", "data": [self._model()]})

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path_params"]["model"] != self._service.name:
            raise Refusal(404, f"there is no such model here, only {self._service.name!r}", code="model_not_found")
        await _say(send, self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self._service.name, "object": "model", "created": self._began, "owned_by": "chatdoctor"}

    # --- about the server ---

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._service.state
        if state != "ready":
            await _say(send, {"status": state, **self._service.refusal().to_json()}, 503)
            return
        await _say(send, {"status": "ok"})

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, 200, self._service.metrics.text(), {"content-type": MEDIA_TYPE})

    async def openapi(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.answering()
        await _say(send, document(self._service, self._access.key is not None))

    async def about(self, scope: Scope, receive: Receive, send: Send) -> None:
        doctor, _ = self._service.answering()
        about = {
            "model": self._service.name,
            "description": doctor.describe().removeprefix(f"{doctor.name}: "),  # its name may be a path
            "context": doctor.model.config.max_seq_len,
            "disclaimer": " ".join(DISCLAIMER.split()),
            "diseases": self._service.grounding is not None,
            "feedback": self._service.feedback is not None,
        }
        await _say(send, about)

    # --- ratings ---

    async def rate(self, scope: Scope, receive: Receive, send: Send) -> None:
        feedback = self._feedback()
        rated = requests.rating(await self._json(scope, receive), self._service.rating_body)

        receipt = secrets.token_urlsafe(16)  # numbers can be guessed, and would let anybody erase anything

        def keep() -> int:
            feedback.agree()
            return feedback.add(
                self._service.name, rated.messages, rated.answer, rated.rating, rated.reason, rated.correction, receipt
            )

        await _say(send, {"id": await _in_thread(keep), "receipt": receipt})

    async def take_back(self, scope: Scope, receive: Receive, send: Send) -> None:
        feedback, receipt = self._feedback(), scope["path_params"]["receipt"]
        await _say(send, {"erased": await _in_thread(lambda: feedback.take_back(receipt))})

    def _feedback(self) -> Any:
        self._service.answering()
        if self._service.feedback is None:
            raise Refusal(404, "this server keeps no ratings; start it with --feedback FILE.db", code="no_feedback")
        return self._service.feedback

    # --- the page ---

    async def page(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path_params"].get("name", "index.html")
        if name not in self._files:
            raise Refusal(404, "there is no such file", code="not_found")
        content, media = self._files[name]
        await respond(send, 200, content, {"content-type": media, "cache-control": "no-cache"})

    # --- reading ---

    async def _json(self, scope: Scope, receive: Receive) -> Any:
        """The body of a request. Refusal if it is too long or no JSON."""
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the body must be JSON: Content-Type: application/json")
        if headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "compressed bodies are not read")
        most = self._service.limits.body
        too_long = Refusal(413, f"the body is over {most:,} bytes", code="body_too_large")
        if int(headers.get("content-length", "0")) > most:
            raise too_long
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "the client went before its body was there")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise too_long
            more = message.get("more_body", False)
        return parse(b"".join(parts))


async def _say(send: Send, value: dict[str, Any], status: int = 200) -> None:
    await respond(send, status, json.dumps(value, ensure_ascii=False).encode(), {})


async def _in_thread(work: Callable[[], int]) -> int:
    try:
        return await asyncio.to_thread(work)
    except ValueError as e:
        raise Refusal(503, str(e), code="feedback", retry_after=60) from None
