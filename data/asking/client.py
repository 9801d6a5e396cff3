"""One OpenAI-compatible endpoint, asked patiently: what may pass is tried again, what cannot is one clear line.

Called by generate.py, from several threads at once. Knows HTTP and JSON, nothing of what is asked. The key
goes into one header and nowhere else: not into errors, files or logs.
"""

from __future__ import annotations

import importlib
import json
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from data.asking.spending import Tokens

ATTEMPTS = 8  # with FIRST_WAIT and LONGEST_WAIT: about a minute and a half until a request is set aside
NONSENSE_ATTEMPTS = 3  # a reply that is no reply may have been paid for: fewer
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds; doubled from attempt to attempt, each times 0.5 to 1 at random
LONGEST_PAUSE = 900.0  # seconds that a server may ask for in Retry-After; whoever asks for more is asked another day
MAX_REPLY = 16 << 20  # bytes
_PASSING = {408, 409, 425, 429}  # and every 5xx
_NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError")
_CONTROL = re.compile(r"[\x00-\x20\x7f-\x9f]+")


@dataclass(frozen=True)
class Reply:
    """What the model wrote. used: None where the server did not count."""

    text: str
    finish_reason: str
    used: Tokens | None


class SetAside(Exception):
    """This request has no answer, others may have; str() is the reason."""


class Stopped(Exception):
    """The run was asked to stop before this request was answered."""


class _Passing(Exception):
    """An attempt failed in a way that may pass. nonsense: there was a reply, useless but perhaps paid for."""

    def __init__(self, reason: str, *, wait: float = 0.0, paid: bool = False, nonsense: bool = False) -> None:
        self.wait, self.paid, self.nonsense = wait, paid, nonsense
        super().__init__(reason)


