"""Schedules over NCCL: wave after wave, each one group of messages.

NCCL knows no tags and matches the messages of a pair in order. A wave's group holds the same messages on both sides
in the same order, and all ranks go through the waves in the same order, so that none waits for another in a circle.
Sums run on a stream of their own, a wave behind, while the next group is on its way. Two ranks need none: between them
an operation is a reduction to one or a broadcast from one, and NCCL adds while it receives.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from trainkit.collectives.execute._program import COPY, OUT, REDUCE, Program, compile_rank
from trainkit.collectives.execute._transport import Work
from trainkit.collectives.schedule import Schedule

_ALIGNED = 128  # bytes: NCCL copies what starts elsewhere at half the speed


_communicators: "weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]"
_communicators = weakref.WeakKeyDictionary()


@dataclass
class _Wave:
    sends: list[tuple[int, int, int]] = field(default_factory=list)
    """(peer, first element, end)"""
    receives: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(peer, first element, end, first element of the staging half or -1 for in place)"""
    applies: list[tuple[int, int, int, int, bool]] = field(default_factory=list)
    """(first element, end, source, 1 where the source is staged, whether it is added)"""
    after: int = -1
    """The wave whose sums must be there."""


@dataclass
class _Plan:
    waves: list[_Wave]
    staging: int
    """Elements of one half of the staging buffer."""


_Group = list[tuple[bool, int, int, int]]
"""A wave between two ranks: (whether it is added, the rank that it is added at or comes from, first element, end)."""


