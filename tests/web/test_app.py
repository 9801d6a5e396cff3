"""What the routes answer, held against OpenAI's API by its own client."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from data import prepare
from data.feedback import Feedback
from data.grounding import beside
from llama.generation import Doctor
from llama.model import Llama
from tests.web.fake_engine import FakeEngine
from tests.web.running import QUESTION, Running
from web.service import Service

Serve = Callable[..., Running]


def client(running: Running, key: str = "none needed") -> openai.OpenAI:
    return openai.OpenAI(base_url=running.url + "/v1", api_key=key, max_retries=0, timeout=30)


def events(text: str) -> list[Any]:
    """The data of a stream of server-sent events."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_client_gets_an_answer(serve: Serve) -> None:
    answer = client(serve()).chat.completions.create(model="chatdoctor", messages=QUESTION, max_tokens=4)
    assert answer.choices[0].message.content == "You may have a cold. "
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == 4 + answer.usage.prompt_tokens
    assert answer.model == "chatdoctor"


def test_the_client_gets_a_stream(serve: Serve) -> None:
    running = serve()
    options = {"include_usage": True}
    chunks = list(
        client(running).chat.completions.create(
            model="chatdoctor", messages=QUESTION, max_tokens=4, stream=True, stream_options=options, n=2
        )
    )
    for i in range(2):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == i]
        assert "".join(c.delta.content or "" for c in mine) == "You may have a cold. "
        assert [c.finish_reason for c in mine if c.finish_reason] == ["length"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_the_client_gets_completions(serve: Serve) -> None:
    running = serve()
    answer = client(running).completions.create(model="chatdoctor", prompt=["a", "b"], max_tokens=2, n=2)
    assert [c.text for c in answer.choices] == ["You may "] * 4
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    stream = client(running).completions.create(model="chatdoctor", prompt="a", max_tokens=2, stream=True)
    assert "".join(c.choices[0].text for c in stream) == "You may "


def test_the_client_lists_models(serve: Serve) -> None:
    found = client(serve())
    assert [m.id for m in found.models.list()] == ["chatdoctor"]
    assert found.models.retrieve("chatdoctor").owned_by == "chatdoctor"
    with pytest.raises(openai.NotFoundError, match="no such model"):
        found.models.retrieve("gpt/4")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": -5}, 400, "max_tokens"),
        ({"max_tokens": 257}, 400, "max_tokens"),
        ({"n": 10**9}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"stop": ""}, 400, "stop"),
        ({"stop": ["a"] * 17}, 400, "stop"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "nurse", "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, 400, "messages"),
        ({"messages": [*QUESTION, {"role": "system", "content": "x"}, *QUESTION]}, 400, "messages"),
        ({"messages": QUESTION * 257}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "cough " * 20_000}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "cough " * 3_000}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0].text"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type"),
        ({"logit_bias": {"5": 100}}, 400, "logit_bias.5"),
        ({"temprature": 1}, 400, "temprature"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"patient": {"age": 200}}, 400, "patient.age"),
        ({"patient": {"sex": "male", "pregnancy": 20}}, 400, "patient"),
    ],
)
def test_what_cannot_be_is_refused(serve: Serve, fields: dict[str, Any], status: int, param: str) -> None:
    response = serve().chat(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert error["message"]


def test_what_asks_for_nothing_is_taken(serve: Serve) -> None:
    nothing = {"tools": [], "response_format": {"type": "text"}, "logit_bias": {}, "user": "me", "store": False}
    null = dict.fromkeys(["temperature", "stop", "max_tokens", "n", "stream", "seed", "logprobs", "patient"])
    message = {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None, "annotations": []}
    response = serve().chat(**nothing, **null, messages=[*QUESTION, message, *QUESTION, *QUESTION])
    assert response.status_code == 200, response.text


def test_settings_reach_the_engine(serve: Serve) -> None:
    engine = FakeEngine()
    serve(engine).chat(
        max_completion_tokens=7, temperature=0.25, top_p=0.5, top_k=-1, min_p=0.1, repetition_penalty=1.5,
        presence_penalty=-1, frequency_penalty=2, seed=-1, stop=["x", "y"], n=2, logprobs=True, top_logprobs=3,
    )  # fmt: skip
    first, second = (t.request for t in engine.tickets)
    p = first.params
    assert (p.temperature, p.top_p, p.top_k, p.min_p, p.repetition_penalty) == (0.25, 0.5, 0, 0.1, 1.5)
    assert (p.presence_penalty, p.frequency_penalty) == (-1, 2)
    assert (first.max_new_tokens, first.stop) == (7, ("x", "y"))
    assert p.seed == 2**63 - 1
    assert second.params.seed == 0


def test_attendants_speak_first(serve: Serve) -> None:
    running = serve()
    urgent = [{"role": "user", "content": "My father has crushing chest pain and cannot breathe"}]
    response = running.chat(messages=urgent, stream=True, max_tokens=3)
    first = events(response.text)[0]
    assert first["chatdoctor"]["before"][0].startswith("EMERGENCY")
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert running.chat(messages=urgent).json()["chatdoctor"]["before"]


def test_the_patient_card_is_the_request_s(serve: Serve) -> None:
    running = serve(FakeEngine(("Take ", "amoxicillin.")))
    card = {"allergies": ["penicillin"]}
    chunks = events(running.chat(patient=card, stream=True, max_tokens=2).text)
    (last,) = [c for c in chunks if c["choices"][0]["finish_reason"]]
    assert "amoxicillin" in last["chatdoctor"]["after"][0]
    assert running.chat(patient=card, max_tokens=2).json()["chatdoctor"]["after"]
    assert running.chat(max_tokens=2).json()["chatdoctor"]["after"] == []


def test_turns_that_are_left_out_are_told(serve: Serve) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "rest and rest"}] * 30
    answer = serve().chat(messages=[*turns, *QUESTION]).json()
    assert answer["chatdoctor"]["left_out_turns"] > 0
    assert answer["usage"]["prompt_tokens"] < 256


