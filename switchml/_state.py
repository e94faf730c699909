"""What a training process holds of a session: `SwitchMLState`."""

import logging
import threading
import time
from collections import Counter
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from trainkit.switchml._bounded import Bounded
from trainkit.switchml._channels import Channels
from trainkit.switchml._ddp import Models
from trainkit.switchml._device import DeviceCopies
from trainkit.switchml._errors import SwitchMLError
from trainkit.switchml._failover import Failover
from trainkit.switchml._fixed_point import Floats
from trainkit.switchml._link import COUNTED
from trainkit.switchml._options import Fallback, Options, Wire, current
from trainkit.switchml._place import Place, agreed

_log = logging.getLogger(__name__)

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
"""Types that fp32 holds exactly."""
_KEPT = 4096
"""Buckets whose rounding errors are kept."""

Key = tuple[int, int] | None


class SwitchMLState:
    """State of `switchml_hook`: one worker's place in a session on a switch.

    The session is joined at the first bucket, or by `connect()`. Pickling keeps the arguments, without the process
    group, and drops the connection. One state serves all models of a process that are averaged over the same workers;
    several states, also with one session name, do not meet.

    Args:
        switch: "host:port" of the switch; "[address]:port" for IPv6.
        rank: this worker; None takes the process group's.
        world_size: workers; None takes the process group's.
        process_group: whose ranks the workers are, the one that DDP was given; None: the default group. Its ranks agree
            on an id of this session, so that other jobs may use the same name.
        session: name under which the workers meet.
        token_file: file with the secret shared with the switch.
        interface: network interface to send from; None lets the system choose.
        elements: values a packet; None finds the most that the path carries.
        slots: packets in flight; None: as many as half the receive buffers hold, at most 20.
        timeout_s: seconds without progress after which a bucket fails.
        fallback: what to do when the switch fails: raise, or go on with torch.distributed.
        wire: integers from worker to switch.
        profile: what the switch can do: "core" for P4 and XDP.
        channels: independent streams, each with a thread here and one on the switch; None: as many as the switch has.
        **renamed: names of the last release.

    Raises:
        ValueError: an argument is outside its range.
        TypeError: there is no such argument.

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
        process_group: "dist.ProcessGroup | None" = None,
        session: str = "default",
        token_file: str | None = None,
        interface: str | None = None,
        elements: int | None = None,
        slots: int | None = None,
        timeout_s: float = 30.0,
        fallback: Fallback = "error",
        wire: Wire = "int32",
        profile: Literal["core", "full"] = "full",
        channels: int | None = None,
        **renamed: Any,
    ) -> None:
        asked = current(
            {
                "session": session, "token_file": token_file, "interface": interface, "elements": elements, "slots": slots,
                "timeout_s": timeout_s, "fallback": fallback, "wire": wire, "profile": profile, "channels": channels,
                **renamed,
            }
        )  # fmt: skip
        self.options = Options(switch, **asked)
        self._rank, self._world_size, self._group = rank, world_size, process_group
        self._reset()

    def _reset(self) -> None:
        self.link: Channels | Failover | None = None
        self._place: Place | None = None
        self._guard = threading.Lock()
        self._models = Models()
        self._calls = 0
        self._waited = 0.0
        self._past: Counter[str] = Counter()
        self._residuals: Bounded[tuple[Key, int], Floats] = Bounded(_KEPT)
        self._device: DeviceCopies | None = None
        self._exact = False

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "_rank": self._rank, "_world_size": self._world_size, "_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def rank(self) -> int:
        """This worker."""
        return self._rank if self._rank is not None else dist.get_rank(self._group)

    @property
    def world_size(self) -> int:
        """Workers of the session."""
        return self._world_size if self._world_size is not None else dist.get_world_size(self._group)

    @property
    def error(self) -> SwitchMLError | None:
        """Why the session failed; None while it works."""
        return self.link.error if self.link else None

    @property
    def groups(self) -> list["dist.ProcessGroup"]:
        """Process groups that were made for the fallback; closing leaves them to torch.distributed."""
        return [self.link.group] if isinstance(self.link, Failover) else []

    def connect(self) -> Channels | Failover:
        """Join the session, unless that is done; blocks until all ranks have joined.

        Raises:
            SwitchMLError: the session could not be joined; the subclass tells why.
            ValueError: the ranks of the process group are not those that were said.
        """
        with self._guard:
            if self.link is None:
                self._place = agreed(self._rank, self._world_size, self._group)
                kind = Failover if self.options.fallback == "allreduce" else Channels
                self.link = kind(self.options, self._place)
            return self.link

    def bucket(self, bucket: "dist.GradBucket") -> "torch.futures.Future[torch.Tensor]":  # type: ignore[name-defined]
        """Average a bucket of DDP: what `switchml_hook` does.

        Raises:
            ValueError: DDP averages over other workers than this state, or the bucket has a type that it cannot add.
        """
        self.connect()
        assert self._place is not None
        model = self._models.number(bucket, self._place)
        return self._average(bucket.buffer(), (model, bucket.index()), bucket.is_last())

    def average(
        self, buffer: torch.Tensor, *, index: int | None = None, last: bool = True
    ) -> "torch.futures.Future[torch.Tensor]":
        """Average `buffer` (1-D, floating point) over the workers, in place.

        Args:
            buffer: the values; on all ranks of the same size and in the same order of calls. float64 is not rounded:
                torch.distributed reduces it, as it would without a switch.
            index: which bucket of a step this is, the same on all ranks. What is known of it from the step before saves
                small ones a round trip; with a narrow wire it keeps what rounding took for its next time.
            last: nothing is left to compute while this bucket travels: its time counts as waiting.

        Returns:
            A future of `buffer`; it always ends, with an error of `SwitchMLError`'s family at the latest after
            the time limit.

        Raises:
            ValueError: the buffer is sparse, or of a type that the switch cannot add.
        """
        return self._average(buffer, None if index is None else (-1, index), last)

    def _average(self, buffer: torch.Tensor, key: Key, last: bool) -> "torch.futures.Future[torch.Tensor]":
        self._calls += 1
        link = self.connect()
        if buffer.layout is not torch.strided or buffer.dtype not in (*_NARROW, torch.float64):
            raise ValueError(
                f"the switch adds dense fp32, fp16 and bf16, got {buffer.dtype} in layout {buffer.layout}: use "
                "sparse=False embeddings and floating-point parameters, or train this model without the hook"
            )
        if buffer.dtype == torch.float64:
            return self._reduced(buffer)
        if buffer.is_cuda and self._device is None:
            self._device = DeviceCopies(buffer.device)
        device = self._device if buffer.is_cuda else None
        future = torch.futures.Future[torch.Tensor](devices=[buffer.device] if device else None)
        staging = device.staging(buffer.numel()) if device else None
        host = staging.host if staging else buffer.detach().float().contiguous()
        residual = self._residual(key, buffer.numel())
        handed = time.monotonic()

        def finish(done: "Future[None]") -> None:
            if last:
                self._waited += time.monotonic() - handed
            try:
                done.result()
                if residual is not None:
                    self._residuals[key, residual.size] = residual
                if device is not None and staging is not None:
                    device.up(staging, buffer, lambda: future.set_result(buffer))
                    return
                if host.data_ptr() != buffer.data_ptr():
                    buffer.copy_(host)
                future.set_result(buffer)
            except Exception as error:  # whatever it is, the backward pass must not wait for ever
                future.set_exception(error)  # type: ignore[arg-type]

        def start() -> None:
            values = host.numpy()
            if residual is not None:
                values += residual
            link.submit(values, values, residual, _number(key)).add_done_callback(finish)

        def failed(copied: "Future[None]") -> None:
            if copied.exception() is not None:
                finish(copied)

        if device is not None and staging is not None:
            device.down(buffer, staging, start).add_done_callback(failed)
        else:
            start()
        # through then(), the error's own words survive the way through C++
        return future.then(lambda finished: finished.value())

    def _reduced(self, buffer: torch.Tensor) -> "torch.futures.Future[torch.Tensor]":
        """float64, which a switch's 32 bits would round: exactly, by torch.distributed."""
        assert self._place is not None
        if not self._place.job:
            raise ValueError(
                "float64 values do not fit the switch's 32 bits: let rank and world size come from torch.distributed, "
                "which then reduces them, or use .float()"
            )
        if not self._exact:
            self._exact = True
            _log.warning("float64 buckets go by torch.distributed, not by the switch, which would round them")
        buffer /= self._place.world
        work = dist.all_reduce(buffer, group=self._place.group, async_op=True)
        assert work is not None
        reduced: torch.futures.Future[torch.Tensor] = work.get_future().then(lambda _: buffer)
        return reduced

    def _residual(self, key: Key, count: int) -> Floats | None:
        """What rounding took at the bucket's last time; it is nobody else's until this time has ended."""
        if self.options.wire == "int32":
            return None
        kept = self._residuals.pop((key, count), None)
        return np.zeros(count, np.float32) if kept is None else kept

    def counters(self) -> dict[str, int | float]:
        """Bytes and packets each way and what became of them, buckets, hook calls and seconds of waiting, so far.

        docs/how-it-works/switchml.md says what each name counts.
        """
        totals = self._past + Counter(self.link.counters() if self.link else {})
        return {**{name: totals[name] for name in COUNTED}, "hook_calls": self._calls, "wait_s": self._waited}

    def close(self) -> None:
        """Leave the session; the next bucket would join it anew."""
        with self._guard:
            if self.link is not None:
                self.link.close()
                self._past += Counter(self.link.counters())
                self.link = self._place = None
            if self._device is not None:
                self._device.close()
                self._device = None


def _number(key: Key) -> int | None:
    """One number for a model's bucket."""
    return None if key is None else key[0] + 1 << 32 | key[1]
