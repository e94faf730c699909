"""MSCCL++'s execution plan: one-sided puts, signals and waits, each in an operation of its own.

Ops that depend on each other stay in one thread block of a rank, so blocks need no semaphores between them: a tree's
chunk arrives, is added, and is put on by the same block. A block works level by level: it puts all that it has for a
level, signals each receiver once, waits once for each sender, adds what landed. Nothing is waited for before all of a
level is put, and a level needs the levels before it alone, so no two blocks wait for each other. Reductions land in
scratch memory of their own, never reused.

Between two operations that hand data from thread to thread stands a `nop`, the block's barrier. A block begins by telling
its senders that it runs: until then a rank's buffers belong to its user, or to the launch before.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainkit.collectives.schedule._form import Schedule
from trainkit.collectives.schedule._op import Op
from trainkit.collectives.schedule.export._chunks import ExportError, Grid, grid, waits
from trainkit.collectives.schedule.export._mscclpp_emulator import (
    MOST_BUFFERS_PER_OPERATION,
    MOST_BYTES,
    MOST_CHANNELS,
    MOST_CHANNELS_PER_OPERATION,
    MOST_OPERATIONS,
    MOST_REMOTE_BUFFERS,
    run_mscclpp,
)

# As many channels as NCCL opens at most (MAXCHANNELS, src/include/device.h): blocks beyond them share links that are full.
BLOCKS = 32
# The multiprocessors of a V100, the smallest GPU of the named fabrics. The blocks of a launch wait for those of other
# ranks, each of 1024 threads fills a multiprocessor (executionKernel's __launch_bounds__), so all must run at once.
MULTIPROCESSORS = 80
_THREADS = 1024

Key = tuple[str, int]
"""(channel type, peer)."""


@dataclass
class _Level:
    """What a rank's block does between two waits."""

    puts: dict[str, list[tuple[int, dict[str, Any], dict[str, Any]]]] = field(default_factory=lambda: defaultdict(list))
    """Channel type -> (peer, source, target); a target names its buffer by rank and type."""
    senders: set[Key] = field(default_factory=set)
    landed: dict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    """(first chunk, chunks) -> where in scratch memory the parts to add are."""

    def operations(self) -> int:
        """At most so many operations, the barriers among them."""
        puts = sum(1 + 2 * _parts(len(puts), MOST_CHANNELS_PER_OPERATION) for puts in self.puts.values())
        waits = _parts(len(self.senders), MOST_CHANNELS_PER_OPERATION) + 2 if self.senders else 0
        return puts + waits + sum(2 * _parts(len(at), MOST_BUFFERS_PER_OPERATION - 1) for at in self.landed.values())


@dataclass
class _Work:
    """What a thread block does on one rank."""

    levels: dict[int, _Level] = field(default_factory=lambda: defaultdict(_Level))
    to: set[Key] = field(default_factory=set)
    of: set[Key] = field(default_factory=set)
    buffers: set[tuple[str, int, str]] = field(default_factory=set)
    """(channel type, peer, buffer type)."""
    operations: int = 0
    """At most so many between the block's first words and its last."""

    def problem(self, other: "_Work | None" = None) -> str | None:
        """The limit that this work, together with other work, exceeds."""
        to, of, buffers = self.to, self.of, self.buffers
        operations = self.operations
        if other is not None:
            to, of, buffers = to | other.to, of | other.of, buffers | other.buffers
            operations += other.operations
        peers = to | of
        for kind in ("memory", "port"):
            channels = sum(key[0] == kind for key in peers)
            if channels > MOST_CHANNELS:
                return f"{MOST_CHANNELS} {kind} channels per thread block, rank {{rank}} would need {channels}"
            remote = sum(key[0] == kind for key in buffers)
            if remote > MOST_REMOTE_BUFFERS:
                return (
                    f"{MOST_REMOTE_BUFFERS} remote buffers of {kind} channels per thread block, rank {{rank}} would need "
                    f"{remote}"
                )
            # A word to each sender, a word from each receiver, a flush.
            operations += 3 * _parts(channels, MOST_CHANNELS_PER_OPERATION)
        operations += 1
        if operations > MOST_OPERATIONS:
            return f"{MOST_OPERATIONS} operations per thread block, rank {{rank}} would need {operations}"
        return None


