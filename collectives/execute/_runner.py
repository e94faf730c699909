"""Running schedules on a process group: `Runner`."""

import atexit
import os
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from trainkit.collectives.execute._gloo import GlooTransport
from trainkit.collectives.execute._mesh import Mesh, Store, local_address
from trainkit.collectives.execute._nccl import NcclTransport
from trainkit.collectives.execute._program import Program, compile_rank, rank_order
from trainkit.collectives.execute._tcp import TcpTransport
from trainkit.collectives.execute._transport import Transport, Work
from trainkit.collectives.schedule import Schedule

Way = Literal["auto", "tcp", "gloo", "nccl"]
WAYS: tuple[Way, ...] = ("auto", "tcp", "gloo", "nccl")
_runs: Counter[str] = Counter()  # runners made in each process group: the same number on all ranks
_open: "weakref.WeakSet[Runner]" = weakref.WeakSet()


class Group(Protocol):
    """What is used of a process group or a backend."""

    def rank(self) -> int:
        """This process."""

    def size(self) -> int:
        """How many there are."""


@dataclass(frozen=True)
class Seat:
    """This process's place among the ranks."""

    group: Any
    """Process group or backend: point-to-point messages of the ways "gloo" and "nccl"."""
    store: Store
    """Shared by the ranks of this runner and by nobody else."""
    rank: int
    size: int

    @staticmethod
    def of(process_group: "dist.ProcessGroup | None") -> "Seat":
        """In a process group; None is the default one.

        Raises:
            ValueError: torch.distributed is not initialised, or this process is not in the group.
        """
        if not dist.is_initialized():
            raise ValueError("schedules need ranks: call torch.distributed.init_process_group first")
        group = dist.group.WORLD if process_group is None else process_group
        if group is None or dist.get_rank(group) < 0:
            raise ValueError("this process is not in the process group that the schedule is to run on")
        name = str(group.group_name)
        _runs[name] += 1
        store = dist.distributed_c10d.PrefixStore(
            f"trainkit/{name}/{_runs[name]}", dist.distributed_c10d._get_default_store()
        )
        return Seat(group, store, dist.get_rank(group), dist.get_world_size(group))


