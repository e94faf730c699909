"""Going on without the switch: `fallback="allreduce"`.

Each rank counts the buckets that it has finished. When a rank's session fails, or when it closes, the ranks exchange
their counts over a process group of this module's own: who has a finished average sends it to those who lack it, later
buckets are reduced from their kept originals, and every rank does so in the order of the buckets. A rank keeps its
averages until the chunks since then prove that all have them (a worker is at most one window ahead of another), so
that even the last rank to get the last bucket is served.
"""

import copy
import logging
import queue
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from trainkit.switchml._channels import Channels
from trainkit.switchml._errors import SwitchMLError, WorkerMissing
from trainkit.switchml._fixed_point import Floats
from trainkit.switchml._ledger import Job, Ledger
from trainkit.switchml._options import Options
from trainkit.switchml._place import Place

_log = logging.getLogger(__name__)

_RETRY = 15.0
"""Seconds between two attempts to take the switch back."""
_RETRY_FOR = 2.0


class Failover:
    """`Channels` that outlive their switch; same `submit`, `counters` and `close`.

    Args:
        options: what the user asked for.
        place: this worker's.

    Raises:
        ValueError: torch.distributed is not initialised, so that there is nothing to fall back on.
        SwitchMLError: the session could not be joined.
    """

    def __init__(self, options: Options, place: Place) -> None:
        if not dist.is_initialized():
            raise ValueError(
                "fallback='allreduce' needs torch.distributed: call init_process_group first, or use 'error'"
            )
        self._options, self._place, self._rank = options, place, place.rank
        self._patience = 2 * options.timeout_s + 10
        self.group = dist.new_group(
            place.global_ranks(),
            backend="gloo",
            timeout=timedelta(seconds=self._patience),
            use_local_synchronization=True,
        )
        self._link: Channels | None = Channels(options, place)
        self.member = self._link.member
        self.error: SwitchMLError | None = None
        self.failovers = 0
        self._cause = SwitchMLError("the session failed")
        self._lock = threading.Lock()
        self._ledger = Ledger()
        self._tried = 0.0
        self._past: Counter[str] = Counter()
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"switchml-failover-{self._rank}", daemon=True)
        self._thread.start()

    def submit(
        self, values: Floats, out: Floats, residual: Floats | None = None, index: int | None = None
    ) -> "Future[None]":
        """As `Link.submit`."""
        with self._lock:
            job = self._ledger.add(values, out, residual, index)
            if self.error is not None:
                del self._ledger.open[job.number]
                job.done.set_exception(self.error)
                return job.done
            if self._link is not None:
                self._ledger.forward(job, self._link)
            self._queue.put(job)
        return job.done

    def counters(self) -> dict[str, int]:
        """As `Channels.counters`, over all links so far."""
        link = self._link
        return dict(self._past + Counter(link.counters() if link else {}))

    def close(self) -> None:
        """Serve who still lacks a bucket, leave the session and end the thread."""
        self._queue.put(None)
        self._thread.join()
        self._unlink()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._process(job)
            except Exception as error:
                self._give_up(error)
        if self.error is None and self._link is not None:
            try:
                self._agree(self._patience)
            except RuntimeError as error:
                _log.warning("rank %d could not see whether all ranks have their last bucket: %s", self._rank, error)

    def _process(self, job: Job) -> None:
        if job.done.done():
            return
        if self._link is not None and self._arrived(job):
            return
        if not job.done.done() and self._take_back() and self._arrived(job):
            return
        if not job.done.done():
            self._reduce(job)

    def _arrived(self, job: Job) -> bool:
        """Wait for the switch's answer; a failure begins a failover."""
        assert job.sent is not None
        try:
            job.sent.result()
        except SwitchMLError as error:
            self._fall_back(error)
            return False
        assert self._link is not None
        self._complete(job)
        with self._lock:
            self._ledger.acknowledge(self._link.acknowledged)
        return True

    def _complete(self, job: Job) -> None:
        with self._lock:
            self._ledger.complete(job)
        job.done.set_result(None)

    def _fall_back(self, error: SwitchMLError) -> None:
        _log.warning("rank %d goes on without the switch: %s", self._rank, error)
        self.failovers += 1
        self._cause = error
        # a rank that is only cut off from the switch answers here; one that is dead or paused has had its time
        patience = self._options.timeout_s if isinstance(error, WorkerMissing) else self._patience
        try:
            self._agree(patience)
        except RuntimeError as failed:
            raise error from failed  # the ranks do not find together: the first error names the cause

    def _agree(self, patience: float) -> None:
        """Exchange what is finished, and serve those who lack an average that another rank has."""
        self._unlink()
        mine = torch.tensor([self._ledger.finished])
        gathered = [torch.empty_like(mine) for _ in range(self._place.world)]
        exchange = dist.all_gather(gathered, mine, group=self.group, async_op=True)
        assert exchange is not None
        exchange.wait(timedelta(seconds=patience))
        source, numbers = self._ledger.owed([int(count) for count in gathered])
        for number in numbers:
            dist.broadcast(torch.from_numpy(self._ledger.average(number)), group=self.group, group_src=source)
            if (job := self._ledger.open.get(number)) is not None:
                self._complete(job)
        self._tried = time.monotonic()

    def _unlink(self) -> None:
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()
            self._past += Counter(link.counters())

    def _take_back(self) -> bool:
        """Now and then, when rank 0 says so, all ranks try to join again; True where all did."""
        if self._link is not None:
            return True
        now = torch.tensor([int(time.monotonic() - self._tried > _RETRY)])
        dist.broadcast(now, group=self.group, group_src=0)
        if not now.item():
            return False
        self._tried = time.monotonic()
        joined = None
        try:
            joined = Channels(replace(self._options, timeout_s=_RETRY_FOR), self._place)
            joined.wait_for(self._options.timeout_s)
        except SwitchMLError as error:
            _log.info("rank %d: still without the switch: %s", self._rank, error)
        all_joined = torch.tensor([int(joined is not None)])
        dist.all_reduce(all_joined, dist.ReduceOp.MIN, group=self.group)
        if not all_joined.item() or joined is None:
            if joined is not None:
                joined.close()
            return False
        with self._lock:
            _log.warning("rank %d: back on the switch at bucket %d", self._rank, self._ledger.finished)
            self._ledger.all_equal()
            self._link, self.member = joined, joined.member
            self._ledger.forward_all(joined)
        return True

    def _reduce(self, job: Job) -> None:
        np.copyto(job.out, job.original)
        average = torch.from_numpy(job.out)
        dist.all_reduce(average, group=self.group)
        average /= self._place.world
        if job.residual is not None:
            job.residual.fill(0)
        with self._lock:
            self._ledger.all_equal()
        self._complete(job)

    def _give_up(self, error: Exception) -> None:
        if isinstance(error, SwitchMLError):
            named = error
        else:
            named = copy.copy(self._cause)
            named.args = (f"{self._cause}; going on without the switch failed too: {error}",)
        with self._lock:
            self.error = named
            pending = list(self._ledger.open.values())
            self._ledger.open.clear()
        for job in pending:
            job.done.set_exception(named)
