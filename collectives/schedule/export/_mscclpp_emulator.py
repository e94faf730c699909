"""The MSCCL++ executor on paper: thread blocks, their threads, the proxy, and what a user does between two launches.

Written from the kernel (microsoft/mscclpp at 1f5f065d, src/core/include/execution_kernel.hpp), not from what an exporter
means. What it keeps of the kernel:

- The threads of a block run the operations one after another and meet only at a `nop` (line 75). A signal or a wait is
  the business of the first threads, one per channel (lines 83 to 118): the others go on.
- A put over a memory channel is a copy by all threads, and sends no signal whatever its name says (lines 147 to 167).
  Over a port channel the first threads hand it to a proxy, which reads the source when it likes (lines 168 to 186).
- A flush is waited for by as many threads as the operation has outputs (line 120).
- A launch begins on one rank while another is still in the one before, and nothing is between them but the plan.

Which thread handles which part of a range depends on the operation and on where the range begins: what one operation
leaves to another, other threads may take up.
"""

import json
import random
from collections import defaultdict, deque
from collections.abc import Generator, Hashable
from typing import Any

from trainkit.collectives.schedule.export._chunks import ExportError

MOST_CHANNELS = 16
"""Channels of a type in a thread block: MAX_CHANNEL, execution_common.hpp line 17."""
MOST_CHANNELS_PER_OPERATION = 8
"""MAX_CHANNEL_PER_OPERATION, execution_common.hpp line 18."""
MOST_BUFFERS_PER_OPERATION = 10
"""Inputs, or outputs, of an operation: 8 + MAX_LOCAL_BUFFER_PER_OPERATION, execution_common.hpp line 76."""
MOST_OPERATIONS = 64
"""MAX_OPERATION in a thread block, execution_common.hpp line 19, checked in executor.cc line 478."""
MOST_REMOTE_BUFFERS = 16
"""Remote buffers of a type in a thread block: RemoteBuffers' arrays have MAX_CHANNEL places, execution_common.hpp line 80;
nothing checks it."""
MOST_PORT_CHANNELS = 1 << 10
"""Port channels of a rank: TriggerBitsSemaphoreId, fifo_device.hpp line 27."""
MOST_PORT_MEMORIES = (1 << 9) - 3
"""Remote buffers of a rank behind port channels: TriggerBitsMemoryId, fifo_device.hpp line 25, less its own three."""
MOST_BYTES = (1 << 32) - 1
"""Offsets into a buffer are 32 bits: Operation, execution_common.hpp line 129."""

_COLLECTIVES = ("allgather", "reducescatter", "allreduce")
ORDERS = ("random", "late", "apart")
"""How the emulator picks the next thread: any; the first threads of blocks last; some ranks far ahead of the others."""
_WORDS = 2  # parts of a chunk
_Steps = Generator[tuple[Hashable, str] | None, None, None]


def run_mscclpp(text: str, *, launches: int = 3, order: str = "random", seed: int = 0) -> None:
    """Check a plan's limits and run it, several launches back to back on the same buffers.

    Args:
        text: the plan.
        launches: how many; inputs differ, and a rank's buffers change hands as soon as its kernel ends.
        order: one of `ORDERS`.
        seed: of the interleaving.

    Raises:
        ExportError: a limit is exceeded, a thread waits for ever, or a rank ends with wrong data; the message names it.
    """
    plan = json.loads(text)
    check_limits(plan)
    _Emulator(plan, launches, order, random.Random(seed)).run()


