"""What a training process holds of a session: `SwitchMLState`."""

import threading
import time
from collections import Counter
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from trainkit.switchml._device import DeviceCopies
from trainkit.switchml._errors import SwitchMLError
from trainkit.switchml._fixed_point import Floats
from trainkit.switchml._lanes import Lanes
from trainkit.switchml._link import COUNTED
from trainkit.switchml._options import Options, Wire
from trainkit.switchml._rescue import Rescue


class SwitchMLState:
    """State of `switchml_hook`: one worker's place in a session on a switch.

    The session is joined at the first bucket, or by `connect()`. Pickling keeps the arguments and drops the
    connection.

    Args:
        switch: "host:port" of a software switch or of a P4 switch's control.
        rank: this worker; None takes torch.distributed's.
        world_size: workers; None takes torch.distributed's.
        session: name under which the workers meet; the same on all.
        token_file: file with the secret shared with the switch; None without.
        interface: network interface to send from; None lets the system choose.
        elements: values a packet; None finds the most that the path carries.
        slots: packets in flight; None: as many as half the receive buffers hold, at most 20.
        deadline_s: seconds without progress after which a bucket fails with a named error.
        fallback: "allreduce" goes on with torch.distributed when the switch fails; None raises.
        wire: integers from worker to switch: "int32", or "int16" or "int8" with error feedback.
        profile: "full", or "core" for a P4 or XDP switch.
        lanes: independent streams, each with a thread here and one on the switch; None: as many as the switch has.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> state = SwitchMLState("10.0.0.1:48864")
        >>> ddp.register_comm_hook(state, switchml_hook)
    """

    def __init__(
        self,
        switch: str,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        session: str = "default",
        token_file: str | None = None,
        interface: str | None = None,
        elements: int | None = None,
        slots: int | None = None,
        deadline_s: float = 30.0,
        fallback: Literal["allreduce"] | None = None,
        wire: Wire = "int32",
        profile: Literal["core", "full"] = "full",
        lanes: int | None = None,
    ) -> None:
        self.options = Options(
            switch, session, token_file, interface, elements, slots, deadline_s, fallback, wire, profile, lanes
        )  # fmt: skip
        self._rank, self._world_size = rank, world_size
        self._reset()

    def _reset(self) -> None:
        self.link: Lanes | Rescue | None = None
        self._guard = threading.Lock()
        self._calls = 0
        self._waited = 0.0
        self._past: Counter[str] = Counter()
        self._residuals: dict[int | None, Floats] = {}
        self._staging: dict[int | None, torch.Tensor] = {}
        self._device: DeviceCopies | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "_rank": self._rank, "_world_size": self._world_size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def rank(self) -> int:
        """This worker."""
        return self._rank if self._rank is not None else dist.get_rank()

    @property
    def world_size(self) -> int:
        """Workers of the session."""
        return self._world_size if self._world_size is not None else dist.get_world_size()

    @property
    def error(self) -> SwitchMLError | None:
        """Why the session failed; None while it works."""
        return self.link.error if self.link else None

    @property
    def groups(self) -> list["dist.ProcessGroup"]:
        """Process groups that were made for the fallback; closing leaves them to torch.distributed."""
        return [self.link.group] if isinstance(self.link, Rescue) else []

    def connect(self) -> Lanes | Rescue:
        """Join the session, unless that is done; blocks until all ranks have joined.

        Raises:
            SwitchMLError: the session could not be joined; the subclass tells why.
        """
        with self._guard:
            if self.link is None:
                kind = Rescue if self.options.fallback else Lanes
                self.link = kind(self.options, self.rank, self.world_size)
            return self.link

    def average(
        self, buffer: torch.Tensor, *, index: int | None = None, last: bool = True
    ) -> "torch.futures.Future[torch.Tensor]":
        """Average `buffer` (1-D, floating point) over the workers, in place.

        Args:
            buffer: the values; on all ranks of the same size and in the same order of calls.
            index: which bucket of a step this is, the same on all ranks. What is known of it from the step before saves
                small ones a round trip; with a narrow wire it keeps what rounding took for its next time.
            last: nothing is left to compute while this bucket travels: its time counts as waiting.

        Returns:
            A future of `buffer`; it always ends, with an error of `SwitchMLError`'s family at the latest after
            the deadline.
        """
        self._calls += 1
        link = self.connect()
        if buffer.is_cuda and self._device is None:
            self._device = DeviceCopies(buffer.device)
        device = self._device if buffer.is_cuda else None
        future = torch.futures.Future[torch.Tensor](devices=[buffer.device] if device else None)
        staging = self._host(buffer, index)
        handed = time.monotonic()

        def finish(done: "Future[None]") -> None:
            if last:
                self._waited += time.monotonic() - handed
            try:
                done.result()
                if device is not None:
                    device.up(staging, buffer, lambda: future.set_result(buffer))
                    return
                if staging.data_ptr() != buffer.data_ptr():
                    buffer.copy_(staging)
                future.set_result(buffer)
            except Exception as error:  # whatever it is, the backward pass must not wait for ever
                future.set_exception(error)  # type: ignore[arg-type]

        def start() -> None:
            values = staging.numpy()
            residual = self._residual(index, values)
            if residual is not None:
                values += residual
            link.submit(values, values, residual, index).add_done_callback(finish)

        def failed(copied: "Future[None]") -> None:
            if copied.exception() is not None:
                finish(copied)

        if device is not None:
            device.down(buffer, staging, start).add_done_callback(failed)
        else:
            start()
        # through then(), the error's own words survive the way through C++
        return future.then(lambda finished: finished.value())

    def _host(self, buffer: torch.Tensor, index: int | None) -> torch.Tensor:
        """Where the bucket is in fp32 and in host memory; for a GPU's bucket pinned, and kept for the next step."""
        if not buffer.is_cuda:
            return buffer.detach().float().contiguous()
        kept = self._staging.get(index)
        if kept is None or kept.numel() != buffer.numel():  # the first step has one bucket, later ones have others
            kept = self._staging[index] = torch.empty(buffer.numel(), dtype=torch.float32, pin_memory=True)
        return kept

    def _residual(self, index: int | None, values: Floats) -> Floats | None:
        if self.options.wire == "int32":
            return None
        kept = self._residuals.get(index)
        if kept is None or kept.size != values.size:
            kept = self._residuals[index] = np.zeros_like(values)
        return kept

    def counters(self) -> dict[str, float]:
        """Bytes and packets each way and what became of them, buckets, hook calls and seconds of waiting, so far.

        docs/how-it-works/switchml.md says what each name counts.
        """
        totals = self._past + Counter(self.link.counters() if self.link else {})
        names = {name: float(totals[name]) for name in COUNTED}
        return {**names, "hook_calls": float(self._calls), "wait_s": self._waited}

    def close(self) -> None:
        """Leave the session; the next bucket would join it anew."""
        with self._guard:
            if self.link is not None:
                self.link.close()
                self._past += Counter(self.link.counters())
                self.link = None
            if self._device is not None:
                self._device.close()
                self._device = None