def test_a_model_error_ends_one_request(serve: Serve) -> None:
    engine = FakeEngine()
    running = serve(engine)
    engine.fails_after = 2
    response = running.chat()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "model_error"
    with pytest.raises(openai.APIError, match="not finite"):
        list(client(running).chat.completions.create(model="chatdoctor", messages=QUESTION, stream=True))
    engine.fails_after = None
    assert running.chat().status_code == 200
    engine.fails_after, engine.fatal = 2, True
    assert running.chat().json()["error"]["code"] == "broken"
    assert running.ask("GET", "/healthz").status_code == 503


def test_a_full_queue_says_when_to_come_back(serve: Serve) -> None:
    engine = FakeEngine()
    engine.places = 1
    response = serve(engine).chat(n=2)
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert engine.tickets[0].cancelled.is_set()


def test_until_the_model_is_there(serve: Serve) -> None:
    there = threading.Event()

    def load() -> Any:
        there.wait(10)
        raise ValueError("no such model")

    running = serve(load=load)
    assert running.ask("GET", "/healthz").json()["status"] == "loading"
    response = running.chat()
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    there.set()
    running.thread.join(10)
    assert str(running.result[0]) == "no such model"


def test_metrics_count(serve: Serve) -> None:
    running = serve()
    running.chat(max_tokens=5)
    running.chat(stream=True, max_tokens=5)
    text = running.ask("GET", "/metrics").text
    assert "chatdoctor_generated_tokens_total 10.0" in text
    assert 'chatdoctor_answers_total{reason="length"} 2.0' in text
    assert "chatdoctor_time_to_first_token_seconds_count 2.0" in text
    assert "chatdoctor_inter_token_seconds_count 8.0" in text
    assert "chatdoctor_engine_running 0.0" in text
    assert 'chatdoctor_requests_total{route="/v1/chat/completions",status="200"} 2.0' in text


