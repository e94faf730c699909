"""Schedules over this process's own TCP connections, by the native engine."""

from collections.abc import Iterable

import torch

from trainkit.collectives._native import ExecuteEngine, execute_program
from trainkit.collectives.execute._errors import ExecutionError, PeerLost
from trainkit.collectives.execute._mesh import Mesh
from trainkit.collectives.execute._program import Program
from trainkit.collectives.execute._transport import Work

# the order is the native core's
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64,
)  # fmt: skip
_NUMBER = {dtype: number for number, dtype in enumerate(DTYPES)}
_KEPT = 256  # sizes of message that a program is kept for
_CAUSES = (
    "",
    "rank {culprit} closed its connection (was it killed?)",
    "rank {culprit} has been silent for the time-out of {timeout:g} s (is its host or link down, or the process stopped?)",
    "rank {culprit} did not call the collective within {timeout:g} s of the others",
    "nothing moved for the time-out of {timeout:g} s while waiting for rank {culprit}",
    "rank {culprit} called another collective, or with another schedule, size or dtype",
    "rank {culprit} gave the collective up",
    "rank {culprit} has left: its program ended or closed the state while others still called the collective",
    "rank {culprit} sent what is no message of this version: do all ranks run the same trainkit?",
)
"""By the native core's `Failure::Reason`."""
_LOST, _LEFT = 1, 7


class TcpTransport:
    """The data path over TCP: buffers in host memory, in place, several collectives at once.

    Args:
        mesh: the connections' maker.
        timeout_s: seconds without progress after which a collective fails on all ranks.
        overlap: whether the next collective may start before the last one is complete here.
    """

    def __init__(self, mesh: Mesh, timeout_s: float, overlap: bool = True) -> None:
        self._mesh, self._timeout_s = mesh, timeout_s
        self._engine = ExecuteEngine(mesh.rank, timeout_s, overlap)
        self._programs: dict[tuple[int, int], tuple[Program, object]] = {}

    def prepare(self, peers: Iterable[int]) -> None:
        """Connect to ranks; all ranks of a schedule do this at the same time.

        Raises:
            PeerLost: one does not come.
        """
        for rank, source, sink in self._mesh.connect(peers):
            self._engine.add_peer(rank, source, sink)

    def start(self, program: Program, buffer: torch.Tensor, call: int = 0) -> "_TcpWork":
        """Begin a collective, in place.

        Args:
            program: what this rank does.
            buffer: [elements] the whole message.
            call: the same number on all ranks, or the collective fails; 64 bits.

        Raises:
            ValueError: a dtype that cannot be summed.
        """
        if buffer.dtype not in _NUMBER:
            raise ValueError(f"schedules over TCP carry {', '.join(map(str, DTYPES))}, got {buffer.dtype}")
        native = self._native(program, buffer.numel())
        job = self._engine.submit(native, buffer.data_ptr(), buffer.numel(), _NUMBER[buffer.dtype], call)
        return _TcpWork(self, job, buffer)

    def _native(self, program: Program, elements: int) -> object:
        key = (id(program), elements)
        if key not in self._programs:
            if len(self._programs) >= _KEPT:
                del self._programs[next(iter(self._programs))]
            begin, end, source = program.slices(elements)
            columns = (program.kind, program.peer, program.op, begin, end, source, program.next_start, program.next)
            self._programs[key] = (program, execute_program(*columns, elements))
        return self._programs[key][1]

    @property
    def broken(self) -> bool:
        """Whether a collective has failed; no other runs after it."""
        return bool(self._engine.failure()[0])

    def error(self) -> ExecutionError:
        """What went wrong."""
        reason, culprit, op, reporter = self._engine.failure()
        if not reason:
            return ExecutionError("the connections were closed while a collective ran")
        cause = _CAUSES[reason].format(culprit=culprit, timeout=self._timeout_s)
        where = f" in operation {op} of the schedule" if op >= 0 else ""
        seen = "" if reporter == self._mesh.rank else f", as rank {reporter} saw"
        return PeerLost(f"{cause}{where}{seen}", culprit, op if op >= 0 else None)

    def awaited(self) -> int | None:
        """A rank that the oldest collective waits for."""
        rank = int(self._engine.awaited())
        return None if rank < 0 else rank

    def counters(self) -> dict[str, int]:
        """Bytes so far."""
        return {"sent_bytes": self._engine.sent, "received_bytes": self._engine.received}

    def lost(self) -> PeerLost | None:
        """A rank whose connection has ended, or what has failed; None while all are there. Whoever asks does not wait."""
        if self.broken:
            error = self.error()
            return error if isinstance(error, PeerLost) else None
        rank, left = self._engine.lost()
        return None if rank < 0 else PeerLost(_CAUSES[_LEFT if left else _LOST].format(culprit=rank), rank)

    def abort(self, culprit: int | None = None) -> None:
        """Fail what runs, on all ranks.

        Args:
            culprit: the rank that is lost; None where this one gives up.
        """
        if culprit is None:
            self._engine.abort()
        else:
            self._engine.abort(_LOST, culprit)

    def close(self) -> None:
        """End the thread and the connections."""
        self._engine.close()
        self._mesh.close()


class _TcpWork(Work):
    def __init__(self, transport: TcpTransport, job: object, buffer: torch.Tensor) -> None:
        self._transport, self._job = transport, job
        self._buffer = buffer  # its memory stays until the work is done

    def wait(self) -> None:
        if not self._job.wait():  # type: ignore[attr-defined]
            raise self._transport.error()
