"""The happenings of a request's answers, from the engine's thread into the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from llama.engine import Happening, Piece
from llama.generation import Request
from llama.sampling import SamplingParams
from web.choices import Choices
from web.metrics import Metrics


class Engine:
    """Says what the test says, when it says so."""

    cancelled = False

    def submit(self, request: Request, tell: Callable[[Happening], None]) -> Any:
        self.tell = tell
        return self

    def cancel(self, ticket: Any) -> None:
        self.cancelled = True


@pytest.mark.parametrize("turns", range(5))
def test_who_goes_while_a_piece_comes_is_gone(turns: int) -> None:
    """Whatever way the piece has come by then: so many turns of the event loop."""
    engine: Any = Engine()

    async def listen() -> None:
        with Choices(engine, Metrics(lambda: None)) as choices:
            choices.submit([Request([1], SamplingParams(), 5)])
            async for _ in choices.happenings(60):
                pass

    async def run() -> None:
        task = asyncio.create_task(listen())
        await asyncio.sleep(0.01)
        engine.tell(Piece("x", (1,)))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=2)
        assert task.cancelled()
        assert engine.cancelled

    asyncio.run(run())
