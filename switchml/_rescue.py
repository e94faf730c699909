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
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from trainkit.switchml._errors import SwitchMLError, WorkerMissing
from trainkit.switchml._fixed_point import Floats
from trainkit.switchml._lanes import Lanes
from trainkit.switchml._options import Options

_log = logging.getLogger(__name__)

_RETRY = 15.0
"""Seconds between two attempts to take the switch back."""
_RETRY_FOR = 2.0


@dataclass
class _Job:
    number: int
    values: Floats
    out: Floats
    residual: Floats | None
    index: int | None
    original: Floats
    done: "Future[None]" = field(default_factory=Future)
    sent: "Future[None] | None" = None
    turn: int = -1
    """How many buckets this link had before it; -1 where it did not go through the switch."""


class Rescue:
    """`Lanes` that outlive their switch; same `submit`, `counters` and `close`.

    Args:
        options: what the user asked for.
        rank: this worker.
        world: workers.

    Raises:
        ValueError: torch.distributed is not initialised, so that there is nothing to fall back on.
        SwitchMLError: the session could not be joined.
    """

    def __init__(self, options: Options, rank: int, world: int) -> None:
        if not dist.is_initialized():
            raise ValueError("fallback='allreduce' needs torch.distributed: call init_process_group first, or use None")
        self._options, self._rank, self._world = options, rank, world
        self._patience = 2 * options.deadline_s + 10
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._patience))
        self._link: Lanes | None = Lanes(options, rank, world)
        self.member = self._link.member
        self.error: SwitchMLError | None = None
        self.rescues = 0
        self._cause = SwitchMLError("the session failed")
        self._lock = threading.Lock()
        self._jobs: dict[int, _Job] = {}
        self._kept: dict[int, _Job] = {}
        self._submitted = self._finished = self._forwarded = 0
        self._tried = 0.0
        self._past: dict[str, int] = {}
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"switchml-rescue-{rank}", daemon=True)
        self._thread.start()

    def submit(
        self, values: Floats, out: Floats, residual: Floats | None = None, index: int | None = None
    ) -> "Future[None]":
        """As `Link.submit`."""
        with self._lock:
            job = _Job(self._submitted, values, out, residual, index, values.copy())
            self._submitted += 1
            if self.error is not None:
                job.done.set_exception(self.error)
                return job.done
            self._jobs[job.number] = job
            self._forward(job)
            self._queue.put(job)
        return job.done

    def counters(self) -> dict[str, int]:
        """As `Lanes.counters`, over all links so far."""
        now = self._link.counters() if self._link else {}
        return {name: now.get(name, 0) + self._past.get(name, 0) for name in {*now, *self._past}}

    def close(self) -> None:
        """Serve who still lacks a bucket, leave the session and end the thread."""
        self._queue.put(None)
        self._thread.join()
        self._unlink()

    def _forward(self, job: _Job) -> None:
        if self._link is not None:
            job.turn, self._forwarded = self._forwarded, self._forwarded + 1
            job.sent = self._link.submit(job.values, job.out, job.residual, job.index)

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

    def _process(self, job: _Job) -> None:
        if job.done.done():
            return
        if self._link is not None and self._arrived(job):
            return
        if not job.done.done() and self._take_back() and self._arrived(job):
            return
        if not job.done.done():
            self._reduce(job)

    def _arrived(self, job: _Job) -> bool:
        """Wait for the switch's answer; a failure begins a rescue."""
        assert job.sent is not None
        try:
            job.sent.result()
        except SwitchMLError as error:
            self._fall_back(error)
            return False
        assert self._link is not None
        self._complete(job)
        confirmed = self._link.confirmed
        self._kept = {number: kept for number, kept in self._kept.items() if kept.turn >= confirmed}
        return True

    def _complete(self, job: _Job) -> None:
        del self._jobs[job.number]
        self._finished = job.number + 1
        self._kept[job.number] = replace(job, out=job.out.copy())
        job.done.set_result(None)

    def _fall_back(self, error: SwitchMLError) -> None:
        _log.warning("rank %d goes on without the switch: %s", self._rank, error)
        self.rescues += 1
        self._cause = error
        # a rank that is only cut off from the switch answers here; one that is dead or paused has had its deadline
        patience = self._options.deadline_s if isinstance(error, WorkerMissing) else self._patience
        try:
            self._agree(patience)
        except RuntimeError as failed:
            raise error from failed  # the ranks do not find together: the first error names the cause

    def _agree(self, patience: float) -> None:
        """Exchange what is finished, and serve those who lack an average that another rank has."""
        self._unlink()
        mine = torch.tensor([self._finished])
        gathered = [torch.empty_like(mine) for _ in range(self._world)]
        exchange = dist.all_gather(gathered, mine, group=self.group, async_op=True)
        assert exchange is not None
        exchange.wait(timedelta(seconds=patience))
        finished = [int(count) for count in gathered]
        source = finished.index(max(finished))
        for number in range(min(finished), max(finished)):
            job = self._jobs.get(number)
            average = torch.from_numpy(job.out if job else self._kept[number].out)
            dist.broadcast(average, group=self.group, group_src=source)
            if job is not None:
                self._complete(job)
        self._tried = time.monotonic()

    def _unlink(self) -> None:
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()
            for name, value in link.counters().items():
                self._past[name] = self._past.get(name, 0) + value

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
            joined = Lanes(replace(self._options, deadline_s=_RETRY_FOR), self._rank, self._world)
            joined.wait_for(self._options.deadline_s)
        except SwitchMLError as error:
            _log.info("rank %d: still without the switch: %s", self._rank, error)
        all_joined = torch.tensor([int(joined is not None)])
        dist.all_reduce(all_joined, dist.ReduceOp.MIN, group=self.group)
        if not all_joined.item() or joined is None:
            if joined is not None:
                joined.close()
            return False
        _log.warning("rank %d: back on the switch at bucket %d", self._rank, self._finished)
        self._kept.clear()  # all ranks have come this far
        with self._lock:
            self._link, self.member, self._forwarded = joined, joined.member, 0
            for number in sorted(self._jobs):
                self._forward(self._jobs[number])
        return True

    def _reduce(self, job: _Job) -> None:
        np.copyto(job.out, job.original)
        average = torch.from_numpy(job.out)
        dist.all_reduce(average, group=self.group)
        average /= self._world
        self._kept.clear()  # all ranks have come this far
        if job.residual is not None:
            job.residual.fill(0)
        self._complete(job)

    def _give_up(self, error: Exception) -> None:
        if isinstance(error, SwitchMLError):
            named = error
        else:
            named = copy.copy(self._cause)
            named.args = (f"{self._cause}; going on without the switch failed too: {error}",)
        with self._lock:
            self.error = named
            pending, self._jobs = self._jobs, {}
        for job in pending.values():
            job.done.set_exception(named)
