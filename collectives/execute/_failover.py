"""Going on with the process group's all-reduce when a schedule can no longer run."""

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainkit.collectives.execute._errors import ExecutionError
from trainkit.collectives.execute._runner import Runner
from trainkit.collectives.schedule import Schedule

_log = logging.getLogger(__name__)
_LOOK = 0.2  # seconds between looks at the connections while nothing runs


class Failover:
    """All-reduces that survive the loss of the schedule's connections, one after the other.

    A rank that fails may be a collective behind one that does not: before the ranks go on they compare how many each
    has completed, and who is ahead hands over the sum it has.

    Args:
        runner: what runs the schedules; this object has its line of waits for itself.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        placement = runner.placement
        # not by new_group: it would stay after this object, and under the name that the next one is to have
        store = dist.distributed_c10d.PrefixStore("failover", placement.store)  # type: ignore[arg-type]
        timeout = timedelta(seconds=max(runner.options.patience_s, 1))
        self._group = gloo_group(store, placement.rank, placement.size, timeout, runner.address())
        self._count = 0
        self._last: torch.Tensor | None = None
        self.cause: ExecutionError | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="trainkit-failover", daemon=True).start()

    def all_reduce(self, schedule: Schedule | None, tensor: torch.Tensor) -> None:
        """Sum in place; runs in the runner's line.

        Args:
            schedule: what runs; None where the ranks could not be connected.
            tensor: [elements] to sum.

        Raises:
            ExecutionError: the process group's all-reduce failed as well.
        """
        if self.cause is None:
            before = tensor.clone()
            try:
                if schedule is None:
                    raise self._runner.failure or ExecutionError("the ranks of the schedule could not be connected")
                self._runner.wait(self._runner.start(schedule, tensor))
            except ExecutionError as error:
                tensor.copy_(before)
                if not self._agree(error, tensor):
                    return
            else:
                self._count += 1
                self._last = tensor.clone()
                return
        self._guarded(lambda: self._group.allreduce([tensor]))

    def close(self) -> None:
        """Stop looking at the connections."""
        self._closed.set()

    def _agree(self, cause: ExecutionError, tensor: torch.Tensor | None) -> bool:
        """Meet the other ranks; whether `tensor` still has to be summed."""
        self.cause = cause
        _log.warning("gradients go over the process group's all-reduce from now on: %s", cause)
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self._runner.placement.size)]
        self._guarded(lambda: self._group.allgather([counts], [torch.tensor([self._count])]))
        done = [int(count) for count in counts]
        if min(done) == max(done):
            return True
        ahead = done.index(max(done))
        behind = self._count == min(done)
        value = tensor if behind else self._last
        assert value is not None  # who is behind was summing, and who is ahead has a sum
        self._guarded(lambda: self._group.broadcast(value, ahead))
        return not behind

    def _guarded(self, start: Callable[[], dist.Work]) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise ExecutionError(
                f"the schedule failed ({self.cause}), and so did the process group's all-reduce after it: {error}"
            ) from self.cause

    def _watch(self) -> None:
        """A rank with nothing to sum must come to the meeting as well."""

        def meet() -> None:
            if self.cause is None:
                self._agree(ExecutionError("another rank lost a connection"), None)

        while not self._closed.wait(_LOOK):
            if self.cause is not None or self._runner.broken:
                self._runner.later(meet)
                return


def gloo_group(store: Any, rank: int, size: int, timeout: timedelta, address: str) -> Any:
    """A gloo backend at an address that the others reach, whatever this host's name resolves to.

    Args:
        store: shared by the ranks.
        rank: this one.
        size: how many there are.
        timeout: of a message.
        address: of this host.
    """
    gloo: Any = dist.ProcessGroupGloo  # type: ignore[attr-defined]
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timeout
    return gloo(store, rank, size, options)
