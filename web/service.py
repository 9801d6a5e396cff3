"""What stands behind the routes: model, engine, database and ratings, and where the server is in its life.

server.py moves it from loading to ready to stopping; app.py and answering.py answer out of it. Knows no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from data.feedback import Feedback
from data.grounding import Grounding, row_fields
from data.patient import PatientCard
from data.triage import Triage
from llama.attendant import Attendant
from llama.engine import Engine
from llama.generation import Doctor, Request, room_for
from web.limits import Limits
from web.metrics import Metrics
from web.refusal import Refusal, wrong
from web.requests import Asked, chat_body, completion_body, rating_body

State = Literal["loading", "ready", "stopping", "broken"]
COME_BACK = {"loading": 5.0, "stopping": 30.0, "broken": 60.0}  # seconds


@dataclass
class Prepared:
    """A request as the engine takes it, with what attendants say and show beside its answers."""

    doctor: Doctor  # with the request's own attendants
    requests: list[Request]
    before: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out_turns: int = 0


class Service:
    """One model on its way into, in and out of service."""

    def __init__(self, name: str, limits: Limits) -> None:
        """name: what the model is called in requests."""
        self.name, self.limits = name, limits
        self.stopping = False
        self.doctor: Doctor | None = None
        self.engine: Engine | None = None
        self.grounding: Grounding | None = None
        self.feedback: Feedback | None = None
        self.triage = True
        self.metrics = Metrics(lambda: None if self.engine is None else self.engine.stats())
        self.running = 0  # requests that are being answered

    @property
    def state(self) -> State:
        """Where it is."""
        if self.stopping:
            return "stopping"
        if self.engine is None:
            return "loading"
        return "ready" if self.engine.stats().healthy else "broken"

    def begin(self, doctor: Doctor, engine: Engine) -> None:
        """Be ready. From any thread."""
        context = doctor.model.config.max_seq_len
        self.chat_body, self.completion_body = chat_body(self.limits, context), completion_body(self.limits, context)
        self.rating_body = rating_body(self.limits)
        self.doctor, self.engine = doctor, engine

    def answering(self) -> tuple[Doctor, Engine]:
        """What answers. Refusal 503 while there is nothing or it is on its way out."""
        if self.state != "ready":
            raise self.refusal()
        assert self.doctor is not None
        assert self.engine is not None
        return self.doctor, self.engine

    def refusal(self) -> Refusal:
        """Why nothing is answered."""
        said = {"loading": "the model is being loaded", "stopping": "the server is being stopped"}
        message = said.get(self.state, "the model has failed; the server must be started again")
        return Refusal(503, message, code=self.state, retry_after=COME_BACK[self.state])

    def prepare(self, asked: Asked) -> Prepared:
        """The engine's requests for what is asked; it takes a while. Refusal if it does not fit the context."""
        doctor, _ = self.answering()
        if asked.grounded and self.grounding is None:
            raise wrong("grounded", "this server has no disease database; start it with --diseases FILE.db")
        doctor = replace(
            doctor, stop=doctor.stop + asked.stop, max_new_tokens=asked.max_new_tokens or doctor.max_new_tokens
        )
        try:
            if asked.dialogue is None:
                ids = [doctor.raw_ids(text) for text in asked.prompts]
                for i in ids:
                    room_for(doctor.model, i, 1)
                return Prepared(doctor, [r for i in ids for r in self._requests(doctor, asked, i)])
            doctor = replace(doctor, attendants=self._attendants(asked))
            before, rows = doctor.before(asked.dialogue), self._rows(asked)
            prompt, left_out = doctor.fit(asked.dialogue)
        except ValueError as e:
            raise wrong("prompt" if asked.dialogue is None else "messages", str(e), "context_length_exceeded") from None
        return Prepared(doctor, self._requests(doctor, asked, prompt), before, rows, left_out)

    def _attendants(self, asked: Asked) -> tuple[Attendant, ...]:
        """Who stands beside the model for this request: its own card, and what the server has."""
        found: list[Attendant] = [PatientCard(asked.card)]
        if self.triage:
            found.insert(0, Triage(asked.card.person))
        if (grounding := self._grounds(asked)) is not None:
            found.append(grounding)
        return tuple(found)

    def _grounds(self, asked: Asked) -> Grounding | None:
        return None if asked.grounded is False else self.grounding

    def _rows(self, asked: Asked) -> list[dict[str, Any]]:
        """The rows that the answer is given, as they are shown beside it."""
        grounding = self._grounds(asked)
        if grounding is None or asked.dialogue is None:
            return []
        questions = [m.content for m in asked.dialogue.messages if m.role == "user"]
        return [row_fields(entry) for entry in grounding.found(questions).rows]

    def _requests(self, doctor: Doctor, asked: Asked, ids: list[int]) -> list[Request]:
        """One for each choice. The first has the seed that was given, the next ones those after it."""
        found = []
        for i in range(asked.choices):
            seed = asked.params.seed
            params = replace(asked.params, seed=None if seed is None else (seed + i) % 2**63)
            found.append(doctor.request(ids, raw=asked.dialogue is None, params=params))
        return found
