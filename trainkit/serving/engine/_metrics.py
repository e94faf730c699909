"""Counters of one server process: in Prometheus' text format, and by second for the live page."""

import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# What the live page shows.
_SECONDS = 120
_STATE = {
    "waiting": "Requests that wait for a batch.",
    "idle": "GPUs that run nothing.",
    "gpus": "GPU processes that are up.",
    "language_running": "Texts that are being continued.",
    "language_waiting": "Prompts that wait for pages or their turn.",
    "language_free_pages": "Pages of the KV caches that are free.",
    "language_pages": "Pages of the KV caches.",
    "language_processes": "Processes of language models that are up.",
}


class _Second:
    """What was answered within one second."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.outcomes: Tally[str] = Tally()
        self.batches: Tally[int] = Tally()
        self.tokens = 0
        self.slowest_s = 0.0


class Metrics:
    """Requests by model and outcome (a status, or "late"), latencies, batch sizes, tokens, and the pool's state."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "trainkit_serve_requests", "Answered requests.", ["model", "outcome"], registry=self._registry
        )
        self._tokens = Counter("trainkit_serve_tokens", "Generated tokens.", ["model"], registry=self._registry)

        def times(name: str, about: str) -> Histogram:
            buckets = [0.001 * 2**k for k in range(16)]
            return Histogram(
                f"trainkit_serve_{name}_seconds", about, ["model"], buckets=buckets, registry=self._registry
            )

        self._latency = times("latency", "From a request's arrival to its answer.")
        self._ttft = times("ttft", "From a request's arrival to its first token.")
        self._tpot = times("tpot", "Between a request's tokens, its mean.")
        self._batch = Histogram(
            "trainkit_serve_batch_size",
            "Size of the batch that a request ran in.",
            ["model"],
            buckets=[2**k for k in range(11)],
            registry=self._registry,
        )
        self._open = Gauge("trainkit_serve_open", "Requests that wait for their answer.", registry=self._registry)
        self._gauges = {
            name: Gauge(f"trainkit_serve_{name}", about, registry=self._registry) for name, about in _STATE.items()
        }
        self._state: dict[str, int] = {}
        self._seconds: deque[_Second] = deque(maxlen=_SECONDS)

    def _now(self) -> _Second:
        at = int(time.monotonic())
        if not self._seconds or self._seconds[-1].at != at:
            self._seconds.append(_Second(at))
        return self._seconds[-1]

    def answered(self, model: str, outcome: str, seconds: float, batch: int | None) -> None:
        """One request ended."""
        self._requests.labels(model, outcome).inc()
        self._latency.labels(model).observe(seconds)
        now = self._now()
        now.outcomes[outcome] += 1
        now.slowest_s = max(now.slowest_s, seconds)
        if batch is not None:
            self._batch.labels(model).observe(batch)
            now.batches[batch] += 1

    def tokens(self, model: str, count: int) -> None:
        """A language model went on."""
        self._tokens.labels(model).inc(count)
        self._now().tokens += count

    def pace(self, model: str, ttft: float, tpot: float | None) -> None:
        """Seconds to the first token, and between the others."""
        self._ttft.labels(model).observe(ttft)
        if tpot is not None:
            self._tpot.labels(model).observe(tpot)

    def open(self, count: int) -> None:
        """Requests that wait for their answer now."""
        self._open.set(count)

    def state(self, values: Mapping[str, int]) -> None:
        """What the scheduler said last."""
        self._state = dict(values)
        for name, value in values.items():
            self._gauges[name].set(value)

    def text(self) -> bytes:
        """The exposition."""
        text: bytes = generate_latest(self._registry)
        return text

    def live(self) -> dict[str, Any]:
        """Whole seconds of the last two minutes, oldest first, and the state."""
        now = int(time.monotonic())
        known = {second.at: second for second in self._seconds}
        line: list[dict[str, Any]] = []
        batches: Tally[int] = Tally()
        for at in range(now - _SECONDS + 1, now):
            second = known.get(at) or _Second(at)
            batches.update(second.batches)
            good = second.outcomes["200"]
            late = second.outcomes["late"] + second.outcomes["503"]
            other = second.outcomes.total() - good - late
            line.append(
                {"good": good, "late": late, "other": other, "tokens": second.tokens, "slowest": second.slowest_s}
            )
        return {"seconds": line, "batches": sorted(batches.items()), "state": self._state}
