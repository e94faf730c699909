"""A seeded adversary that drops, duplicates, reorders, delays, crashes and restarts, and a network for it."""

import dataclasses
import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainkit.switchml import _native
from trainkit.switchml import _packet as packet
from trainkit.switchml._fixed_point import block_exponents, dequantise, quantise
from trainkit.switchml._membership import Membership
from trainkit.switchml._packet import Kind
from trainkit.switchml.reference import Switch, Worker

Buckets = list[list[np.ndarray]]  # [bucket][rank]


@dataclass(frozen=True)
class Adversary:
    """What happens to each packet, and to whom a crash happens."""

    drop: float
    duplicate: float
    late: float
    """Chance of a delay of many round trips."""
    crash: str | None = None

    @classmethod
    def drawn(cls, seeded: random.Random) -> "Adversary":
        """Calm to wild; a crash in a third of the schedules."""
        worst = seeded.choice([0.0, 0.02, 0.1, 0.3])
        crash = seeded.choice([None, None, None, None, "worker", "switch"])
        return cls(*(seeded.random() * worst for _ in range(3)), crash=crash)


class PublishedSwitch:
    """NSDI 2021, algorithm 3: the version bit alone tells two chunks of a slot apart."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()

    def install(self, member: Membership, addresses: tuple[Any, ...]) -> None:
        self.member, self.addresses = member, addresses
        self.seen = np.zeros((2, member.slots), np.int64)
        self.count = np.zeros((2, member.slots), np.int64)
        self.pool: dict[tuple[int, int], tuple[np.ndarray, int]] = {}

    def receive(self, data: bytes, source: Any, now: float = 0.0) -> list[tuple[Any, bytes]]:
        decoded = packet.decode(data)
        assert decoded is not None
        header, payload = decoded
        version, slot, bit = header.slot >> 15, header.slot & packet.SLOT_MASK, 1 << header.worker
        values = np.frombuffer(payload, ">i4").astype(np.int32)
        if self.seen[version, slot] & bit:
            if self.count[version, slot] == 0:
                return [(self.addresses[header.worker], self._result(header, version, slot))]
            return []
        first = self.seen[version, slot] == 0
        self.seen[version, slot] |= bit
        self.seen[version ^ 1, slot] &= ~bit
        if self.count[version, slot] == 0:
            self.count[version, slot] = self.member.world
        if first:
            self.pool[version, slot] = values, header.exponent
        else:
            held, exponent = self.pool[version, slot]
            values = held + values if held.size == values.size else values
            self.pool[version, slot] = values, max(exponent, header.exponent)
        self.count[version, slot] -= 1
        if self.count[version, slot]:
            return []
        result = self._result(header, version, slot)
        return [(address, result) for address in self.addresses]

    def _result(self, header: packet.Header, version: int, slot: int) -> bytes:
        values, exponent = self.pool[version, slot]
        answer = header._replace(kind=Kind.RESULT, worker=packet.FROM_SWITCH, exponent=exponent, elements=values.size)
        return packet.encode(answer, values.astype(">i4").tobytes())


CORES: dict[str, tuple[Callable[[Membership], Any], Callable[[], Any]]] = {
    "python": (Worker, Switch),
    "native": (_native.Worker, _native.Switch),
    "published": (Worker, PublishedSwitch),
}


def agreement(buckets: Buckets, member: Membership) -> list[np.ndarray]:
    """The exponent bytes of each bucket's chunks that all ranks must come to."""
    return [np.max([block_exponents(own, member.elements) for own in values], axis=0, initial=0) for values in buckets]