def test_ratings_are_kept_with_consent_and_erased(serve: Serve, tmp_path: Path) -> None:
    def keeps(service: Service) -> None:
        service.feedback = Feedback(tmp_path / "ratings.db")

    running = serve(prepare=keeps)
    rated = {"messages": QUESTION, "answer": "A cold.", "rating": "good"}
    assert running.ask(path="/api/feedback", json=rated).status_code == 400
    assert running.ask(path="/api/feedback", json={**rated, "consent": False}).status_code == 400
    receipts = []
    for number in (1, 2):
        kept = running.ask(path="/api/feedback", json={**rated, "consent": True}).json()
        assert kept["id"] == number
        receipts.append(kept["receipt"])
    assert running.ask("GET", "/api/about").json()["feedback"] is True
    assert running.ask("DELETE", "/api/feedback").status_code == 405, "nobody erases everybody's"
    for guess in ("1", "2", "%20", "*", "'' OR 1", receipts[0][:-1]):
        assert running.ask("DELETE", f"/api/feedback/{guess}").json() == {"erased": 0}
    assert running.ask("DELETE", f"/api/feedback/{receipts[0]}").json() == {"erased": 1}
    assert running.ask("DELETE", f"/api/feedback/{receipts[0]}").json() == {"erased": 0}
    assert [r.id for r in Feedback(tmp_path / "ratings.db").ratings()] == [2]
    assert len(receipts[1]) > 20
    assert receipts[1] not in "".join(running.log)
    assert serve().ask(path="/api/feedback", json={**rated, "consent": True}).status_code == 404


def test_the_page_is_a_fixed_table_of_files(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / "app.js").write_text("1")
    (tmp_path / "secret.txt").write_text("no")
    running = serve(page=tmp_path)
    page = running.ask("GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert running.ask("GET", "/page/app.js").text == "1"
    for path in ("/page/secret.txt", "/page/../app.py", "/page/%2e%2e%2fapp.py", "/page/", "/etc/passwd"):
        assert running.ask("GET", path).status_code == 404, path


def test_other_methods_and_addresses(serve: Serve) -> None:
    running = serve()
    response = running.ask("PUT", "/v1/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert running.ask("GET", "/v1/nothing").json()["error"]["code"] == "not_found"
    assert running.ask("HEAD", "/healthz").status_code == 200


def test_answers_from_a_database_show_their_rows(serve: Serve, doctor: Doctor, tmp_path: Path) -> None:
    assert prepare.main(["diseases", "sample", str(tmp_path / "d.db")]) == 0
    roomy = replace(doctor, model=Llama(replace(doctor.model.config, max_seq_len=4096)).eval())

    def grounds(service: Service) -> None:
        place = roomy.place()
        service.grounding = beside(tmp_path / "d.db", doctor.tokenizer, doctor.chat_format, place, cards=True)

    running = serve(FakeEngine(("Aspirin ",)), doctor=roomy, prepare=grounds)
    assert running.ask("GET", "/api/about").json()["diseases"] is True
    asked = [{"role": "user", "content": "What helps against gout?"}]
    first, *_, last = events(running.chat(messages=asked, stream=True, max_tokens=2).text)
    (row,) = [r for r in first["chatdoctor"]["rows"] if r["name"].lower() == "gout"]
    assert {"id", "symptoms", "tests", "medications", "source", "url"} <= set(row)
    assert "rests on none" in last["chatdoctor"]["after"][0]
    assert running.chat(messages=asked).json()["chatdoctor"]["rows"] == first["chatdoctor"]["rows"]
    assert running.chat(messages=asked, grounded=False).json()["chatdoctor"]["rows"] == []
    assert serve().chat(messages=asked, grounded=True).json()["error"]["param"] == "grounded"