def mscclpp_json(
    schedule: Schedule, *, ranks_per_machine: int = 8, blocks: int = BLOCKS, multiprocessors: int = MULTIPROCESSORS
) -> str:
    """The schedule as an MSCCL++ execution plan, checked by `run_mscclpp`.

    Args:
        schedule: a verified all-gather, reduce-scatter or all-reduce.
        ranks_per_machine: ranks r and s share a machine, and so memory channels, if r // this == s // this.
        blocks: thread blocks that the work is dealt over; more are opened where it does not fit.
        multiprocessors: of a GPU. There may be no more thread blocks: they wait for each other.

    Raises:
        ExportError: a limit of the runtime is exceeded; the message names it.
    """
    chunks = grid(schedule, "MSCCL++")
    plan = _ExecutionPlan(chunks, ranks_per_machine)
    levels = _levels(schedule)
    pieces = [plan.work(ops, levels) for ops in _groups(schedule)]
    text = plan.text(_dealt(pieces, blocks, multiprocessors))
    run_mscclpp(text, launches=2)
    return text


def _levels(schedule: Schedule) -> list[int]:
    """[ops] a level after those of all ops that it waits for."""
    level: list[int] = []
    for op, before in zip(schedule.ops, waits(schedule), strict=True):
        level.append(max([op.step, *(level[other] + 1 for other in before)]))
    return level


def _groups(schedule: Schedule) -> list[list[Op]]:
    """Ops that depend on each other."""
    parent = list(range(len(schedule.ops)))

    def find(x: int) -> int:
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    last: dict[tuple[int, Any], int] = {}
    for op, before in zip(schedule.ops, waits(schedule), strict=True):
        for other in before:
            parent[find(op.id)] = find(other)
        # Ops on one slice of one rank belong together even where none waits for another.
        for rank in (op.src, op.dst):
            parent[find(op.id)] = find(last.setdefault((rank, op.start), op.id))
    component: dict[int, list[Op]] = defaultdict(list)
    for op in schedule.ops:
        component[find(op.id)].append(op)
    return list(component.values())


def _dealt(pieces: list[dict[int, _Work]], blocks: int, multiprocessors: int) -> list[list[dict[int, _Work]]]:
    """Which pieces each thread block works on: the block with the least to do that has room."""
    dealt: list[tuple[list[dict[int, _Work]], dict[int, _Work]]] = []
    for piece in pieces:
        for rank, work in piece.items():
            refusal = work.problem()
            if refusal:
                raise ExportError("MSCCL++ allows " + refusal.format(rank=rank))
        room = [
            (max(work.operations for work in have.values()), number)
            for number, (_, have) in enumerate(dealt)
            if len(dealt) >= blocks and not any(work.problem(have.get(rank)) for rank, work in piece.items())
        ]
        if not room:
            dealt.append(([], {}))
        own, have = dealt[min(room)[1] if room else -1]
        own.append(piece)
        for rank, work in piece.items():
            had = have.get(rank, _Work())
            have[rank] = _Work(
                had.levels,
                had.to | work.to,
                had.of | work.of,
                had.buffers | work.buffers,
                had.operations + work.operations,
            )
    most = max(sum(rank in have for _, have in dealt) for rank in {rank for piece in pieces for rank in piece})
    if most > multiprocessors:
        raise ExportError(
            f"MSCCL++'s thread blocks run together: there may be {multiprocessors}, one a multiprocessor, "
            f"a rank would need {most}"
        )
    return [own for own, _ in dealt]


