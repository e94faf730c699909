"""Collectives of gloo's, each behind a meeting of all ranks on the backend's own connections.

Gloo names nobody when a rank is dead or late, and adds up whatever comes when ranks call different collectives. The
meeting does name it: a tree of one number each, in which every rank says what it is about to call.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from fractions import Fraction
from queue import SimpleQueue
from typing import Any

import torch

from trainkit.collectives.execute._errors import ExecutionError
from trainkit.collectives.execute._runner import Runner
from trainkit.collectives.schedule import Op, Schedule

_LOOK_S = 0.1  # between looks at the connections
_GRACE_S = 2.0
"""Seconds for the rest of a collective to arrive after a rank has gone: its part may be complete, and this one's not."""


def meeting(size: int) -> Schedule:
    """One number from all ranks to rank 0 and back, along a binomial tree: nobody leaves before everybody has come."""
    ops: list[Op] = []
    whole = (Fraction(0), Fraction(1))
    names = tuple(f"rank {rank}" for rank in range(size))
    edges = [(rank, rank - (rank & -rank)) for rank in range(1, size)]  # (child, parent)
    edges.sort(key=lambda edge: edge[0] & -edge[0])
    arrived: dict[int, list[int]] = {rank: [] for rank in range(size)}
    for child, parent in edges:
        ops.append(Op(len(ops), "reduce", child, parent, *whole, (names[child], names[parent]), tuple(arrived[child])))
        arrived[parent].append(len(ops) - 1)
    told = {0: tuple(arrived[0])}
    for child, parent in reversed(edges):
        ops.append(Op(len(ops), "send", parent, child, *whole, (names[parent], names[child]), told[parent]))
        told[child] = (len(ops) - 1,)
    links = {(names[u], names[v]): 1 for edge in edges for u, v in (edge, edge[::-1])}
    return Schedule("meeting", "allreduce", names, ops, "pipelined", links=links)


class Guarded:
    """Gloo's collectives, one after the other in the runner's line.

    Args:
        runner: the backend's, with more than one rank.
        gloo: the backend that carries them.
    """

    def __init__(self, runner: Runner, gloo: Any) -> None:
        self._runner, self._gloo = runner, gloo
        self._meeting = meeting(runner.placement.size)
        self._watched: SimpleQueue[threading.Event] = SimpleQueue()
        threading.Thread(target=self._watch, name="trainkit-gloo", daemon=True).start()

    def run(self, what: str, call: Callable[[], Any] | None) -> "Future[None]":
        """Meet, then call; all ranks do so in the same order.

        Args:
            what: the collective with everything that must be equal on all ranks, in words.
            call: starts gloo's; None where the meeting is all.

        Raises:
            ExecutionError: an earlier collective failed.
        """
        work = self._runner.start(self._meeting, torch.zeros(1, dtype=torch.int64), what)

        def end() -> None:
            self._runner.wait(work)
            if call is not None:
                self._finish(what, call())

        return self._runner.later(end)

    def _finish(self, what: str, work: Any) -> None:
        """Wait for gloo, with an eye on the connections: it does not notice everything."""
        over = threading.Event()
        self._watched.put(over)
        try:
            work.wait()
        except RuntimeError as error:
            until = time.monotonic() + _GRACE_S
            while (lost := self._runner.lost()) is None and time.monotonic() < until:
                time.sleep(_LOOK_S)
            self._gloo.abort()
            words = f"{what} failed in gloo: {str(error).splitlines()[0][:300]}"
            raise self._runner.failed(lost or ExecutionError(words)) from error
        finally:
            over.set()

    def _watch(self) -> None:
        """Have gloo give up what cannot end because a rank is gone."""
        while True:
            over = self._watched.get()
            gone_since: float | None = None
            while not over.wait(_LOOK_S):
                gone_since = None if self._runner.lost() is None else gone_since or time.monotonic()
                if gone_since is not None and time.monotonic() - gone_since > _GRACE_S:
                    self._gloo.abort()
                    break
