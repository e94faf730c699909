"""Which buckets a rank has finished, which it owes, and which averages it can still serve: the books of a failover.

Pure: no thread, no socket. `_failover.py` keeps them over real sessions, the tests' adversary over simulated ones.

A bucket that is tried again begins from its kept original. Its memory may hold anything by then: the failed session may
have written the whole average on one rank, half of it on another, and nothing on the third.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from trainkit.switchml._fixed_point import Floats


class Path(Protocol):
    """What carries buckets: `Channels`, or one of the tests."""

    def submit(
        self, values: Floats, out: Floats, residual: Floats | None = None, index: int | None = None
    ) -> "Future[None]":
        """As `Link.submit`."""


@dataclass
class Job:
    """One bucket, from its submission to its average."""

    number: int
    out: Floats
    residual: Floats | None
    index: int | None
    original: Floats
    """What this rank contributes, as it was submitted."""
    done: "Future[None]" = field(default_factory=Future)
    sent: "Future[None] | None" = None
    turn: int = -1
    """How many buckets its path had before it."""


class Ledger:
    """The jobs of one rank, in the order of submission, which is the same on all ranks.

    Attributes:
        finished: jobs that have their average; they finish in order.
        open: jobs that have not, by number.
    """

    def __init__(self) -> None:
        self.finished = 0
        self.open: dict[int, Job] = {}
        self._submitted = self._turn = 0
        self._kept: dict[int, Job] = {}

    def add(self, values: Floats, out: Floats, residual: Floats | None, index: int | None) -> Job:
        """Take a job in; `values` is copied."""
        if values is not out:
            np.copyto(out, values)
        job = Job(self._submitted, out, residual, index, values.copy())
        self._submitted += 1
        self.open[job.number] = job
        return job

    def forward(self, job: Job, path: Path) -> None:
        """Hand a job to a path."""
        job.turn, self._turn = self._turn, self._turn + 1
        job.sent = path.submit(job.out, job.out, job.residual, job.index)

    def forward_all(self, path: Path) -> None:
        """Hand all open jobs to a path that has had none yet, each from its original."""
        self._turn = 0
        for number in sorted(self.open):
            job = self.open[number]
            np.copyto(job.out, job.original)
            self.forward(job, path)

    def complete(self, job: Job) -> None:
        """A job has its average in `out`; kept until all ranks are known to have it."""
        del self.open[job.number]
        self.finished = job.number + 1
        self._kept[job.number] = replace(job, out=job.out.copy())

    def acknowledge(self, turns: int) -> None:
        """All ranks have the first `turns` jobs of the path."""
        self._kept = {number: kept for number, kept in self._kept.items() if kept.turn >= turns}

    def all_equal(self) -> None:
        """All ranks have finished the same jobs: nobody needs to be served."""
        self._kept.clear()

    def owed(self, finished: Sequence[int]) -> tuple[int, range]:
        """Who serves what after a failure.

        Args:
            finished: `Ledger.finished` of each rank.

        Returns:
            The rank that has them, and the numbers of the averages that some rank lacks.
        """
        most = max(finished)
        return finished.index(most), range(min(finished), most)

    def average(self, number: int) -> Floats:
        """Where the average of a job is, or is to come: open it is this rank's memory, else the kept copy."""
        job = self.open.get(number)
        return job.out if job is not None else self._kept[number].out

    @property
    def kept(self) -> int:
        """Averages that are kept."""
        return len(self._kept)
