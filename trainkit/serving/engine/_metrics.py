"""Counters of one server process, in Prometheus' text format."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """Requests by model and outcome (a status, or "late"), latencies, batch sizes, and the pool's state."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "trainkit_serve_requests", "Answered requests.", ["model", "outcome"], registry=self._registry
        )
        self._latency = Histogram(
            "trainkit_serve_latency_seconds",
            "From a request's arrival to its answer.",
            ["model"],
            buckets=[0.001 * 2**k for k in range(16)],
            registry=self._registry,
        )
        self._batch = Histogram(
            "trainkit_serve_batch_size",
            "Size of the batch that a request ran in.",
            ["model"],
            buckets=[2**k for k in range(11)],
            registry=self._registry,
        )
        self._state = {
            name: Gauge(f"trainkit_serve_{name}", about, registry=self._registry)
            for name, about in (
                ("waiting", "Requests that wait for a batch."),
                ("idle", "GPUs that run nothing."),
                ("gpus", "GPU processes that are up."),
            )
        }

    def answered(self, model: str, outcome: str, seconds: float, batch: int | None) -> None:
        """One request ended."""
        self._requests.labels(model, outcome).inc()
        self._latency.labels(model).observe(seconds)
        if batch is not None:
            self._batch.labels(model).observe(batch)

    def state(self, values: Mapping[str, int]) -> None:
        """What the scheduler said with its last answer."""
        for name, value in values.items():
            self._state[name].set(value)

    def text(self) -> bytes:
        """The exposition."""
        text: bytes = generate_latest(self._registry)
        return text
