"""A GPU's buckets to pinned host memory and back, beside the backward pass."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class DeviceCopies:
    """A stream and a thread of their own, so that neither the GPU's computation nor autograd's thread waits.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="switchml-copies")
        self._free: dict[int, list[torch.Tensor]] = {}

    def staging(self, count: int) -> torch.Tensor:
        """Pinned fp32 memory of `count` values that no other bucket uses; `up` gives it back."""
        free = self._free.setdefault(count, [])
        return free.pop() if free else torch.empty(count, dtype=torch.float32, pin_memory=True)

    def down(self, bucket: torch.Tensor, host: torch.Tensor, then: Callable[[], None]) -> "Future[None]":
        """Copy `bucket` to `host` once the current stream has computed it, then call `then` on the thread."""
        computed: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        computed.record(torch.cuda.current_stream(self._device))
        return self._thread.submit(self._down, computed, bucket, host, then)

    def _down(
        self, computed: torch.cuda.Event, bucket: torch.Tensor, host: torch.Tensor, then: Callable[[], None]
    ) -> None:
        with torch.cuda.stream(self._stream):
            computed.wait(self._stream)
            host.copy_(bucket, non_blocking=True)
            bucket.record_stream(self._stream)
        self._stream.synchronize()
        then()

    def up(self, host: torch.Tensor, bucket: torch.Tensor, then: Callable[[], None]) -> None:
        """Copy `host` to `bucket` and call `then` on the copying stream: a CUDA future set there is waited for rightly."""
        with torch.cuda.stream(self._stream):
            bucket.copy_(host, non_blocking=True)
            then()
        # the next use of it is a copy on this stream, after this one
        self._free[host.numel()].append(host)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()
