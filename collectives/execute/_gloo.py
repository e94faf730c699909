"""Schedules over a process group's own point-to-point messages, one thread for each peer and direction.

Plain sends and receives with tags of their own; gloo's batched form can hang.
"""

import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from trainkit.collectives.execute._errors import ExecutionError, PeerLost
from trainkit.collectives.execute._mesh import Store
from trainkit.collectives.execute._program import COPY, OUT, REDUCE, Program
from trainkit.collectives.execute._transport import Work

_TAG = 7 << 24  # above what people use
_WINDOW = 4  # receives posted ahead, each peer


class GlooTransport:
    """Point-to-point messages of a process group in host memory.

    Args:
        group: a `torch.distributed` process group or backend with `send` and `recv`.
        rank: this rank in it.
        store: where the first rank that sees a failure tells the others.
        deadline_s: seconds that one message may take.
    """

    def __init__(self, group: Any, rank: int, store: Store, deadline_s: float) -> None:
        self.group, self.rank, self.store, self.deadline_s = group, rank, store, deadline_s
        self.broken = False
        self._moved = 0

    def prepare(self, peers: Iterable[int]) -> None:
        """Nothing to do: the group is connected."""

    def start(self, program: Program, buffer: torch.Tensor) -> Work:
        """A collective that runs when it is waited for."""
        return _Run(self, program, buffer)

    def moved(self, size: int) -> None:
        """Count bytes that arrived."""
        self._moved += size

    def counters(self) -> dict[str, int]:
        """Bytes so far."""
        return {"received_bytes": self._moved}

    def close(self) -> None:
        """Nothing is kept."""


class _Run:
    def __init__(self, transport: GlooTransport, program: Program, buffer: torch.Tensor) -> None:
        self.transport, self.program, self.buffer = transport, program, buffer
        self.begin, self.end, self.source = (column.tolist() for column in program.slices(buffer.numel()))
        self.waits = [len(earlier) for earlier in program.waits]
        self.staged: dict[int, torch.Tensor] = {}
        self.moved = threading.Condition()
        self.error: ExecutionError | None = None

    def wait(self) -> None:
        """Run to the end."""
        if self.transport.broken:
            raise ExecutionError("an earlier collective of this runner failed: make a new one")
        program = self.program
        full = [at for at in range(len(program.kind)) if self.begin[at] < self.end[at]]
        work: dict[tuple[int, bool], list[int]] = {}
        for at in full:
            if program.kind[at] != COPY:
                work.setdefault((int(program.peer[at]), program.kind[at] == OUT), []).append(at)
        threads = [
            threading.Thread(target=self._guarded, args=(self._send if out else self._receive, peer, mine), daemon=True)
            for (peer, out), mine in work.items()
        ]
        for at, earlier in enumerate(program.waits):
            if not earlier:
                self._ready(at)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error is not None:
            self.transport.broken = True
            raise self.error

    def _guarded(self, run: Callable[[int, list[int]], None], peer: int, mine: list[int]) -> None:
        try:
            run(peer, mine)
        except Exception as error:
            with self.moved:
                if self.error is None:
                    self.error = self._diagnosis(peer, error)
                self.moved.notify_all()

    def _diagnosis(self, peer: int, error: Exception) -> ExecutionError:
        """What the first rank that saw it wrote down, or this one's own view."""
        seen = f"{peer} {self.transport.rank} {str(error).splitlines()[0][:200]}"
        try:
            told = self.transport.store.compare_set("failed", "", seen).decode() or seen
        except RuntimeError:  # the store went with the rank that kept it
            told = seen
        culprit, reporter, words = told.split(" ", 2)
        return PeerLost(f"rank {culprit} is lost, as rank {reporter} saw: {words}", int(culprit))

    def _receive(self, peer: int, mine: list[int]) -> None:
        posted: list[tuple[torch.Tensor, Any]] = []
        for place, at in enumerate(mine):
            for ahead in mine[place + len(posted) : place + _WINDOW]:
                staged = self.buffer.new_empty(self.end[ahead] - self.begin[ahead])
                posted.append((staged, self.transport.group.recv([staged], peer, self._tag(ahead))))
            staged, work = posted.pop(0)
            work.wait(timedelta(seconds=self.transport.deadline_s))
            self.transport.moved(staged.nbytes)
            with self.moved:
                self.staged[at] = staged
                now = self.waits[at] == 0
            if now:
                self._ready(at)

    def _send(self, peer: int, mine: list[int]) -> None:
        for at in mine:
            with self.moved:
                if not self.moved.wait_for(partial(self._may_go, at), self.transport.deadline_s):
                    raise TimeoutError(f"nothing to send for {self.transport.deadline_s:g} s")
                if self.error is not None:
                    return
            work = self.transport.group.send([self.buffer[self.begin[at] : self.end[at]]], peer, self._tag(at))
            work.wait(timedelta(seconds=self.transport.deadline_s))
            self._complete(at)

    def _may_go(self, at: int) -> bool:
        return self.waits[at] == 0 or self.error is not None

    def _tag(self, at: int) -> int:
        return _TAG | int(self.program.op[at]) & 0xFFFFFF

    def _ready(self, at: int) -> None:
        """Nothing before it is left: do what needs no message."""
        kind, target = self.program.kind[at], self.buffer[self.begin[at] : self.end[at]]
        if len(target) == 0:
            self._complete(at)
        elif kind == COPY:
            target.copy_(self.buffer[self.source[at] : self.source[at] + len(target)].clone())
            self._complete(at)
        elif kind != OUT:
            with self.moved:
                staged = self.staged.pop(at, None)
            if staged is not None:
                target.add_(staged) if kind == REDUCE else target.copy_(staged)
                self._complete(at)

    def _complete(self, at: int) -> None:
        program = self.program
        ready = []
        with self.moved:
            for later in program.next[program.next_start[at] : program.next_start[at + 1]].tolist():
                self.waits[later] -= 1
                if self.waits[later] == 0:
                    ready.append(later)
            self.moved.notify_all()
        for later in ready:
            self._ready(later)