class Runner:
    """Runs schedules in place on tensors; all ranks call it with the same schedules in the same order.

    Args:
        process_group: the ranks; None is the default group. Or a `Seat`.
        ranks: compute node -> rank; None takes the order of the schedule's compute nodes.
        deadline_s: seconds without progress after which a collective fails with a named error on every rank.
        transport: "tcp" (own connections, native), "gloo" or "nccl" (the process group's messages). "auto" takes
            "nccl" for tensors on a GPU and "tcp" for those in host memory.
        interface: network interface, or this machine's address, to be reached at; None takes the one that leads to
            torchrun's MASTER_ADDR.
        overlap: whether a collective may start before the one before it is complete here (way "tcp").

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> runner = Runner()
        >>> runner.run(allreduce_forest(topology).schedule(16), tensor)
    """

    def __init__(
        self,
        process_group: "dist.ProcessGroup | Seat | None" = None,
        *,
        ranks: Mapping[str, int] | None = None,
        deadline_s: float = 30.0,
        transport: Way = "auto",
        interface: str | None = None,
        overlap: bool = True,
    ) -> None:
        check_options(deadline_s, transport)
        self.seat = process_group if isinstance(process_group, Seat) else Seat.of(process_group)
        self._ranks, self._deadline_s, self._way = ranks, deadline_s, transport
        self._interface, self._overlap = interface, overlap
        self._transports: dict[Way, Transport] = {}
        self._programs: dict[int, tuple[Schedule, Program]] = {}
        self._prepared: set[tuple[Way, int]] = set()
        self._line = ThreadPoolExecutor(1, "trainkit-schedules")  # what waits, in the order of the calls
        close_at_exit(self)

    def prepare(self, schedule: Schedule, device: torch.device | str = "cpu") -> Program:
        """Compile a schedule and connect to the ranks it talks to; the first `submit` does it otherwise.

        Raises:
            ValueError: the schedule is for another number of ranks.
            PeerLost: a rank does not come within the deadline.
        """
        if id(schedule) not in self._programs:
            order = rank_order(schedule, self._ranks, self.seat.size)
            self._programs[id(schedule)] = schedule, compile_rank(schedule, order.index(self.seat.rank), order)
        program = self._programs[id(schedule)][1]
        way = self._way_of(torch.device(device))
        if (way, id(schedule)) not in self._prepared:
            self.transport(way).prepare(program.peers)
            self._prepared.add((way, id(schedule)))
        return program

    def start(self, schedule: Schedule, tensor: torch.Tensor) -> Work:
        """Start a collective, in place; `wait()` of what is returned must follow, in the order of the calls.

        Raises:
            ValueError: the tensor is not contiguous, or its dtype cannot be carried.
        """
        if not tensor.is_contiguous():
            raise ValueError("a schedule runs in place and needs a contiguous tensor: call contiguous() first")
        program = self.prepare(schedule, tensor.device)
        return self.transport(self._way_of(tensor.device)).start(program, tensor.detach().view(-1))

    def submit(self, schedule: Schedule, tensor: torch.Tensor) -> "Future[None]":
        """Start a collective, in place.

        Args:
            schedule: what to run.
            tensor: contiguous; the whole message M of the schedule, as this rank holds it.

        Returns:
            A future that ends when this rank's part is complete, or with an `ExecutionError`. For a tensor on a GPU it
            has ended at once, and what is queued `behind` follows the collective.

        Raises:
            ValueError: the tensor is not contiguous, or its dtype cannot be carried.
        """
        work = self.start(schedule, tensor)
        if tensor.is_cuda:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return self.later(work.wait)

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
            ExecutionError: a rank is lost, or the deadline passed.
        """
        work = self.start(schedule, tensor)
        if tensor.is_cuda:
            work.wait()
        else:
            self.later(work.wait).result()
        return tensor

    def _way_of(self, device: torch.device) -> Way:
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"schedules run on tensors in host memory or on CUDA devices, got {device}")
        way = self._way if self._way != "auto" else "nccl" if device.type == "cuda" else "tcp"
        if (way == "nccl") != (device.type == "cuda"):
            raise ValueError(f'transport={way!r} does not carry tensors on {device}: leave it at "auto"')
        return way

    def transport(self, way: Way) -> Transport:
        """The way of moving slices, made at its first use."""
        if way not in self._transports:
            seat = self.seat
            if way == "tcp":
                address = local_address(self._interface, os.environ.get("MASTER_ADDR"))
                mesh = Mesh(seat.store, seat.rank, address, self._deadline_s)
                self._transports[way] = TcpTransport(mesh, self._deadline_s, self._overlap)
            elif way == "gloo":
                self._transports[way] = GlooTransport(seat.group, seat.rank, seat.store, self._deadline_s)
            else:
                self._transports[way] = NcclTransport(seat.group)
        return self._transports[way]

    @property
    def broken(self) -> bool:
        """Whether a collective has failed; no other runs after it."""
        return any(transport.broken for transport in self._transports.values())

    def counters(self) -> dict[str, int]:
        """Bytes that were sent and received so far, as far as the ways in use count them."""
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


def check_options(deadline_s: float, transport: Way) -> None:
    """Refuse options outside their range."""
    if not deadline_s > 0:
        raise ValueError(f"deadline_s must be seconds above 0, got {deadline_s!r}")
    if transport not in WAYS:
        raise ValueError(f"transport must be one of {', '.join(WAYS)}, got {transport!r}")


def close_at_exit(runner: Runner) -> None:
    """Close `runner` when the program ends, unless it is gone by then: no thread may outlive the interpreter."""
    _open.add(runner)


@atexit.register
def _close_all() -> None:
    for runner in list(_open):
        runner.close()
