"""Schedules over a process group's own point-to-point messages, one thread for each peer and direction.

Plain sends and receives with tags of their own; gloo's batched form can hang.
"""

import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from trainkit.collectives._exchange import Store
from trainkit.collectives.execute._errors import ExecutionError, PeerLost
from trainkit.collectives.execute._program import COPY, OUT, REDUCE, Program
from trainkit.collectives.execute._transport import Work
from trainkit.collectives.execute._verdict import Verdict

_TAG, _CALL_TAG = 7 << 24, 6 << 24  # above what people use
_WINDOW = 4  # receives posted ahead, each peer


class GlooTransport:
    """Point-to-point messages of a process group in host memory.

    Args:
        group: a `torch.distributed` process group or backend with `send` and `recv`.
        rank: this rank in it.
        store: where the first rank that sees a failure tells the others.
        timeout_s: seconds that one message may take.
    """

    def __init__(self, group: Any, rank: int, store: Store, timeout_s: float) -> None:
        self.group, self.rank, self.store, self.timeout_s = group, rank, store, timeout_s
        self.broken = False
        self._moved = 0

    def prepare(self, peers: Iterable[int]) -> None:
        """Nothing to do: the group is connected."""

    def start(self, program: Program, buffer: torch.Tensor, call: int = 0) -> Work:
        """A collective that runs when it is waited for."""
        return _Run(self, program, buffer, call)

    def awaited(self) -> int | None:
        """Not known."""
        return None

    def moved(self, size: int) -> None:
        """Count bytes that arrived."""
        self._moved += size

    def counters(self) -> dict[str, int]:
        """Bytes so far."""
        return {"received_bytes": self._moved}

    def close(self) -> None:
        """Nothing is kept."""


class _Run:
    def __init__(self, transport: GlooTransport, program: Program, buffer: torch.Tensor, call: int) -> None:
        self.transport, self.program, self.buffer = transport, program, buffer
        self.call = torch.tensor([call >> 1])  # 63 of its 64 bits
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
        words = error if isinstance(error, PeerLost) else f"rank {peer} is lost: {str(error).splitlines()[0][:200]}"
        return Verdict(self.transport.store, self.transport.rank).give(PeerLost(str(words), peer))

    def _receive(self, peer: int, mine: list[int]) -> None:
        called = torch.empty_like(self.call)
        self.transport.group.recv([called], peer, _CALL_TAG).wait(timedelta(seconds=self.transport.timeout_s))
        if not torch.equal(called, self.call):
            raise PeerLost(f"rank {peer} called another collective, or with another schedule, size or dtype", peer)
        posted: list[tuple[torch.Tensor, Any]] = []
        for place, at in enumerate(mine):
            for ahead in mine[place + len(posted) : place + _WINDOW]:
                staged = self.buffer.new_empty(self.end[ahead] - self.begin[ahead])
                posted.append((staged, self.transport.group.recv([staged], peer, self._tag(ahead))))
            staged, work = posted.pop(0)
            work.wait(timedelta(seconds=self.transport.timeout_s))
            self.transport.moved(staged.nbytes)
            with self.moved:
                self.staged[at] = staged
                now = self.waits[at] == 0
            if now:
                self._ready(at)

    def _send(self, peer: int, mine: list[int]) -> None:
        self.transport.group.send([self.call], peer, _CALL_TAG).wait(timedelta(seconds=self.transport.timeout_s))
        for at in mine:
            with self.moved:
                # longer than a receive may take: whoever does not send is to be named, not who would be sent to
                if not self.moved.wait_for(partial(self._may_go, at), self.transport.timeout_s + 1):
                    raise TimeoutError(f"nothing to send for {self.transport.timeout_s:g} s")
                if self.error is not None:
                    return
            work = self.transport.group.send([self.buffer[self.begin[at] : self.end[at]]], peer, self._tag(at))
            work.wait(timedelta(seconds=self.transport.timeout_s))
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
