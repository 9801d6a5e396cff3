"""The client against a server that misbehaves: what is tried again, what stops at once, and what it says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from data.asking import client as module
from data.asking.client import Endpoint, Reply, SetAside, Stopped, _retry_after
from data.asking.spending import Tokens
from tests.data.stub_endpoint import Stub

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def ask() -> Iterator[Callable[..., Any]]:
    """Ask a stub once, without waiting long between attempts; attempts that may have been paid for are listed."""
    opened: list[Endpoint] = []

    def ask(stub: Stub, lost: list[str] | None = None, **options: Any) -> Reply:
        opened.append(Endpoint(stub.url, **{"timeout": 5.0, **options}))
        return opened[-1].ask(BODY, lambda why: lost.append(why) or True if lost is not None else True)  # type: ignore[func-returns-value]

    yield ask
    for endpoint in opened:
        endpoint.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)


def stub(*faults: str, **options: Any) -> Stub:
    return Stub(faults, **{"say": lambda _: "Good day.", **options})


@pytest.mark.parametrize("fault", ["429 0.01", "429", "408", "500", "502", "503 0.01", "504", "529"])
def test_what_may_pass_is_tried_again(ask: Callable[..., Reply], fault: str) -> None:
    lost: list[str] = []
    with stub(fault, fault) as server:
        assert ask(server, lost) == Reply("Good day.", "stop", Tokens(1, 2))
        assert len(server.asked) == 3
    assert lost == []  # such refusals cost nothing


@pytest.mark.parametrize("fault", ["cut", "nonsense", "html", "error"])
def test_a_reply_that_is_none_may_have_been_paid_for(ask: Callable[..., Reply], fault: str) -> None:
    lost: list[str] = []
    with stub(fault) as server:
        assert ask(server, lost).text == "Good day."
    assert len(lost) == 1


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_time_outs_are_for_the_whole_reply(ask: Callable[..., Reply], fault: str) -> None:
    lost: list[str] = []
    with stub(fault, say=lambda _: "a" * 200) as server:
        began = time.monotonic()
        ask(server, lost, timeout=0.3)
        assert time.monotonic() - began < 3
    assert "ReadTimeout" in lost[0]


@pytest.mark.parametrize(
    ("status", "remedy"),
    [("400", "does not take"), ("401", "--key_env"), ("403", "key"), ("404", "path"), ("418", "418")],
)
def test_what_cannot_pass_stops_at_once(ask: Callable[..., Reply], status: str, remedy: str) -> None:
    with stub(status) as server:
        with pytest.raises(ValueError, match=remedy) as e:
            ask(server)
        assert len(server.asked) == 1
    assert "\n" not in str(e.value)
    assert f"the stub says {status}" in str(e.value)


def test_a_request_is_set_aside_after_its_last_attempt(ask: Callable[..., Reply]) -> None:
    with stub(*["500"] * 9) as server:
        with pytest.raises(SetAside, match=r"HTTP 500 .*4 attempts"):
            ask(server, attempts=4)
        assert len(server.asked) == 4
    with stub(*["nonsense"] * 9) as server:
        with pytest.raises(SetAside, match=r"not JSON.*3 attempts"):
            ask(server)
        assert len(server.asked) == 3


def test_no_attempt_follows_where_the_budget_has_no_room() -> None:
    with stub("nonsense") as server:
        endpoint = Endpoint(server.url)
        with pytest.raises(SetAside, match="budget"):
            endpoint.ask(BODY, lambda _: False)
        endpoint.close()
        assert len(server.asked) == 1


def test_retry_after_holds_all_threads_back() -> None:
    with stub("429 0.6", delay=0.0) as server:
        endpoint = Endpoint(server.url)
        first = threading.Thread(target=endpoint.ask, args=(BODY, lambda _: True))
        began = time.monotonic()
        first.start()
        while not server.asked or not endpoint._pause_until:
            time.sleep(0.01)
        endpoint.ask(BODY, lambda _: True)
        assert time.monotonic() - began > 0.55
        first.join()
        endpoint.close()


def test_retry_after_is_a_number_or_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _retry_after("12") == 12
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert 1e8 < _retry_after("Wed, 21 Oct 2065 07:28:00 GMT") < 1e10
    for nothing in ("", "soon", "-3", "nan"):
        assert _retry_after(nothing) == 0


def test_a_server_that_asks_for_hours_ends_the_run(ask: Callable[..., Reply]) -> None:
    with stub("429 7200") as server, pytest.raises(ValueError, match="7,200 s"):
        ask(server)


def test_waiting_ends_when_the_run_does() -> None:
    with stub("429 60") as server:
        endpoint = Endpoint(server.url)
        threading.Timer(0.2, endpoint.stop.set).start()
        began = time.monotonic()
        with pytest.raises(Stopped):
            endpoint.ask(BODY, lambda _: True)
        assert time.monotonic() - began < 5
        endpoint.close()


def test_the_key_is_sent_and_never_shown() -> None:
    with stub() as server:
        server.key = "sk-right"
        right, wrong = (Endpoint(server.url, key=k) for k in ("sk-right", "sk-wrong-one"))
        assert right.ask(BODY, lambda _: True).text == "Good day."
        with pytest.raises(ValueError, match=r"401.*\*\*\*") as e:
            wrong.ask(BODY, lambda _: True)
        assert "sk-wrong-one" not in str(e.value)
        right.close()
        wrong.close()


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x/v1", "http://", "http://user:secret@host/v1"])
def test_endpoints_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="endpoint") as e:
        Endpoint(url)
    assert "secret" not in str(e.value)


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_keys_that_are_none_are_refused_unseen(key: str) -> None:
    with pytest.raises(ValueError, match="key") as e:
        Endpoint("http://localhost/v1", key=key)
    assert key not in str(e.value)


def test_nobody_there() -> None:
    endpoint = Endpoint("http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="cannot be reached"):
        endpoint.ask(BODY, lambda _: True)
    endpoint.close()


def test_both_spellings_of_the_address() -> None:
    for url in ("http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"):
        endpoint = Endpoint(url)
        assert endpoint.url == "http://h/v1/chat/completions"
        endpoint.close()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(ValueError, match="pip install httpx2"):
        Endpoint("http://localhost/v1")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"[1]", "[1]"),
        (b'{"choices": []}', "choices"),
        (b'{"choices": [{"message": {"content": 3}}]}', "is not text"),
        (b'{"error": {"message": "busy"}}', "busy"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_replies_that_are_none(content: bytes, expected: str) -> None:
    said = module._reply(content)
    assert isinstance(said, str)
    assert expected in said


def test_replies_without_a_count() -> None:
    for usage in (b"", b', "usage": null', b', "usage": {"prompt_tokens": "many"}', b', "usage": {"prompt_tokens": 3}'):
        said = module._reply(b'{"choices": [{"message": {"content": null}}]' + usage + b"}")
        assert said == Reply("", "", None)
