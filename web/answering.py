"""A chat or a completion, from its parsed request to the last byte of its response, streamed or whole.

app.py calls answer(). Whatever ends it (the answer, the client, a deadline, the server), the engine is told.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.types import Receive, Scope, Send

from llama.engine import Begun, Done, Failed, Full, Happening, Piece
from web.choices import Choices
from web.guard import note_of, respond
from web.refusal import Refusal
from web.requests import Asked
from web.service import Prepared, Service
from web.shapes import Chat, Choice, Completion, Usage

STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the tokens
]
PING = 10.0  # seconds of silence after which a stream gets a comment, so that whoever relays it keeps it open


async def answer(service: Service, asked: Asked, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, while the client is there and for as long as the limits allow."""
    _, engine = service.answering()
    limits = service.limits
    if service.running >= limits.requests:
        raise Refusal(429, "too many requests are being answered; come back later", code="too_many", retry_after=2)
    service.running += 1
    try:
        with Choices(engine, service.metrics) as choices:
            work = _Answering(service, asked, choices, scope, send)
            async with asyncio.timeout(limits.answer_time):
                await _while_there(receive, work.run())
    except TimeoutError:
        message = f"the answer was not ready after {limits.answer_time:g} seconds"
        raise Refusal(503, message, code="timeout", retry_after=5) from None
    finally:
        service.running -= 1


async def _while_there(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run it until it is done or the client has gone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Answering:
    """One request on its way."""

    def __init__(self, service: Service, asked: Asked, choices: Choices, scope: Scope, send: Send) -> None:
        self._service, self._asked, self._choices, self._send = service, asked, choices, send
        self._note = note_of(scope)
        self._usage = Usage()
        self._found: list[Choice] = []
        self._prepared: Prepared | None = None

    async def run(self) -> None:
        asked, service = self._asked, self._service
        self._prepared = prepared = await asyncio.to_thread(service.prepare, asked)
        shape = (Completion if asked.dialogue is None else Chat)(service.name, prepared.doctor.tokenizer)
        self._found = [Choice() for _ in prepared.requests]
        try:
            self._choices.submit(prepared.requests)
        except Full as e:
            service.answering()  # it may be closed by now, which is another matter
            message = "too many requests wait for an answer; come back later"
            raise Refusal(429, message, code="queue_full", retry_after=e.retry_after) from None
        try:
            await (self._stream(shape) if asked.stream else self._whole(shape))
        finally:
            self._note.counts.update(prompt=self._usage.prompt, tokens=self._choices.tokens)

    async def _events(self) -> AsyncIterator[tuple[int, Happening] | None]:
        """Happenings, taken down. Refusal where an answer fails."""
        async for event in self._choices.happenings(PING):
            if event is not None:
                i, happening = event
                if isinstance(happening, Failed):
                    self._service.answering()  # a failure of the whole engine, or its end, is told as such
                    raise Refusal(500, f"the model failed on this request: {happening.message}", code="model_error")
                self._take(i, happening)
            yield event

    def _take(self, i: int, happening: Happening) -> None:
        choice = self._found[i]
        if isinstance(happening, Begun):
            if i % self._asked.choices == 0:  # the choices of a prompt have it in common
                self._usage.prompt += happening.prompt_tokens
                self._usage.reused += happening.reused_tokens
        elif isinstance(happening, Piece):
            choice.text += happening.text
            choice.logprobs += happening.logprobs or []
            self._usage.answer += len(happening.token_ids)
        elif isinstance(happening, Done):
            choice.reason = happening.finish_reason

    async def _after(self, i: int) -> list[str]:
        """What attendants say to an answer."""
        dialogue, prepared = self._asked.dialogue, self._prepared
        if dialogue is None or prepared is None:
            return []
        return await asyncio.to_thread(prepared.doctor.after, dialogue, self._found[i].text)

    def _before(self, **after: list[str]) -> dict[str, Any] | None:
        """Our object beside the answer; a plain completion has none."""
        prepared = self._prepared
        if self._asked.dialogue is None or prepared is None:
            return None
        return {"before": prepared.before, **after, "rows": prepared.rows, "left_out_turns": prepared.left_out_turns}

    async def _whole(self, shape: Chat) -> None:
        async for _ in self._events():
            pass
        said = [text for i in range(len(self._found)) for text in await self._after(i)]
        body = shape.whole(self._found, self._usage, self._before(after=list(dict.fromkeys(said))))
        await respond(self._send, 200, _json(body), {})

    async def _stream(self, shape: Chat) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": STREAM})
        try:
            for i in range(len(self._found)):
                if self._asked.dialogue is not None:
                    beside = self._before() if i == 0 else None
                    await self._event(shape.chunk(i, "", beside=beside, first=True))
            async for event in self._events():
                if event is None:
                    await self._bytes(b": waiting\n\n")
                    continue
                i, happening = event
                if isinstance(happening, Piece) and (happening.text or happening.logprobs):
                    await self._event(shape.chunk(i, happening.text, happening.logprobs))
                elif isinstance(happening, Done):
                    said = await self._after(i)
                    beside = {"after": said} if self._asked.dialogue is not None else None
                    await self._event(shape.chunk(i, None, reason=happening.finish_reason, beside=beside))
            if self._asked.include_usage:
                await self._event(shape.last(self._usage), counts=True)
            await self._bytes(b"data: [DONE]\n\n")
        except Refusal as refusal:  # the status has been sent; clients find the error in the stream
            await self._event(refusal.to_json(), counts=True)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _event(self, value: dict[str, Any], counts: bool = False) -> None:
        if self._asked.include_usage and not counts:
            value["usage"] = None
        await self._bytes(b"data: " + _json(value) + b"\n\n")

    async def _bytes(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