class Endpoint:
    """POST <url>/chat/completions. ask() may be called from as many threads as `connections` says."""

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        connections: int = 8,
        timeout: float = 120.0,
        attempts: int = ATTEMPTS,
    ) -> None:
        """timeout: seconds for a whole reply, to its last byte. ValueError when url or key cannot be."""
        self._http = _http()
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.timeout, self.attempts = timeout, attempts
        self.stop = threading.Event()  # set by whoever wants ask() to wait no longer
        self.answered = False
        self._pause_until = 0.0  # of all threads: a server that is asked too much means everyone
        self._key = key
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError("the API key holds characters that no key has (a space, a line break?); set it again")
        try:
            parsed = self._http.URL(self.url)
        except self._http.InvalidURL:
            parsed = None
        if parsed is None or parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"{url}: is no endpoint; it looks like http://localhost:8000/v1")
        if parsed.userinfo:
            raise ValueError("the endpoint holds a user or password; name an environment variable with the key instead")
        self._client = self._http.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self._http.Timeout(timeout, connect=min(timeout, 15.0)),
            limits=self._http.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def close(self) -> None:
        self._client.close()

    def ask(self, body: dict[str, Any], lost: Callable[[str], bool]) -> Reply:
        """The reply to one chat completion request.

        lost: told why, whenever an attempt that may have been paid for brought nothing; says whether there may be
        another. SetAside: no answer to this one. Stopped: `stop` was set while it waited. ValueError: no request
        can succeed.
        """
        nonsense = 0
        for attempt in range(1, self.attempts + 1):
            self._wait()
            try:
                return self._once(body)
            except _Passing as e:
                nonsense += e.nonsense
                may_go_on = lost(str(e)) if e.paid else True
                last = attempt == self.attempts or nonsense == NONSENSE_ATTEMPTS
                if last or not may_go_on:
                    why = "" if may_go_on else "; the budget allows no other attempt"
                    raise SetAside(f"{e} ({attempt} attempt{'s' * (attempt > 1)}{why})") from None
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
                if e.wait:  # without a lock: of two threads that write at once either will do
                    self._pause_until = max(self._pause_until, time.monotonic() + e.wait)
                self.stop.wait(wait)
        raise AssertionError("the last attempt returns or raises")

    def _wait(self) -> None:
        while (left := self._pause_until - time.monotonic()) > 0 and not self.stop.is_set():
            self.stop.wait(left)
        if self.stop.is_set():
            raise Stopped

    def _once(self, body: dict[str, Any]) -> Reply:
        try:
            status, headers, content = self._post(body)
        except self._http.DecodingError as e:
            reason = f"a reply that cannot be read ({self._line(str(e))})"
            raise _Passing(reason, paid=True, nonsense=True) from None
        except self._http.TransportError as e:
            kind = type(e).__name__
            reason = f"{kind}: {self._line(str(e)) or 'no further word'}"
            if kind == "ConnectError" and not self.answered:
                raise ValueError(f"{self.url}: cannot be reached ({self._line(str(e))}); is the server up?") from None
            raise _Passing(reason, paid=kind not in _NEVER_SENT) from None
        if status != 200:
            raise self._refusal(status, headers, content)
        reply = _reply(content)
        if isinstance(reply, str):
            raise _Passing(f"a reply that is no completion ({self._line(reply)})", paid=True, nonsense=True)
        self.answered = True
        return reply

    def _post(self, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        """Status, headers and content. Read piece by piece: a time-out of the client's is for each piece alone."""
        deadline = time.monotonic() + self.timeout
        content = bytearray()
        with self._client.stream("POST", self.url, json=body) as response:
            for piece in response.iter_bytes():
                content += piece
                if time.monotonic() > deadline:
                    raise self._http.ReadTimeout(f"no whole reply in {self.timeout:g} s")
                if len(content) > MAX_REPLY:
                    raise self._http.DecodingError(f"more than {MAX_REPLY >> 20} MiB")
            return response.status_code, response.headers, bytes(content)

    def _refusal(self, status: int, headers: Any, content: bytes) -> Exception:
        said = self._line(_message(content))
        what = f"HTTP {status}" + (f" ({said})" if said else "")
        if status not in _PASSING and status < 500:
            remedy = {
                301: f"; the server has moved to {self._line(headers.get('location', ''))}",
                308: f"; the server has moved to {self._line(headers.get('location', ''))}",
                400: "; the server does not take such requests (too long a row? a flag that it does not know?)",
                401: "; name the environment variable that holds a valid key with --key_env",
                403: "; this key may not use this model",
                404: "; is the path right (.../v1), and does the server know the model of that name?",
            }.get(status, "")
            return ValueError(f"{self.url}: {what}{remedy}")
        if b"insufficient_quota" in content:
            return ValueError(f"{self.url}: {what}; the account has nothing left")
        wait = _retry_after(headers.get("retry-after", ""))
        if wait > LONGEST_PAUSE:
            return ValueError(f"{self.url}: {what}; it asks to wait {wait:,.0f} s: run the command again after that")
        return _Passing(what, wait=wait)

    def _line(self, text: str) -> str:
        """Foreign text for an error message: one short line, without the key should the server repeat it."""
        text = text.replace(self._key, "***") if self._key else text
        return _CONTROL.sub(" ", text).strip()[:200]


def _http() -> Any:
    try:
        return importlib.import_module("httpx2")
    except ImportError:
        raise ValueError("asking an endpoint needs the httpx2 package: pip install httpx2") from None


def _reply(content: bytes) -> Reply | str:
    """The completion in a reply, or what is wrong with it."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return f"not JSON: {content[:60].decode('utf-8', 'replace')!r}" if content else "empty"
    try:
        choice = value["choices"][0]
        text, finish_reason = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        return _message(content) or "no choices[0].message.content"
    if not isinstance(text, str | None):
        return "choices[0].message.content is not text"
    usage = value.get("usage")
    counts = [usage.get(k) for k in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
    used = Tokens(*counts) if counts and all(type(n) is int and n >= 0 for n in counts) else None
    return Reply(text or "", finish_reason if isinstance(finish_reason, str) else "", used)


def _message(content: bytes) -> str:
    """What an error says, as OpenAI, vLLM, llama.cpp and FastAPI put it; else its first words."""
    text = content[:2000].decode("utf-8", "replace")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return text
    for _ in range(3):
        if isinstance(value, dict):
            value = next((value[k] for k in ("error", "message", "detail") if k in value), text)
    return value if isinstance(value, str) else text


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date; 0 for none."""
    try:
        return max(0.0, min(float(value), 1e9))
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return 0.0
    return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
