"""A GPU's buckets to pinned host memory and back, beside the backward pass."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch


@dataclass
class Staging:
    """Pinned memory of one bucket on its way."""

    host: torch.Tensor
    """fp32 `[N]`."""
    free: torch.cuda.Event
    """Passed when the last copy out of it is done."""


class DeviceCopies:
    """Two streams and a thread of their own, so that neither the GPU's computation nor autograd's thread waits.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._down_stream, self._up_stream = _stream(device), _stream(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="switchml-copies")
        self._idle: dict[int, list[Staging]] = {}

    def staging(self, count: int) -> Staging:
        """Memory of `count` values that no other bucket uses; `up` gives it back."""
        idle = self._idle.setdefault(count, [])
        return idle.pop() if idle else Staging(torch.empty(count, dtype=torch.float32, pin_memory=True), _event())

    def down(self, bucket: torch.Tensor, staging: Staging, then: Callable[[], None]) -> "Future[None]":
        """Copy `bucket` to `staging` once the current stream has computed it, then call `then` on the thread."""
        computed = _event()
        computed.record(torch.cuda.current_stream(self._device))
        return self._thread.submit(self._down, computed, bucket, staging, then)

    def _down(
        self, computed: torch.cuda.Event, bucket: torch.Tensor, staging: Staging, then: Callable[[], None]
    ) -> None:
        with torch.cuda.stream(self._down_stream):
            computed.wait(self._down_stream)
            staging.free.wait(self._down_stream)
            staging.host.copy_(bucket, non_blocking=True)
            bucket.record_stream(self._down_stream)
        self._down_stream.synchronize()
        then()

    def up(self, staging: Staging, bucket: torch.Tensor, then: Callable[[], None]) -> None:
        """Copy back and call `then` on the copy's stream: a CUDA future set there is waited for rightly."""
        with torch.cuda.stream(self._up_stream):
            bucket.copy_(staging.host, non_blocking=True)
            bucket.record_stream(self._up_stream)
            staging.free.record(self._up_stream)
            then()
        self._idle[staging.host.numel()].append(staging)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def _stream(device: torch.device) -> torch.cuda.Stream:
    made: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return made


def _event() -> torch.cuda.Event:
    made: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return made