def check_limits(plan: dict[str, Any]) -> None:
    """Refuse what overruns the executor's arrays.

    Raises:
        ExportError: naming the limit, the rank and the thread block.
    """
    for gpu in plan["gpus"]:
        rank = f"rank {gpu['id']}"
        for block in gpu["threadblocks"]:
            where = f"{rank}, thread block {block['id']}"
            _most(where, "operations", len(block["ops"]), MOST_OPERATIONS)
            for entry in block["channels"]:
                _most(where, f"{entry['channel_type']} channels", len(entry["channel_ids"]), MOST_CHANNELS)
            for entry in block["remote_buffer_refs"]:
                kind = entry["access_channel_type"]
                _most(where, f"remote buffers of {kind} channels", len(entry["remote_buffer_ids"]), MOST_REMOTE_BUFFERS)
            for op in block["ops"]:
                _most(where, "channels in an operation", len(op.get("channel_ids", ())), MOST_CHANNELS_PER_OPERATION)
                for side in ("src_buff", "dst_buff"):
                    _most(where, "buffers in an operation", len(op.get(side, ())), MOST_BUFFERS_PER_OPERATION)
        ports = [entry["connected_to"] for entry in gpu["channels"] if entry["channel_type"] == "port"]
        _most(rank, "port channels", sum(map(len, ports)), MOST_PORT_CHANNELS)
        behind = sum("port" in buffer["access_channel_types"] for buffer in gpu["remote_buffers"])
        _most(rank, "remote buffers behind port channels", behind, MOST_PORT_MEMORIES)


def _most(where: str, what: str, value: int, limit: int) -> None:
    if value > limit:
        raise ExportError(f"MSCCL++ allows {limit} {what}, {where} has {value}")


