"""A GPU's buckets to pinned host memory and back, beside the backward pass."""

from collections.abc import Callable, Sequence
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

    A bucket goes in pieces: the first is on the network while the next is copied, and is copied back while others are
    still on the network.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._down_stream, self._up_stream = _stream(device), _stream(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="switchml-copies")
        self._idle: dict[int, list[Staging]] = {}

    def staging(self, count: int) -> Staging:
        """Memory of `count` values that no other bucket uses; `finish` gives it back."""
        idle = self._idle.setdefault(count, [])
        return idle.pop() if idle else Staging(torch.empty(count, dtype=torch.float32, pin_memory=True), _event())

    def down(
        self, bucket: torch.Tensor, staging: Staging, spans: Sequence[slice], then: Callable[[slice], None]
    ) -> "Future[None]":
        """Copy `bucket` to `staging` once the current stream has computed it; `then(span)` on the thread as each comes."""
        computed = _event()
        computed.record(torch.cuda.current_stream(self._device))
        return self._thread.submit(self._down, computed, bucket, staging, spans, then)

    def _down(
        self,
        computed: torch.cuda.Event,
        bucket: torch.Tensor,
        staging: Staging,
        spans: Sequence[slice],
        then: Callable[[slice], None],
    ) -> None:
        copied = []
        with torch.cuda.stream(self._down_stream):
            computed.wait(self._down_stream)
            staging.free.wait(self._down_stream)
            for span in spans:
                staging.host[span].copy_(bucket[span], non_blocking=True)
                copied.append(_event())
                copied[-1].record(self._down_stream)
            bucket.record_stream(self._down_stream)
        for span, there in zip(spans, copied, strict=True):
            there.synchronize()
            then(span)

    def up(self, staging: Staging, bucket: torch.Tensor, span: slice) -> None:
        """Copy a piece back."""
        with torch.cuda.stream(self._up_stream):
            bucket[span].copy_(staging.host[span], non_blocking=True)

    def finish(self, staging: Staging, bucket: torch.Tensor, then: Callable[[], None]) -> None:
        """All pieces are on their way back; `then()` on their stream: a CUDA future set there is waited for rightly."""
        with torch.cuda.stream(self._up_stream):
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
