"""How long the gradients of a step are on their way, without stopping anything to look."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Stopwatch:
    """Seconds of communication in each step: the union of its buckets' times, on the CPU or on the GPU's streams."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[Any, Any]]] = []
        self._now: list[tuple[Any, Any]] = []

    def start(self, device: torch.device) -> Callable[[], None]:
        """A bucket begins; call the result when it is done."""
        begun, step = _moment(device), self._now
        return lambda: step.append((begun, _moment(device)))

    def end_step(self) -> None:
        """The step's buckets are all done."""
        self.steps.append(self._now)
        self._now = []

    def read(self) -> list[float]:
        """Seconds of each step since the last reading; waits for the GPU where there is one."""
        steps, self.steps = self.steps, []
        return [_covered(step) for step in steps if step]


def _moment(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _covered(intervals: Sequence[tuple[Any, Any]]) -> float:
    if not isinstance(intervals[0][0], float):
        origin = intervals[0][0]
        for _, stop in intervals:
            stop.synchronize()
        intervals = [(origin.elapsed_time(a) / 1e3, origin.elapsed_time(b) / 1e3) for a, b in intervals]
    total, reached = 0.0, float("-inf")
    for begin, stop in sorted(intervals):
        total += max(0.0, stop - max(begin, reached))
        reached = max(reached, stop)
    return total