class NcclTransport:
    """Messages of a process group in GPU memory.

    Args:
        group: a `torch.distributed` process group or backend over NCCL.
    """

    broken = False  # NCCL's own watchdog ends a process whose peer is gone

    def __init__(self, group: Any) -> None:
        self._group = group
        self._plans: dict[tuple[int, int, int], tuple[Program, _Plan | list[_Group]]] = {}
        self._waves: dict[int, list[int]] = {}
        self._staging: dict[torch.dtype, torch.Tensor] = {}
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._moved = 0

    def prepare(self, peers: Iterable[int]) -> None:
        """Make all ranks meet once, so that groups of a few of them may follow."""
        if self._streams is None:
            # the first one's kernels go before sums and the model's own that run beside them
            self._streams = (torch.cuda.Stream(priority=-1), torch.cuda.Stream())  # type: ignore[no-untyped-call]
            if isinstance(self._group, dist.ProcessGroup):
                self._group = _urgent(self._group)
            self._group.allreduce([torch.zeros(1, device="cuda")]).wait()

    @property
    def stream(self) -> torch.cuda.Stream:
        """What is queued there comes after the collectives that were started."""
        assert self._streams is not None
        return self._streams[1]

    def start(self, program: Program, buffer: torch.Tensor, call: int = 0) -> Work:
        """Queue a collective behind what the current stream does; it runs beside what the current stream does next."""
        assert self._streams is not None
        plan = self._plan(program, buffer)
        groups, sums = self._streams
        groups.wait_stream(sums)  # what an earlier collective has staged is added, and its buffer complete
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream())
            buffer.record_stream(stream)
        backend = self._group._get_backend(buffer.device) if hasattr(self._group, "_get_backend") else self._group
        if isinstance(plan, _Plan):
            self._run_waves(backend, plan, buffer)
        else:
            self._run_groups(backend, plan, buffer, program.rank)
        return _Queued(self.stream)

    def _run_groups(self, backend: Any, waves: list[_Group], buffer: torch.Tensor, rank: int) -> None:
        assert self._streams is not None
        groups, sums = self._streams
        with torch.cuda.stream(groups):
            for wave in waves:
                backend._start_coalescing()
                for adds, root, first, end in wave:
                    piece = buffer[first:end]
                    if adds:
                        backend.reduce([piece], _options(dist.ReduceOptions(), root))  # type: ignore[attr-defined]
                    else:
                        backend.broadcast([piece], _options(dist.BroadcastOptions(), root))  # type: ignore[attr-defined]
                    self._moved += piece.nbytes * (adds == (root == rank))
                work = backend._end_coalescing()
                if work is not None:  # it went to a stream of the process group's
                    work.wait()
        sums.wait_stream(groups)

    def _run_waves(self, backend: Any, plan: _Plan, buffer: torch.Tensor) -> None:
        assert self._streams is not None
        groups, sums = self._streams
        staging = self._stage(buffer, plan.staging)
        events: list[torch.cuda.Event] = []
        for number, wave in enumerate(plan.waves):
            # its half of the staging buffer is free, and what it sends is there
            ready = max(wave.after, number - 2)
            half = number % 2 * plan.staging
            with torch.cuda.stream(groups):
                if ready >= 0:
                    groups.wait_event(events[ready])
                work = self._exchange(backend, wave, buffer, staging, half)
            with torch.cuda.stream(sums):
                if work is not None:
                    work.wait()
                for first, end, source, staged, adds in wave.applies:
                    value = (staging[half:] if staged else buffer)[source : source + end - first]
                    buffer[first:end].add_(value) if adds else buffer[first:end].copy_(value)
                events.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
                events[-1].record()

    def _exchange(self, backend: Any, wave: _Wave, buffer: torch.Tensor, staging: torch.Tensor, half: int) -> Any:
        if not (wave.sends or wave.receives):
            return None
        backend._start_coalescing()
        for peer, first, end in wave.sends:
            backend.send([buffer[first:end]], peer, 0)
        for peer, first, end, staged in wave.receives:
            target = buffer[first:end] if staged < 0 else staging[half + staged : half + staged + end - first]
            backend.recv([target], peer, 0)
            self._moved += target.nbytes
        return backend._end_coalescing()

    def _stage(self, buffer: torch.Tensor, half: int) -> torch.Tensor:
        kept = self._staging.get(buffer.dtype)
        if kept is None or kept.numel() < 2 * half:
            kept = self._staging[buffer.dtype] = buffer.new_empty(2 * half)
            assert self._streams is not None
            for stream in self._streams:
                stream.wait_stream(torch.cuda.current_stream())
                kept.record_stream(stream)
        return kept

    def _plan(self, program: Program, buffer: torch.Tensor) -> _Plan | list[_Group]:
        elements, align = buffer.numel(), _ALIGNED // buffer.itemsize
        key = (id(program), elements, align)
        if key not in self._plans:
            schedule = program.schedule
            pair = adds_in_place(schedule)
            if id(schedule) not in self._waves:
                self._waves[id(schedule)] = waves_of(schedule, in_place=pair)
            planned = plan_groups if pair else plan_waves
            self._plans[key] = (program, planned(program, elements, self._waves[id(schedule)], align))
        return self._plans[key][1]

    def awaited(self) -> int | None:
        """Not known."""
        return None

    def counters(self) -> dict[str, int]:
        """Bytes so far."""
        return {"received_bytes": self._moved}

    def close(self) -> None:
        """Let the staging buffers go."""
        self._staging.clear()
        self._plans.clear()
        self._waves.clear()


def _options(options: Any, root: int) -> Any:
    options.rootRank = root
    if hasattr(options, "asyncOp"):  # since PyTorch 2.8: on the current stream, without a detour over the group's own
        options.asyncOp = False
    return options


