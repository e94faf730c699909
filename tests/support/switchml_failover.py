"""The adversary against a failover: sessions that die, buckets that another path reduces, sessions taken back.

Each rank keeps its books in the product's `Ledger`; the sessions are simulated, as in switchml_adversary.py. What a
process group would do between two sessions (exchange counts, serve averages, reduce a bucket) is done here at once.
"""

import random
from concurrent.futures import Future
from typing import Any

import numpy as np
from switchml_adversary import Adversary, Net, agreement, reference

from trainkit.switchml._ledger import Job, Ledger
from trainkit.switchml._membership import Membership


class _Rank:
    """One rank's books, and its half of the session there is now."""

    def __init__(self, values: list[np.ndarray]) -> None:
        self.ledger = Ledger()
        self.memory = [own.copy() for own in values]  # averaged in place, as gradients are
        self.submitted = 0
        self.worker: Any = None
        self.futures: list[Future[None]] = []
        self.packets: list[bytes] = []
        self.clock = 0.0

    def submit(self, values: np.ndarray, out: np.ndarray, residual: Any = None, index: Any = None) -> "Future[None]":
        self.packets += self.worker.submit(values, out, self.clock)
        self.futures.append(Future())
        return self.futures[-1]

    def take(self) -> None:
        """The next bucket comes from the backward pass."""
        own = self.memory[self.submitted]
        self.submitted += 1
        job = self.ledger.add(own, own, None, None)
        if self.worker is not None:
            self.ledger.forward(job, self)

    def finish(self) -> None:
        """Buckets that the session has finished, in order; and those that all ranks have."""
        done = self.worker.finished
        for future in self.futures[:done]:
            if not future.done():
                future.set_result(None)
        while (job := self.head()) is not None and job.sent is not None and job.sent.done():
            self.ledger.complete(job)

    def head(self) -> Job | None:
        return self.ledger.open.get(self.ledger.finished)


class _Session:
    """One epoch over the ranks' books."""

    def __init__(self, net: Net, member: Membership, ranks: list[_Rank], buckets: int) -> None:
        self.net, self.member, self.ranks, self.buckets = net, member, ranks, buckets
        self.addresses = tuple((f"10.0.{member.epoch % 256}.{rank}", 4000) for rank in range(member.world))
        self.open = True
        net.switch.install(member, self.addresses)
        for number, rank in enumerate(ranks):
            rank.worker, rank.futures, rank.packets = net.make_worker(member.as_worker(number)), [], []
            rank.clock = net.clock
            rank.ledger.forward_all(rank)
            self._flush(number)
            at = net.clock
            for _ in range(buckets - rank.submitted):
                at += net.seeded.choice([0.0, 0.0, net.seeded.random() * 0.05])
                net.at(at, lambda now, n=number: self._takes(n, now))

    def _takes(self, number: int, now: float) -> None:
        rank = self.ranks[number]
        if self.open and rank.submitted < self.buckets:
            rank.clock = now
            rank.take()
            self._flush(number)

    def _flush(self, number: int) -> None:
        packets, self.ranks[number].packets = self.ranks[number].packets, []
        self._sends(number, packets)

    def _sends(self, number: int, packets: list[bytes]) -> None:
        for data in packets:
            self.net.carry(lambda now, data=data: self._switched(data, self.addresses[number]))
        due = self.ranks[number].worker.due()
        if self.open and due is not None:
            self.net.at(max(due, self.net.clock + 1e-6), lambda now: self._polls(number, now))

    def _polls(self, number: int, now: float) -> None:
        due = self.ranks[number].worker.due() if self.open else None
        if due is not None and due <= now:
            self._sends(number, self.ranks[number].worker.poll(now))

    def _switched(self, data: bytes, source: Any) -> None:
        for address, answer in self.net.switch.receive(data, source, self.net.clock):
            if address in self.addresses:  # an answer to an epoch of the past finds nobody
                number = self.addresses.index(address)
                self.net.carry(lambda now, n=number, a=answer: self._answered(n, a, now))

    def _answered(self, number: int, answer: bytes, now: float) -> None:
        if self.open:
            self._sends(number, self.ranks[number].worker.receive(answer, now))

    def done(self) -> bool:
        return all(r.submitted == self.buckets and r.worker.finished == len(r.futures) for r in self.ranks)

    def end(self) -> None:
        """The link fails on all ranks; what each has finished by now it has."""
        self.open = False
        for rank in self.ranks:
            rank.finish()
            slots, low = self.member.slots, rank.worker.low_water_mark
            if low >= slots and low - slots >= rank.worker.next_number:
                rank.ledger.acknowledge(len(rank.futures))
            rank.worker = None