class _Emulator:
    """All ranks of one plan."""

    def __init__(self, plan: dict[str, Any], launches: int, order: str, rng: random.Random) -> None:
        self.gpus, self.launches, self.order, self.rng = plan["gpus"], launches, order, rng
        if plan["protocol"] != "Simple":
            raise ExportError(
                f"the operations of this plan are no packets: protocol must be Simple, got {plan['protocol']}"
            )
        if plan["collective"] not in _COLLECTIVES:
            raise ExportError(f"collective must be one of {', '.join(_COLLECTIVES)}, got {plan['collective']!r}")
        self.collective = plan["collective"]
        self.main = "i" if self.collective == "reducescatter" else "o"
        self.count = self.gpus[0]["input_chunks" if self.main == "i" else "output_chunks"]
        self.memory = {
            (gpu["id"], kind): [0] * (_WORDS * chunks)
            for gpu in self.gpus
            for kind, chunks in ((self.main, self.count), ("s", gpu["scratch_chunks"]))
        }
        self.partner = self._pair()
        self.inbound: dict[Hashable, int] = defaultdict(int)
        self.expected: dict[Hashable, int] = defaultdict(int)
        self.arrived: dict[Hashable, int] = defaultdict(int)
        self.met: dict[Hashable, int] = defaultdict(int)
        self.posted: dict[Hashable, deque[Any]] = defaultdict(deque)  # channel -> what the proxy has yet to do
        self.flushed: dict[Hashable, int] = defaultdict(int)
        self.running = [0] * len(self.gpus)
        self.threads: dict[tuple[int, int], int] = {}
        self.shift: dict[tuple[str, int, int], int] = {}
        self.value: dict[tuple[int, int], list[int]] = {}  # (launch, rank) -> its words
        self.ready: tuple[list[_Steps], list[_Steps]] = ([], [])  # those that run sooner, those that run later
        self.waiting: dict[Hashable, list[tuple[_Steps, bool, str]]] = defaultdict(list)

    def _pair(self) -> dict[tuple[int, str, int], tuple[int, str, int]]:
        """The j-th channel of a type from a to b belongs to the j-th from b to a (executor.cc line 291)."""
        ends: dict[tuple[int, int, str], list[int]] = defaultdict(list)
        for gpu in self.gpus:
            for entry in gpu["channels"]:
                for own, peer in enumerate(entry["connected_to"]):
                    ends[gpu["id"], peer, entry["channel_type"]].append(own)
        partner: dict[tuple[int, str, int], tuple[int, str, int]] = {}
        for (rank, peer, kind), here in ends.items():
            there = ends.get((peer, rank, kind), [])
            if len(here) != len(there):
                raise ExportError(
                    f"ranks {rank} and {peer} have {len(here)} and {len(there)} {kind} channels to each other"
                )
            partner |= {(rank, kind, a): (peer, kind, b) for a, b in zip(here, there, strict=True)}
        return partner

    # Scheduling: an agent yields None where another may run, or what it waits for and in which words.

    def run(self) -> None:
        for gpu in self.gpus:
            self._start(self._user(gpu), late=False)
        sooner, later = self.ready
        while sooner or later:
            pool = sooner if sooner and (not later or self.rng.random() < 0.95) else later
            at = self.rng.randrange(len(pool))
            agent = pool[at]
            for _ in range(self.rng.randint(1, 8)):
                try:
                    wait = next(agent)
                except StopIteration:
                    _drop(pool, at)
                    break
                if wait is not None:
                    self.waiting[wait[0]].append((agent, pool is later, wait[1]))
                    _drop(pool, at)
                    break
        stuck = [words for agents in self.waiting.values() for _, _, words in agents if words]
        if stuck:
            raise ExportError(f"{stuck[0]} waits for ever, and {len(stuck) - 1} more threads")
        for channel, have in self.inbound.items():
            if have != self.expected[channel]:
                raise ExportError(f"rank {channel[0]} was signalled more often than it waits")  # type: ignore[index]

    def _start(self, agent: _Steps, late: bool) -> None:
        self.ready[late].append(agent)

    def _wake(self, key: Hashable) -> None:
        for agent, late, _ in self.waiting.pop(key, ()):
            self.ready[late].append(agent)

    # The user of a rank: inputs, a launch, a look at the outputs some time later.

    def _user(self, gpu: dict[str, Any]) -> _Steps:
        rank = gpu["id"]
        for launch in range(self.launches):
            self.memory[rank, self.main][:] = self._input(launch, rank)
            for block in gpu["threadblocks"]:
                threads = 1 + max([1, *(len(op.get("channel_ids", ())) for op in block["ops"])])
                self.threads[rank, block["id"]] = threads
                self.running[rank] += threads
                for thread in range(threads):
                    agent = self._thread(gpu, block, thread, threads)
                    late = (
                        thread + 1 < threads
                        if self.order == "late"
                        else self.order == "apart" and rank % 2 == launch % 2
                    )
                    self._start(agent, late)
            while self.running[rank]:
                yield ("kernel", rank), ""
            for _ in range(self.rng.randint(0, 40)):
                yield None
            self._check(launch, rank)

    def _input(self, launch: int, rank: int) -> list[int]:
        drawn = random.Random(launch * len(self.gpus) + rank)
        words = self.value[launch, rank] = [drawn.randrange(1, 2**40) for _ in range(_WORDS * self.count)]
        if self.collective != "allgather":
            return words
        own = _WORDS * self.count // len(self.gpus)
        return [word if at // own == rank else -1 for at, word in enumerate(words)]

    def _check(self, launch: int, rank: int) -> None:
        own = _WORDS * self.count // len(self.gpus)
        for at, word in enumerate(self.memory[rank, self.main]):
            if self.collective == "reducescatter" and at // own != rank:
                continue
            sources = [at // own] if self.collective == "allgather" else range(len(self.gpus))
            for source in sources:
                if (launch, source) not in self.value:
                    self._input(launch, source)
            want = sum(self.value[launch, source][at] for source in sources)
            if word != want:
                raise ExportError(f"launch {launch}: rank {rank} ends with wrong data in chunk {at // _WORDS}")

    # A thread of the kernel.

    def _thread(self, gpu: dict[str, Any], block: dict[str, Any], thread: int, threads: int) -> _Steps:
        rank, home = gpu["id"], ("block", gpu["id"], block["id"])
        for place, op in enumerate(block["ops"]):
            name = op["name"]
            words = f"rank {rank}, thread block {block['id']}, thread {thread} at operation {place} ({name})"
            channels = [self._channel(gpu, block, op, own) for own in op.get("channel_ids", ())]
            mine = channels[thread] if thread < len(channels) else None
            if name == "nop":
                turn = self.met[home]
                self.arrived[home] += 1
                if self.arrived[home] % threads == 0:
                    self.met[home] += 1
                    self._wake(home)
                while self.met[home] == turn:
                    yield home, words
            elif name in ("put", "pws"):
                yield from self._put(gpu, block, op, channels, thread)
            elif name == "re":
                yield from self._reduce(gpu, op, thread, threads)
            elif name not in ("signal", "wait", "flush"):
                raise ExportError(f"operation {name!r} is none that plans of this package have")
            elif mine is None:
                pass
            elif name == "signal":
                if mine[1] == "memory":
                    self._signal(self.partner[mine])
                else:
                    self._post(mine, ("flag", self.partner[mine]))
            elif name == "wait":
                self.expected[mine] += 1
                most = self.expected[mine]
                while self.inbound[mine] < most:
                    yield ("signal", mine), words
            elif thread < len(op.get("dst_buff", ())):
                self._post(mine, ("flush", None))
                most = self.flushed[mine] + sum(kind == "flush" for kind, _ in self.posted[mine])
                while self.flushed[mine] < most:
                    yield ("flush", mine), words
            yield None
        self.running[rank] -= 1
        if not self.running[rank]:
            self._wake(("kernel", rank))

    def _channel(
        self, gpu: dict[str, Any], block: dict[str, Any], op: dict[str, Any], own: int
    ) -> tuple[int, str, int]:
        kind = op["channel_type"]
        ids = next(entry["channel_ids"] for entry in block["channels"] if entry["channel_type"] == kind)
        return gpu["id"], kind, ids[own]

    def _signal(self, channel: tuple[int, str, int]) -> None:
        self.inbound[channel] += 1
        self._wake(("signal", channel))

    def _words(self, name: str, part: dict[str, Any], thread: int, threads: int) -> range:
        """The words of a range that a thread handles, counted from the range's begin."""
        chunks = part["size"]
        shift = self.shift.setdefault((name, part["index"], chunks), self.rng.randrange(64))
        return range((thread + shift) % threads, _WORDS * chunks, threads)

    def _put(
        self,
        gpu: dict[str, Any],
        block: dict[str, Any],
        op: dict[str, Any],
        channels: list[tuple[int, str, int]],
        thread: int,
    ) -> _Steps:
        threads = self.threads[gpu["id"], block["id"]]
        kind = op["channel_type"]
        ids = next(r["remote_buffer_ids"] for r in block["remote_buffer_refs"] if r["access_channel_type"] == kind)
        for number, (source, target) in enumerate(zip(op["src_buff"], op["dst_buff"], strict=True)):
            remote = gpu["remote_buffers"][ids[target["buffer_id"]]]
            if remote["rank"] != self.partner[channels[number]][0]:
                raise ExportError(f"rank {gpu['id']} puts into rank {remote['rank']} over a channel to another")
            # The kernel takes the kind of buffer of the first source for all (line 156).
            taken = self.memory[gpu["id"], op["src_buff"][0]["type"] if kind == "memory" else source["type"]]
            given = self.memory[remote["rank"], remote["type"]]
            begin, into = _WORDS * source["index"], _WORDS * target["index"]
            if kind == "memory":
                for word in self._words("put", target, thread, threads):
                    given[into + word] = taken[begin + word]
                yield None
            elif thread == number:
                self._post(channels[number], ("copy", (taken, begin, given, into, _WORDS * source["size"])))
                if op["name"] == "pws":
                    self._post(channels[number], ("flag", self.partner[channels[number]]))

    def _reduce(self, gpu: dict[str, Any], op: dict[str, Any], thread: int, threads: int) -> _Steps:
        (target,) = op["dst_buff"]
        parts = [(self.memory[gpu["id"], part["type"]], _WORDS * part["index"]) for part in op["src_buff"]]
        result, into = self.memory[gpu["id"], target["type"]], _WORDS * target["index"]
        for word in self._words("re", target, thread, threads):
            total = sum(memory[begin + word] for memory, begin in parts)
            yield None
            result[into + word] = total

    # The proxy: each connection does in order what it was given, when it likes.

    def _post(self, channel: tuple[int, str, int], work: tuple[str, Any]) -> None:
        self.posted[channel].append(work)
        if len(self.posted[channel]) == 1:
            self._start(self._proxy(channel), late=True)

    def _proxy(self, channel: tuple[int, str, int]) -> _Steps:
        while self.posted[channel]:
            yield None
            kind, work = self.posted[channel][0]
            if kind == "copy":
                taken, begin, given, into, size = work
                given[into : into + size] = taken[begin : begin + size]
            elif kind == "flag":
                self._signal(work)
            else:
                self.flushed[channel] += 1
                self._wake(("flush", channel))
            self.posted[channel].popleft()


def _drop(pool: list[_Steps], at: int) -> None:
    pool[at] = pool[-1]
    pool.pop()
