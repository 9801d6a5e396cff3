"""What /metrics shows: counters and times of the server, in Prometheus' format, and the engine's figures as they stand.

choices.py and guard.py count, app.py prints. No label and no figure holds anything of what was said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

MEDIA_TYPE = CONTENT_TYPE_LATEST
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The figures of one server."""

    def __init__(self, stats: Callable[[], Any]) -> None:
        """stats: the engine's, a dataclass, or None while there is no engine."""
        self._registry = CollectorRegistry()
        self._registry.register(_Figures(stats))
        self.requests = self._counter("requests", "HTTP requests", ("route", "status"))
        self.answers = self._counter("answers", "Answers, by how they ended", ("reason",))
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.reused_tokens = self._counter("reused_prompt_tokens", "Of these, not read again")
        self.tokens = self._counter("generated_tokens", "Tokens of answers")
        self.first_token = self._times("time_to_first_token_seconds", "From submitted to the first text", _LONG)
        self.between_tokens = self._times("inter_token_seconds", "From one token of an answer to the next", _SHORT)
        self.seconds = self._times("request_seconds", "From a request's headers to the end of its response", _LONG)

    def _counter(self, name: str, about: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"chatdoctor_{name}", about, labels, registry=self._registry)

    def _times(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"chatdoctor_{name}", about, buckets=buckets, registry=self._registry)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)


class _Figures(Collector):
    """The engine's figures at the moment they are asked for, a gauge a field."""

    def __init__(self, stats: Callable[[], Any]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, value in dataclasses.asdict(stats).items() if stats is not None else ():
            yield GaugeMetricFamily(f"chatdoctor_engine_{name}", f"The engine's {name}", value=float(value))

    def describe(self) -> Iterable[Metric]:
        return ()