class _ExecutionPlan:
    def __init__(self, chunks: Grid, machine: int) -> None:
        self.chunks, self.machine = chunks, machine
        size = len(chunks.schedule.ranks)
        self.main = "i" if chunks.schedule.collective == "reduce_scatter" else "o"
        self.scratch = [0] * size
        self.remote: list[dict[tuple[str, int, str], int]] = [{} for _ in range(size)]

    def work(self, ops: list[Op], levels: list[int]) -> dict[int, _Work]:
        """Rank -> what a group of ops is there."""
        work: dict[int, _Work] = defaultdict(_Work)
        for op in ops:
            first, count = self.chunks.place(op)
            kind = "memory" if op.src // self.machine == op.dst // self.machine else "port"
            out, into, level = work[op.src], work[op.dst], levels[op.id]
            where, place = self.main, first
            if op.kind == "reduce":
                where, place = "s", self.scratch[op.dst]
                self.scratch[op.dst] += count
                into.levels[level].landed[first, count].append(place)
            buffer = (kind, op.dst, where)
            self.remote[op.src].setdefault(buffer, len(self.remote[op.src]))
            source = {"type": self.main, "index": first, "size": count}
            target = {"buffer_id": buffer, "index": place, "size": count}
            out.levels[level].puts[kind].append((op.dst, source, target))
            out.to.add((kind, op.dst))
            out.buffers.add(buffer)
            into.of.add((kind, op.src))
            into.levels[level].senders.add((kind, op.src))
        for mine in work.values():
            mine.operations = sum(level.operations() for level in mine.levels.values())
        return dict(work)

    def text(self, dealt: list[list[dict[int, _Work]]]) -> str:
        schedule = self.chunks.schedule
        gpus = [
            self._gpu(rank, [[piece[rank] for piece in pieces if rank in piece] for pieces in dealt])
            for rank in range(len(schedule.ranks))
        ]
        plan = {
            "name": schedule.name,
            "collective": schedule.collective.replace("_", ""),
            "protocol": "Simple",
            "inplace": True,
            "reuse_resources": False,
            "gpus": gpus,
            "num_threads_per_block": _THREADS,
            "use_double_scratch_buffer": False,
            "buffer_alignment": 16,
            "min_message_size": 0,
            "max_message_size": MOST_BYTES * self.chunks.count // max(self.chunks.count, *self.scratch),
        }
        return json.dumps(plan) + "\n"

    def _gpu(self, rank: int, blocks: list[list[_Work]]) -> dict[str, Any]:
        connected: dict[str, list[int]] = {"memory": [], "port": []}
        written = [self._block(rank, work, connected) for work in blocks if work]
        count, per_rank = self.chunks.count, self.chunks.per_rank
        collective = self.chunks.schedule.collective
        return {
            "id": rank,
            "input_chunks": per_rank if collective == "allgather" else count,
            "output_chunks": per_rank if collective == "reduce_scatter" else count,
            "scratch_chunks": self.scratch[rank],
            "threadblocks": [{"id": number, **block} for number, block in enumerate(written)],
            "channels": [{"channel_type": kind, "connected_to": peers} for kind, peers in connected.items() if peers],
            "remote_buffers": [
                {"rank": peer, "type": where, "access_channel_types": [kind]} for kind, peer, where in self.remote[rank]
            ],
            "semaphores": [],
        }

    def _block(self, rank: int, work: list[_Work], connected: dict[str, list[int]]) -> dict[str, Any]:
        """A thread block; its channels are appended to the rank's."""
        to, of = ({key for one in work for key in getattr(one, side)} for side in ("to", "of"))
        writer = _Writer(self.main, sorted(to | of), {buffer for one in work for buffer in one.buffers})
        writer.begin(sorted(to), sorted(of))
        for level in sorted({level for one in work for level in one.levels}):
            writer.level([one.levels[level] for one in work if level in one.levels])
        writer.on("flush", [key for key in sorted(to) if key[0] == "port"])
        channels, references = [], []
        for kind, peers in connected.items():
            own = [peer for other, peer in writer.peers if other == kind]
            if own:
                channels.append({"channel_type": kind, "channel_ids": list(range(len(peers), len(peers) + len(own)))})
                peers += own
            buffers = [self.remote[rank][buffer] for buffer in writer.buffers if buffer[0] == kind]
            if buffers:
                references.append({"access_channel_type": kind, "remote_buffer_ids": buffers})
        return {"ops": writer.ops, "channels": channels, "remote_buffer_refs": references}