def _agree(ranks: list[_Rank]) -> None:
    """What `Failover._agree` does over its process group."""
    source, numbers = ranks[0].ledger.owed([rank.ledger.finished for rank in ranks])
    for number in numbers:
        average = ranks[source].ledger.average(number).copy()
        for rank in ranks:
            if (job := rank.ledger.open.get(number)) is not None:
                job.out[:] = average
                rank.ledger.complete(job)


def _reduce(ranks: list[_Rank], reduced: set[int]) -> None:
    """All ranks' next bucket, by a process group: from the kept originals."""
    while any(rank.head() is None for rank in ranks):
        for rank in ranks:
            if rank.head() is None:
                rank.take()
    jobs = [rank.head() for rank in ranks]
    average = np.mean([job.original for job in jobs if job is not None], axis=0, dtype=np.float32)
    for rank, job in zip(ranks, jobs, strict=True):
        assert job is not None
        job.out[:] = average
        rank.ledger.all_equal()
        rank.ledger.complete(job)
        reduced.add(job.number)


def failover(core: str, seed: int) -> int:
    """One run with at least one fall-back; raises where an average is not exact. How often the switch was taken back."""
    seeded, numbers = random.Random(seed), np.random.default_rng(seed)
    world, slots, elements = seeded.randint(1, 4), seeded.randint(1, 4), 4
    sizes = [seeded.choice([1, 3, 4, 5, 16, 17, 40]) for _ in range(seeded.randint(2, 6))]
    buckets = [[numbers.standard_normal(size).astype(np.float32) * 100 for _ in range(world)] for size in sizes]
    net = Net(core, Adversary(*(seeded.random() * seeded.choice([0.02, 0.3]) for _ in range(3))), seeded)
    ranks = [_Rank([values[rank] for values in buckets]) for rank in range(world)]
    member = Membership(1, seeded.randrange(1, 2**31), world, slots=slots, elements=elements)
    reduced: set[int] = set()
    back = 0
    for attempt in range(seeded.randint(1, 3)):
        epoch = Membership(1, member.epoch + attempt, world, slots=slots, elements=elements)
        session = _Session(net, epoch, ranks, len(sizes))
        net.run(session.done, limit=seeded.random() * 0.06)
        session.end()
        _agree(ranks)
        for _ in range(seeded.randint(0, 2)):
            if ranks[0].ledger.finished < len(sizes):
                _reduce(ranks, reduced)
        back += attempt > 0
    session = _Session(net, Membership(1, member.epoch + 9, world, slots=slots, elements=elements), ranks, len(sizes))
    net.run(session.done, limit=120.0)
    assert session.done(), "a worker hangs"
    session.end()
    wanted = reference(buckets, member, agreement(buckets, member))
    for number, values in enumerate(buckets):
        right = np.mean(values, axis=0, dtype=np.float32) if number in reduced else wanted[number]
        for rank in ranks:
            same = np.array_equal(rank.memory[number].view(np.int32), right.view(np.int32))
            assert same, f"bucket {number}: {rank.memory[number]} for {right}"
            assert rank.ledger.finished == len(sizes)
    return back + 1