def reference(buckets: Buckets, member: Membership, agreed: list[np.ndarray]) -> list[np.ndarray]:
    """What every rank must get, by integer sums of whole chunks."""
    averages = []
    for values, exponents in zip(buckets, agreed, strict=True):
        average = np.empty_like(values[0])
        for chunk, exponent in enumerate(exponents):
            span = slice(chunk * member.elements, (chunk + 1) * member.elements)
            wanted = int(exponent), member.world, member.wire
            sums = np.sum([quantise(own[span], *wanted) for own in values], axis=0, dtype=np.int64)
            average[span] = dequantise(sums.astype(np.int32), *wanted)
        averages.append(average)
    return averages


class Net:
    """n workers and a switch on a simulated network; time only passes between events."""

    def __init__(self, core: str, adversary: Adversary, seeded: random.Random) -> None:
        self.make_worker, make_switch = CORES[core]
        self.switch = make_switch()
        self.adversary, self.seeded = adversary, seeded
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.order = 0
        self.clock = 0.0

    def at(self, time: float, event: Callable[[float], None]) -> None:
        self.order += 1
        heapq.heappush(self.events, (time, self.order, event))

    def carry(self, deliver: Callable[[float], None]) -> None:
        fate = self.adversary
        copies = (self.seeded.random() >= fate.drop) + (self.seeded.random() < fate.duplicate)
        for _ in range(copies):
            late = self.seeded.expovariate(1 / 0.3) if self.seeded.random() < fate.late else 0.0
            self.at(self.clock + 0.001 * self.seeded.uniform(1, 1.5) + late, deliver)

    def gather(self, member: Membership, buckets: Buckets, guesses: list[np.ndarray]) -> "Gathering":
        return Gathering(self, member, buckets, guesses)

    def run(self, until: Callable[[], bool], limit: float) -> None:
        limit += self.clock
        while self.events and not until() and self.events[0][0] < limit:
            self.clock, _, event = heapq.heappop(self.events)
            event(self.clock)


class Gathering:
    """One epoch: workers that submit the same buckets at their own times."""

    def __init__(self, net: Net, member: Membership, buckets: Buckets, guesses: list[np.ndarray]) -> None:
        self.net, self.member = net, member
        self.addresses = tuple((f"10.0.{member.epoch % 256}.{rank}", 4000) for rank in range(member.world))
        self.workers = [net.make_worker(member.as_worker(rank)) for rank in range(member.world)]
        self.alive = [True] * member.world
        self.sums = [[np.full_like(values[0], 7) for values in buckets] for _ in range(member.world)]
        self.buckets = [[own.copy() for own in values] for values in buckets]
        self.guesses = guesses
        self.known = [[guess.copy() for guess in guesses] for _ in range(member.world)]
        net.switch.install(member, self.addresses)
        for rank in range(member.world):
            time = net.clock
            for number in range(len(buckets)):
                time += net.seeded.choice([0.0, 0.0, net.seeded.random() * 0.05])
                net.at(time, self._submits(rank, number))

    def _submits(self, rank: int, number: int) -> Callable[[float], None]:
        return lambda now: self._sends(
            rank,
            self.workers[rank].submit(
                self.buckets[number][rank], self.sums[rank][number], now, known=self.known[rank][number]
            ),
        )

    def _sends(self, rank: int, packets: list[bytes]) -> None:
        worker = self.workers[rank]
        if not self.alive[rank]:
            return
        assert worker.in_flight <= self.member.slots
        for data in packets:
            self.net.carry(lambda now, data=data: self._switched(data, self.addresses[rank]))
        due = worker.due()
        if due is not None:
            self.net.at(max(due, self.net.clock + 1e-6), lambda now: self._polls(rank, now))

    def _polls(self, rank: int, now: float) -> None:
        due = self.workers[rank].due()
        if due is not None and due <= now:
            self._sends(rank, self.workers[rank].poll(now))

    def _switched(self, data: bytes, source: Any) -> None:
        for address, answer in self.net.switch.receive(data, source, self.net.clock):
            if address in self.addresses:  # an answer to an epoch of the past finds nobody
                rank = self.addresses.index(address)
                self.net.carry(lambda now, r=rank, a=answer: self._sends(r, self.workers[r].receive(a, now)))

    def done(self) -> bool:
        return all(worker.finished == len(self.buckets) for worker in self.workers)