class _Writer:
    """The operations of a thread block, with the barriers that they need."""

    def __init__(self, main: str, peers: list[Key], buffers: Iterable[tuple[str, int, str]]) -> None:
        self.main, self.peers, self.buffers = main, peers, sorted(buffers)
        self.ops: list[dict[str, Any]] = []
        self.unseen = False  # whether threads have not yet met since a wait or since one of them changed data
        self.added: list[tuple[int, int]] = []  # chunks added to since they met

    def begin(self, to: list[Key], of: list[Key]) -> None:
        """Tell those that send here that this rank is ready, and hear it of those that it sends to."""
        self.on("signal", of)
        self.on("wait", to)
        self.unseen = bool(to)

    def level(self, parts: Sequence[_Level]) -> None:
        puts: dict[str, list[tuple[int, dict[str, Any], dict[str, Any]]]] = defaultdict(list)
        for part in parts:
            for kind, own in part.puts.items():
                puts[kind] += own
        if puts:
            self._meet()
        for kind, every in puts.items():
            for some in _batched(every, MOST_CHANNELS_PER_OPERATION):
                self._operation("put", kind, [peer for peer, _, _ in some])
                self.ops[-1]["src_buff"] = [source for _, source, _ in some]
                self.ops[-1]["dst_buff"] = [
                    {**target, "buffer_id": self._numbers(self.buffers, kind).index(target["buffer_id"])}
                    for _, _, target in some
                ]
        if puts:
            self.unseen = True
            self._meet()
            self.on("signal", sorted({(kind, peer) for kind, every in puts.items() for peer, _, _ in every}))
        senders = sorted({key for part in parts for key in part.senders})
        self.on("wait", senders)
        self.unseen = self.unseen or bool(senders)
        for part in parts:
            for (first, count), places in part.landed.items():
                mine = {"type": self.main, "index": first, "size": count}
                for some in _batched(places, MOST_BUFFERS_PER_OPERATION - 1):
                    if self.unseen or any(a < first + count and first < b for a, b in self.added):
                        self.unseen = True
                        self._meet()
                    landed = [{"type": "s", "index": place, "size": count} for place in some]
                    self.ops.append({"name": "re", "src_buff": [mine, *landed], "dst_buff": [mine], "reduce_op": "sum"})
                    self.added.append((first, first + count))
        self.unseen = self.unseen or bool(self.added)

    def on(self, name: str, keys: Sequence[Key]) -> None:
        """An operation on channels, as often as it takes."""
        for kind in ("memory", "port"):
            for some in _batched([peer for other, peer in keys if other == kind], MOST_CHANNELS_PER_OPERATION):
                self._operation(name, kind, some)
                if name == "flush":
                    # The kernel counts a flush's outputs, not its channels (handleFlush, execution_kernel.hpp line 121).
                    self.ops[-1]["dst_buff"] = [{"type": self.main, "index": 0, "size": 0}] * len(some)

    def _operation(self, name: str, kind: str, peers: Sequence[int]) -> None:
        place = self._numbers(self.peers, kind)
        ids = [place.index((kind, peer)) for peer in peers]
        self.ops.append({"name": name, "channel_ids": ids, "channel_type": kind})

    @staticmethod
    def _numbers(entries: Sequence[Any], kind: str) -> list[Any]:
        """A block numbers its channels, and its remote buffers, by type."""
        return [entry for entry in entries if entry[0] == kind]

    def _meet(self) -> None:
        if self.unseen:
            self.ops.append({"name": "nop"})
        self.unseen, self.added = False, []


def _parts(length: int, size: int) -> int:
    return -(-length // size)


def _batched(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]