def _urgent(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A communicator of the same ranks whose kernels go before the sums that run beside them; made once."""
    if group in _communicators:
        return _communicators[group]
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)  # type: ignore[attr-defined]
    ranks = dist.get_process_group_ranks(group)
    made = dist.new_group(ranks, backend="nccl", pg_options=options, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    _communicators[group] = made
    return made


class _Queued:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._end = stream.record_event()

    def wait(self) -> None:
        """The current stream waits."""
        torch.cuda.current_stream().wait_event(self._end)


def adds_in_place(schedule: Schedule) -> bool:
    """Whether NCCL itself can add up: between two ranks, where what is sent is never what is written meanwhile."""
    return len(schedule.ranks) == 2 and schedule.mode == "pipelined" and all(op.kind != "copy" for op in schedule.ops)


def waves_of(schedule: Schedule, *, in_place: bool = False) -> list[int]:
    """[ops] the wave of each operation, the same on all ranks.

    What is received in a wave can be sent in the next one; a sum takes a wave longer, so that adding up and sending
    overlap. Sums of one slice keep the schedule's order.

    Args:
        schedule: what is to run.
        in_place: operations of mode "pipelined" that touch the same bytes, one of them writing, are all in different
            waves, and a sum takes no longer than what is received.
    """
    if schedule.mode == "steps":
        slow = any(op.kind == "reduce" for op in schedule.ops)
        return [op.step * (1 + slow) for op in schedule.ops]
    waves = [op.step for op in schedule.ops]
    programs = [compile_rank(schedule, rank) for rank in range(len(schedule.ranks))]
    place = [{op: at for at, op in enumerate(program.op.tolist())} for program in programs]
    for op in schedule.ops:
        for rank in {op.src, op.dst}:
            program = programs[rank]
            for earlier in program.waits[place[rank][op.id]]:
                before = schedule.ops[int(program.op[earlier])]
                # what it sends must be there; what it writes over was written by an earlier wave or in this one
                lag = 1 + (before.kind == "reduce") if rank == op.src else 0
                if in_place:
                    lag = 1
                waves[op.id] = max(waves[op.id], waves[before.id] + lag)
    return waves


def plan_groups(program: Program, elements: int, all_waves: list[int], align: int = 1) -> list[_Group]:
    """The waves between two ranks, the same on both; `all_waves` is the schedule's `waves_of` with `in_place`."""
    groups: dict[int, _Group] = defaultdict(list)
    begin, end, _ = (column.tolist() for column in program.slices(elements, align))
    for at, op in enumerate(program.op.tolist()):
        if begin[at] < end[at]:
            sends, adds = program.kind[at] == OUT, program.schedule.ops[op].kind == "reduce"
            root = int(program.peer[at]) if adds == sends else program.rank
            groups[all_waves[op]].append((adds, root, begin[at], end[at]))
    return [groups[wave] for wave in sorted(groups)]


def plan_waves(program: Program, elements: int, all_waves: list[int], align: int = 1) -> _Plan:
    """One rank's waves for one size of message; `all_waves` is the schedule's `waves_of`."""
    wave_of = [all_waves[op] for op in program.op.tolist()]
    begin, end, source = (column.tolist() for column in program.slices(elements, align))
    rows: dict[int, list[int]] = defaultdict(list)
    for at in range(len(program.kind)):
        if begin[at] < end[at]:
            rows[wave_of[at]].append(at)
    numbers = {wave: number for number, wave in enumerate(sorted(rows))}
    waves, most = [], 0
    applied: set[int] = set()  # operations that the stream of sums finishes
    for wave in sorted(rows):
        plan, room = _Wave(), 0
        for at in sorted(rows[wave], key=lambda at: int(program.op[at])):
            kind, first, last, peer = program.kind[at], begin[at], end[at], int(program.peer[at])
            earlier = program.waits[at]
            here = any(wave_of[other] == wave for other in earlier)
            late = [numbers[wave_of[other]] for other in earlier if other in applied and wave_of[other] != wave]
            if kind == COPY:
                plan.applies.append((first, last, source[at], 0, False))
                applied.add(at)
            elif kind == OUT:
                plan.sends.append((peer, first, last))
                plan.after = max([plan.after, *late])
            elif kind == REDUCE or here:
                plan.receives.append((peer, first, last, room))
                plan.applies.append((first, last, room, 1, kind == REDUCE))
                room += last - first
                applied.add(at)
            else:
                plan.receives.append((peer, first, last, -1))
                plan.after = max([plan.after, *late])
        waves.append(plan)
        most = max(most, room)
    return _Plan(waves, most)
