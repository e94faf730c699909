"""What came out of a simulated run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Order of the native core's fates.
_DONE, _LATE, _DROPPED, _ABANDONED = 1, 2, 3, 4


@dataclass(frozen=True)
class Result:
    """Requests and GPUs of one simulated run; arrays [requests] are in order of arrival."""

    models: Sequence[str]
    seconds: float
    """length of the arrivals; the run itself goes on until all are answered"""
    model: NDArray[np.int64]
    arrival_ns: NDArray[np.int64]
    answered_ns: NDArray[np.int64]
    fate: NDArray[np.uint8]
    """1 done, 2 late, 3 dropped, 4 abandoned by its client"""
    busy: NDArray[np.float64]
    """seconds in which each GPU ran a batch, [GPUs]"""
    batches_by_size: NDArray[np.int64]
    """batches of each size, from 0"""
    preempted: int

    @property
    def arrived(self) -> int:
        """Requests."""
        return len(self.fate)

    @property
    def done(self) -> int:
        """Answered within their objective."""
        return int((self.fate == _DONE).sum())

    @property
    def late(self) -> int:
        """Answered after it."""
        return int((self.fate == _LATE).sum())

    @property
    def dropped(self) -> int:
        """Answered without being run."""
        return int((self.fate == _DROPPED).sum())

    @property
    def abandoned(self) -> int:
        """Given up by their clients."""
        return int((self.fate == _ABANDONED).sum())

    @property
    def batches(self) -> int:
        """Batches run."""
        return int(self.batches_by_size.sum())

    @property
    def mean_batch(self) -> float:
        """Requests a batch."""
        sizes = np.arange(len(self.batches_by_size))
        return float((sizes * self.batches_by_size).sum() / max(1, self.batches))

    @property
    def bad(self) -> float:
        """Share of late and dropped among the requests whose clients waited."""
        return (self.late + self.dropped) / max(1, self.arrived - self.abandoned)

    @property
    def good_rate(self) -> float:
        """Requests/s answered within their objective."""
        return self.done / self.seconds

    @property
    def busy_gpus(self) -> float:
        """GPUs busy on average."""
        return float(self.busy.sum() / self.seconds)

    @property
    def gpus_touched(self) -> int:
        """GPUs that ran anything."""
        return int((self.busy > 0).sum())

    def latency_ms(self, percentile: float) -> float:
        """Percentile of the answered requests' latency in milliseconds."""
        served = (self.fate == _DONE) | (self.fate == _LATE)
        if not served.any():
            return float("nan")
        return float(np.percentile((self.answered_ns - self.arrival_ns)[served], percentile) / 1e6)

    def of(self, name: str) -> Mapping[str, int]:
        """Arrived, done, late, dropped, abandoned of one model."""
        counts = np.bincount(self.fate[self.model == self.models.index(name)], minlength=5)
        return {
            "arrived": int(counts.sum()),
            "done": int(counts[_DONE]),
            "late": int(counts[_LATE]),
            "dropped": int(counts[_DROPPED]),
            "abandoned": int(counts[_ABANDONED]),
        }

    def timeline(self, seconds: float = 1.0) -> NDArray[np.float64]:
        """Good requests/s in consecutive windows, by time of arrival, [windows]."""
        windows = max(1, int(np.ceil(self.seconds / seconds)))
        at = (self.arrival_ns[self.fate == _DONE] / 1e9 / seconds).astype(np.int64)
        return np.bincount(at, minlength=windows)[:windows] / seconds

    def plot(self) -> "Figure":
        """Batch sizes, latencies and busy GPUs."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 3), layout="constrained")
        sizes, latency, gpus = figure.subplots(1, 3)
        sizes.bar(np.arange(1, len(self.batches_by_size)), self.batches_by_size[1:])
        sizes.set(xlabel="requests in a batch", ylabel="batches")
        served = (self.fate == _DONE) | (self.fate == _LATE)
        latency.hist((self.answered_ns - self.arrival_ns)[served] / 1e6, bins=60)
        latency.set(xlabel="latency, ms", ylabel="requests")
        gpus.bar(np.arange(len(self.busy)), self.busy / self.seconds)
        gpus.set(xlabel="GPU", ylabel="share of time busy", ylim=(0, 1.05))
        return figure

    def summary(self) -> dict[str, Any]:
        """The figures above, for printing."""
        return {
            "arrived": self.arrived,
            "done": self.done,
            "late": self.late,
            "dropped": self.dropped,
            "abandoned": self.abandoned,
            "bad": self.bad,
            "good_rate": self.good_rate,
            "mean_batch": self.mean_batch,
            "batches": self.batches,
            "p50_ms": self.latency_ms(50),
            "p99_ms": self.latency_ms(99),
            "busy_gpus": self.busy_gpus,
            "gpus_touched": self.gpus_touched,
        }
