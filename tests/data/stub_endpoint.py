"""An OpenAI-compatible server on this machine that misbehaves as it is told, and otherwise writes plausible dialogues.

It knows the rows by the facts in its prompts, as a model would. What it answered is counted by prompt, so that a test
sees whether anything was asked twice. Used by the tests of data/asking/generate.py and by bench/bench_generate.py.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

OPENINGS = (
    "Hello doctor.",
    "Good evening, I hope you can help.",
    "I was at work when I noticed this.",
    "My sister told me to write to you.",
    "Sorry to trouble you so late.",
    "This worries me a lot.",
    "I am new to this town.",
    "For three weeks now I sleep badly.",
)
MIDDLES = (
    "There is good reason to act on this.",
    "I have seen it in many people of your age.",
    "We should not lose time over it.",
    "It is usually easy to find out.",
    "That fits what you tell me.",
    "Let us go through it together.",
)
CLOSINGS = (
    "Come back in a week and tell me how you feel.",
    "Rest until then, and drink enough.",
    "Please bring your earlier letters along.",
    "Call us should it get worse.",
    "My colleague will see you on Thursday.",
    "Most people recover well.",
)


def write_dialogue(prompt: str) -> str:
    """A dialogue for a prompt of data/asking/prompts.py, the same for the same prompt."""
    rng = random.Random(prompt)
    facts = dict(line.split(": ", 1) for line in prompt.split("Facts:\n")[1].splitlines())
    name, opening = facts["Disease"], rng.choice(OPENINGS)
    middle, closing = rng.choice(MIDDLES), rng.choice(CLOSINGS)

    def some(kind: str) -> str:
        values = facts[kind].split("; ")
        return ", ".join(rng.sample(values, min(len(values), rng.randint(1, 4))))

    if "has these symptoms" in prompt:
        symptoms = prompt.split("and no others: ")[1].split(". The patient")[0]
        question = f"{opening} I have {symptoms.replace('; ', ' and ').lower()}. What may it be?"
        urgent = "Go to an emergency department at once. " if "emergency" in facts.get("Urgency", "") else ""
        answer = f"{middle} This may be {name}. {urgent}{closing}"
    elif "which medications" in prompt:
        question = f"{opening} They say that I have {name}. Which medications help?"
        answer = f"{middle} I would give you {some('Medications')}. {closing}"
    else:
        question = f"{opening} I was told it is {name}. Which tests do I need?"
        answer = f"{middle} We begin with {some('Tests')}. {closing}"
    return f"Patient: {question}\nDoctor: {answer}"


class Stub:
    """faults: what happens to the first requests that come, one each ("" for nothing); then all are answered.

    Faults: an HTTP status with optional Retry-After ("429 0.1"), "cut", "nonsense", "html", "error" (200 with an error
    in it), "slow", "drip", "no usage". delay: seconds that an answer takes. say: what is answered to a prompt.
    """

    def __init__(
        self, faults: Sequence[str] = (), delay: float = 0.0, say: Callable[[str], str] = write_dialogue
    ) -> None:
        self.faults, self.delay, self.say = list(faults), delay, say
        self.key = ""  # that it asks for, if any
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answered: Counter[str] = Counter()  # by prompt, counted when the last byte is on its way
        self.at_a_time, self._now = 0, 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and content are two writes: the second would wait 40 ms

            def do_POST(self) -> None:
                stub.handle(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                """Clients that are killed cut connections: nothing to print."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def handle(self, http: BaseHTTPRequestHandler) -> None:
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        with self.lock:
            self.asked.append(body)
            self.headers.append(dict(http.headers))
            fault = self.faults.pop(0) if self.faults else ""
            self._now += 1
            self.at_a_time = max(self.at_a_time, self._now)
        try:
            self._respond(http, body, fault)
        finally:
            with self.lock:
                self._now -= 1

    def _respond(self, http: BaseHTTPRequestHandler, body: dict[str, Any], fault: str) -> None:
        if self.key and http.headers["Authorization"] != f"Bearer {self.key}":
            text = f"Incorrect API key provided: {http.headers['Authorization']}"
            return _send(http, 401, {"error": {"message": text}})
        if http.path != "/v1/chat/completions":
            return _send(http, 404, {"detail": "Not Found"})
        if fault[:3].isdigit():
            status, _, retry_after = fault.partition(" ")
            return _send(http, int(status), {"error": {"message": f"the stub says\n{status}"}}, retry_after)
        if fault in ("nonsense", "html", "error"):
            raw = {"nonsense": b'{"choices": [{"mess', "html": b"<html>proxy</html>", "error": b'{"error": "busy"}'}
            return _send(http, 200, raw[fault])
        if fault == "slow":
            self.closing.wait(10)
            http.close_connection = True
            return None
        self.closing.wait(self.delay)
        prompt = body["messages"][-1]["content"]
        text = self.say(prompt)
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        value = {"object": "chat.completion", "choices": [choice]} | ({} if fault == "no usage" else {"usage": usage})
        if fault in ("cut", "drip"):
            return self._piecemeal(http, json.dumps(value).encode(), fault)
        _send(http, 200, value)
        with self.lock:
            self.answered[prompt] += 1
        return None

    def _piecemeal(self, http: BaseHTTPRequestHandler, data: bytes, fault: str) -> None:
        http.send_response(200)
        http.send_header("Content-Length", str(len(data)))
        http.end_headers()
        for i in range(0, len(data) // 2, 20):
            http.wfile.write(data[i : i + 20])
            http.wfile.flush()
            if fault == "drip" and not self.closing.is_set():
                time.sleep(0.1)
        http.close_connection = True


def _send(http: BaseHTTPRequestHandler, status: int, value: dict[str, Any] | bytes, retry_after: str = "") -> None:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    http.send_response(status)
    http.send_header("Content-Type", "application/json")
    http.send_header("Content-Length", str(len(data)))
    if retry_after:
        http.send_header("Retry-After", retry_after)
    http.end_headers()
    http.wfile.write(data)