def guessed(agreed: list[np.ndarray], seeded: random.Random) -> list[np.ndarray]:
    """A guess of each bucket's exponents: none, right, close or wild."""
    guesses = []
    for exponents in agreed:
        off = seeded.choice([None, 0, 0, 1, 6, 300])
        drawn = [0 if off is None else int(e) + seeded.randint(-off, off) for e in exponents]
        guesses.append(np.clip(drawn, 0, 255).astype(np.uint8))
    return guesses


def schedule(
    core: str,
    seed: int,
    wire: str = "int32",
    profile: str | None = None,
    adversary: Adversary | None = None,
    elements: int = 4,
    slots: int | None = None,
) -> None:
    """One run; raises where a sum is wrong, a worker hangs or a failure has no name."""
    seeded = random.Random(seed)
    numbers = np.random.default_rng(seed)
    profile = profile or seeded.choice(["core", "full"] if wire == "int32" else ["full"])
    member = Membership(
        session=seeded.randrange(4), epoch=seeded.randrange(2**32), world=seeded.randint(1, 5),
        slots=seeded.randint(1, 4), elements=elements, wire=wire, profile=profile,
        key=seeded.randbytes(32) if core != "published" and seeded.random() < 0.3 and profile == "full" else b"",
    )  # fmt: skip
    member = dataclasses.replace(member, slots=slots or member.slots)
    sizes = [elements * seeded.choice([0, 1, 3, 4, 5, 16, 17, 40]) // 4 for _ in range(seeded.randint(1, 3))]
    buckets = [
        [
            (numbers.standard_normal(size) * 10.0 ** numbers.integers(-30, 30)).astype(np.float32)
            for _ in range(member.world)
        ]
        for size in sizes
    ]
    if seeded.random() < 0.1 and sizes[0]:
        buckets[0][0][0] = seeded.choice([np.nan, np.inf, -np.inf])
    net = Net(core, adversary or Adversary.drawn(seeded), seeded)
    agreed = agreement(buckets, member)
    gathering = net.gather(member, buckets, guessed(agreed, seeded))
    if net.adversary.crash is not None:
        net.run(gathering.done, limit=seeded.random() * 0.05)
        gathering = _crashed(net, gathering, buckets)
    net.run(gathering.done, limit=120.0)
    assert gathering.done(), "a worker hangs"
    wanted = reference(buckets, member, agreed)
    for rank, (sums, known) in enumerate(zip(gathering.sums, gathering.known, strict=True)):
        for number in range(len(buckets)):
            same = np.array_equal(sums[number].view(np.int32), wanted[number].view(np.int32))
            assert same, f"rank {rank} has other bits in bucket {number}"
            assert np.array_equal(known[number], agreed[number]), f"rank {rank} knows other exponents"


def _crashed(net: Net, gathering: Gathering, buckets: Buckets) -> Gathering:
    """Crash, see that the missing are named, gather anew on the same switch with old packets still on their way."""
    member = gathering.member
    if net.adversary.crash == "worker":
        dead = net.seeded.randrange(member.world)
        gathering.alive[dead] = False
        ended = gathering.workers[dead].finished == len(buckets)
        net.run(gathering.done, limit=20.0)
        named = net.switch.unfinished(member.session)
        # whoever hangs, hangs for the dead one alone: the switch names it, or never heard of it
        if any(w.finished < len(buckets) for r, w in enumerate(gathering.workers) if r != dead):
            assert named in (0, 1 << dead), "somebody else is blamed"
            assert not ended
    else:
        net.switch = type(net.switch)()
    fresh = Membership(**{**member.__dict__, "epoch": (member.epoch + 1) % 2**32})
    return net.gather(fresh, buckets, gathering.guesses)
