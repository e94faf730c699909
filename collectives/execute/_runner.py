"""Running schedules on a process group: `Runner`."""

import atexit
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist

from trainkit.collectives._address import reachable_address
from trainkit.collectives._exchange import Exchange, Placement, RankMissing
from trainkit.collectives.execute._errors import ExecutionError, PeerLost
from trainkit.collectives.execute._gloo import GlooTransport
from trainkit.collectives.execute._mesh import Mesh
from trainkit.collectives.execute._nccl import NcclTransport
from trainkit.collectives.execute._options import ForestOptions, Transports, options_of
from trainkit.collectives.execute._program import Program, compile_rank, rank_order
from trainkit.collectives.execute._tcp import TcpTransport
from trainkit.collectives.execute._transport import Transport, Work
from trainkit.collectives.execute._verdict import Verdict
from trainkit.collectives.schedule import Schedule

_open: "weakref.WeakSet[Runner]" = weakref.WeakSet()


class Runner:
    """Runs schedules in place on tensors; all ranks call it with the same schedules in the same order.

    Once a collective has failed, no other runs: the ranks could no longer be sure that they mean the same one.

    Args:
        process_group: the ranks; None is the default group. Or a `Placement`.
        options: see `ForestOptions`; `fallback` and `chunk_bytes` are not the runner's.
        overlap: whether a collective may start before the one before it is complete here (transport "tcp").
        **settings: single options.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> runner = Runner()
        >>> runner.run(allreduce_forest(topology).schedule(16), tensor)
    """

    def __init__(
        self,
        process_group: "dist.ProcessGroup | Placement | None" = None,
        *,
        options: ForestOptions | None = None,
        overlap: bool = True,
        **settings: Any,
    ) -> None:
        self.options = options_of(ForestOptions, options, settings, "Runner")
        self.placement: Placement = (
            process_group if isinstance(process_group, Placement) else Placement.of(process_group)
        )
        self.failure: ExecutionError | None = None
        """Why nothing runs any more."""
        self._overlap = overlap
        self._address: str | None = None
        self._verdict = Verdict(self.placement.store, self.placement.rank)
        self._transports: dict[Transports, Transport] = {}
        self._programs: dict[int, tuple[Schedule, Program]] = {}
        self._prepared: set[tuple[Transports, int]] = set()
        self._line = ThreadPoolExecutor(1, "trainkit-schedules")  # what waits, in the order of the calls
        close_at_exit(self)

    def prepare(self, schedule: Schedule, device: torch.device | str = "cpu") -> Program:
        """Compile a schedule and connect to the ranks it talks to; the first `submit` does it otherwise.

        Raises:
            ValueError: the schedule is for another number of ranks.
            PeerLost: a rank does not come within the time-out.
        """
        if self.failure is not None:
            raise self.failure
        if id(schedule) not in self._programs:
            order = rank_order(schedule, self.options.ranks, self.placement.size)
            program = compile_rank(schedule, order.index(self.placement.rank), order)
            self._programs[id(schedule)] = schedule, program
        program = self._programs[id(schedule)][1]
        transport = self._transport_of(torch.device(device))
        if (transport, id(schedule)) not in self._prepared:
            try:
                self.transport(transport).prepare(program.peers)
            except ExecutionError as error:
                raise self.failed(error) from error
            self._prepared.add((transport, id(schedule)))
        return program

    def start(self, schedule: Schedule, tensor: torch.Tensor, what: str = "") -> Work:
        """Start a collective, in place; `wait()` of what is returned must follow, in the order of the calls.

        Args:
            schedule: what to run.
            tensor: contiguous; the whole message.
            what: anything else that must be equal on all ranks, in words.

        Raises:
            ValueError: the tensor is not contiguous, or its dtype cannot be carried.
            ExecutionError: an earlier collective failed, or a rank did not come.
        """
        if not tensor.is_contiguous():
            raise ValueError("a schedule runs in place and needs a contiguous tensor: call contiguous() first")
        program = self.prepare(schedule, tensor.device)
        transport = self.transport(self._transport_of(tensor.device))
        return transport.start(program, tensor.detach().view(-1), _call_of(schedule, tensor, what))

    def submit(
        self, schedule: Schedule, tensor: torch.Tensor, what: str = "", finish: Callable[[], object] | None = None
    ) -> "Future[None]":
        """Start a collective, in place.

        Args:
            schedule: what to run.
            tensor: contiguous; the whole message M of the schedule, as this rank holds it.
            what: see `start`.
            finish: called when the collective is complete here, before the future ends.

        Returns:
            A future that ends when this rank's part is complete, or with an `ExecutionError`. For a tensor on a GPU it
            has ended at once, and what is queued `behind` follows the collective.

        Raises:
            ValueError: the tensor is not contiguous, or its dtype cannot be carried.
            ExecutionError: an earlier collective failed, or a rank did not come.
        """
        work = self.start(schedule, tensor, what)
        if tensor.is_cuda:
            done: Future[None] = Future()
            with self.behind(tensor.device):
                if finish is not None:
                    finish()
            done.set_result(None)
            return done

        def end() -> None:
            self.wait(work)
            if finish is not None:
                finish()

        return self.later(end)

    def wait(self, work: Work) -> None:
        """Wait for what `start` returned; what fails it fails this runner.

        Raises:
            ExecutionError: a rank is lost, or nothing moved for the time-out.
        """
        try:
            work.wait()
        except ExecutionError as error:
            raise self.failed(error) from error

    def heed(self) -> None:
        """Raise what another rank has written down.

        Raises:
            ExecutionError: another rank has given up.
        """
        told = self.failure or self._verdict.read()
        if told is not None:
            raise self.failed(told)

    def failed(self, error: ExecutionError) -> ExecutionError:
        """Nothing runs from now on, here and where it has not been heard of yet; the error that all ranks report."""
        if self.failure is None:
            self.failure = self._verdict.give(error)
            transport = self._transports.get("tcp")
            if isinstance(transport, TcpTransport):
                transport.abort(self.failure.rank if isinstance(self.failure, PeerLost) else None)
        return self.failure

    def behind(self, device: torch.device) -> AbstractContextManager[object]:
        """A context in which work on a GPU is queued behind the collectives submitted so far."""
        if device.type != "cuda":
            return nullcontext()
        transport = self.transport("nccl")
        assert isinstance(transport, NcclTransport)
        return torch.cuda.stream(transport.stream)

    def later(self, task: Callable[[], None]) -> "Future[None]":
        """Run `task` behind the waits of all collectives submitted so far."""
        return self._line.submit(task)

    def run(self, schedule: Schedule, tensor: torch.Tensor) -> torch.Tensor:
        """Run a collective in place and wait for it; on a GPU, the current stream does.

        Raises:
            ExecutionError: a rank is lost, or the time-out passed.
        """
        work = self.start(schedule, tensor)
        if tensor.is_cuda:
            work.wait()
        else:
            self.later(lambda: self.wait(work)).result()
        return tensor

    def _transport_of(self, device: torch.device) -> Transports:
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"schedules run on tensors in host memory or on CUDA devices, got {device}")
        named = self.options.transport
        name: Transports = named if named != "auto" else "nccl" if device.type == "cuda" else "tcp"
        if (name == "nccl") != (device.type == "cuda"):
            raise ValueError(f'transport={name!r} does not carry tensors on {device}: leave it at "auto"')
        return name

    def transport(self, name: Transports) -> Transport:
        """What moves slices, made at its first use; then all ranks come.

        Raises:
            PeerLost: a rank did not come in time.
            ValueError: a rank has no address that the others can reach.
        """
        if name not in self._transports:
            placement, timeout_s = self.placement, self.options.patience_s
            if name == "tcp":
                mesh = Mesh(placement.store, placement.rank, self.address(), timeout_s)
                self._transports[name] = TcpTransport(mesh, timeout_s, self._overlap)
            elif name == "gloo":
                self._transports[name] = GlooTransport(placement.group, placement.rank, placement.store, timeout_s)
            else:
                self._transports[name] = NcclTransport(placement.group)
        return self._transports[name]

    def address(self) -> str:
        """The address that the other ranks reach this one at; the first call is made by all ranks.

        Raises:
            PeerLost: a rank did not come in time.
            ValueError: a rank has no address that the others can reach.
        """
        if self._address is None:
            exchange = Exchange(self.placement.store, self.placement.rank, self.placement.size, self.options.patience_s)
            try:
                self._address = reachable_address(exchange, self.options.interface)
            except RankMissing as error:
                raise PeerLost(str(error), error.rank) from error
        return self._address

    @property
    def broken(self) -> bool:
        """Whether a collective has failed; no other runs after it."""
        return any(transport.broken for transport in self._transports.values())

    def awaited(self) -> int | None:
        """A rank that a running collective waits for; None where none does or it is not known."""
        ranks = (transport.awaited() for transport in self._transports.values())
        return next((rank for rank in ranks if rank is not None), None)

    def lost(self) -> PeerLost | None:
        """A rank that is gone, as far as the connections in use tell; does not wait."""
        transport = self._transports.get("tcp")
        return transport.lost() if isinstance(transport, TcpTransport) else None

    def counters(self) -> dict[str, int]:
        """Bytes that were sent and received so far, as far as the transports in use count them."""
        total: Counter[str] = Counter()
        for transport in self._transports.values():
            total.update(transport.counters())
        return dict(total)

    def close(self) -> None:
        """End the threads and the connections; does nothing the second time."""
        transports, self._transports = self._transports, {}
        for transport in transports.values():
            transport.close()
        self._line.shutdown(wait=False)


def _call_of(schedule: Schedule, tensor: torch.Tensor, what: str) -> int:
    """What is called, as a number that two different calls do not share."""
    said = (schedule.collective, schedule.name, schedule.root, len(schedule.ops), tensor.dtype, tensor.numel(), what)
    return int.from_bytes(blake2b(repr(said).encode(), digest_size=8).digest())


def close_at_exit(runner: Runner) -> None:
    """Close `runner` when the program ends, unless it is gone by then: no thread may outlive the interpreter."""
    _open.add(runner)


@atexit.register
def _close_all() -> None:
    for runner in list(_open):
        runner.close()
