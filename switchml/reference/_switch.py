"""The switch as a pure state machine: packets and time in, packets out.

Each slot has two versions, each with its chunk number, its epoch and the bitmap of the workers seen. A chunk number
above the one held starts the version anew: whoever sends it has the result of the chunk between, to which every
worker contributed after having this version's result, so nobody needs the old sum (SwitchML, NSDI 2021, algorithm
3, whose switch does not look at the chunk and so adds a late duplicate into a later sum). A lower number is stale
and changes a counter.
"""

from collections import Counter

import numpy as np

from trainkit.switchml import _packet as packet
from trainkit.switchml._fixed_point import SENT_TYPE, SUM_TYPE, Integers
from trainkit.switchml._membership import Address, Membership, Outgoing
from trainkit.switchml._packet import Header, Kind
from trainkit.switchml._tag import open_tagged, tagged
from trainkit.switchml.reference._round_trip import Answers, ShortestTrip


class _Version:
    """One version of one slot."""

    __slots__ = ("answered", "chunk", "elements", "epoch", "exponent", "finished", "lane", "seen", "told", "values")

    def __init__(self) -> None:
        self.chunk = -1
        self.epoch = 0
        self.seen = 0
        self.exponent = 0
        self.elements = 0
        self.lane = 0
        self.finished = 0.0
        # by worker: answers to its retransmissions, and words that it is missing
        self.answered: dict[int, Answers] = {}
        self.told: dict[int, Answers] = {}
        self.values: Integers = np.zeros(0, np.int32)


class Aggregation:
    """The slots of one epoch of one session.

    Args:
        member: what the join agreed.
        addresses: where worker r is reached, and the only source that its packets may have.
    """

    def __init__(self, member: Membership, addresses: tuple[Address, ...]) -> None:
        self.member = member
        self.addresses = addresses
        self.counters: Counter[str] = Counter()
        self.all_seen = (1 << member.world) - 1
        self.mismatched = 0
        self._trips = [ShortestTrip() for _ in range(member.world)]
        self._slots = [(_Version(), _Version()) for _ in range(member.slots)]

    def receive(self, header: Header, payload: memoryview, source: Address, now: float = 0.0) -> list[Outgoing]:
        """Take in a packet whose session, epoch and tag have been found right."""
        member = self.member
        if header.worker >= member.world or self.addresses[header.worker] != source:
            self.counters["foreign"] += 1
            return []
        if header.slot != packet.slot_field(header.chunk, member.slots) or not self._fits(header):
            self.counters["malformed"] += 1
            return []
        version = self._slots[header.chunk % member.slots][header.slot >> 15]
        held = version.chunk if version.epoch == member.epoch else -1
        if header.chunk < held:
            self.counters["stale"] += 1
            return []
        if header.kind == Kind.QUERY:
            return self._query(version, header, header.chunk == held, now)
        if header.chunk == held and version.seen >> header.worker & 1:
            return self._repeated(version, header.worker, now)
        if header.chunk == held and (header.elements, header.lane) != (version.elements, version.lane):
            self.mismatched |= 1 << header.worker
            self.counters["malformed"] += 1
            return []
        # the slot's other version: whoever sends this chunk has had its result
        before = self._slots[header.chunk % member.slots][1 - (header.slot >> 15)]
        if before.seen == self.all_seen and before.chunk + member.slots == header.chunk:
            self._trips[header.worker].sample(now - before.finished)
        self._add(version, header, payload, fresh=header.chunk > held)
        if version.seen != self.all_seen:
            return []
        version.finished = now
        self.counters["chunks"] += 1
        return [(address, self._result(version)) for address in self.addresses]

    def unfinished(self) -> int:
        """Bitmap of the workers that the lowest unfinished chunk waits for; 0 where none is."""
        waiting = [version for slot in self._slots for version in slot if 0 != version.seen != self.all_seen]
        return min(waiting, key=lambda v: v.chunk).seen ^ self.all_seen if waiting else 0

    def _fits(self, header: Header) -> bool:
        if self.member.profile == "full" and header.lane & packet.CHANNEL_MASK != self.member.channel:
            return False
        if header.kind == Kind.QUERY:
            return self.member.profile == "full"
        whole = header.elements == self.member.elements or self.member.profile == "full"
        return (
            header.kind == Kind.DATA
            and header.wire == packet.UP_BYTES[self.member.wire]
            and (header.elements == 0 or (header.elements <= self.member.elements and whole))
        )

    def _add(self, version: _Version, header: Header, payload: memoryview, fresh: bool) -> None:
        integers = np.frombuffer(payload, SENT_TYPE[self.member.wire]).astype(np.int32)
        if fresh:
            version.chunk, version.epoch, version.seen = header.chunk, self.member.epoch, 0
            version.exponent, version.elements, version.values = 0, header.elements, integers
            version.lane = header.lane
        else:
            version.values = version.values + integers
        version.seen |= 1 << header.worker
        version.exponent = max(version.exponent, header.exponent)

    def _query(self, version: _Version, header: Header, started: bool, now: float) -> list[Outgoing]:
        if started and version.seen >> header.worker & 1:
            return self._repeated(version, header.worker, now)
        if not self._due(version.answered, header.chunk, header.worker, now):
            return []
        self.counters["sent_progress"] += 1
        seen = version.seen if started else 0
        return [(self.addresses[header.worker], self._progress(header.chunk, seen, header.lane, answer=1))]

    def _due(self, answers: dict[int, Answers], chunk: int, worker: int, now: float) -> bool:
        """Whether a retransmission may be answered."""
        given = answers.get(worker)
        if given is None or given.chunk != chunk:
            given = answers[worker] = Answers(chunk)
        return given.due(self._trips[worker].value, now)

    def _repeated(self, version: _Version, worker: int, now: float) -> list[Outgoing]:
        """A retransmission: of a finished chunk the result again, else word to those who are missing."""
        self.counters["retransmissions"] += 1
        if version.seen == self.all_seen:
            due = self._due(version.answered, version.chunk, worker, now)
            return [(self.addresses[worker], self._result(version))] if due else []
        told = self._progress(version.chunk, version.seen, version.lane)
        missing = [rank for rank in range(self.member.world) if not version.seen >> rank & 1]
        missing = [rank for rank in missing if self._due(version.told, version.chunk, rank, now)]
        self.counters["sent_progress"] += len(missing)
        return [(self.addresses[rank], told) for rank in missing]

    def _result(self, version: _Version) -> bytes:
        member = self.member
        payload = version.values.astype(SUM_TYPE[member.wire]).tobytes()
        wire = packet.DOWN_BYTES[member.wire]
        return self._packet(Kind.RESULT, version.chunk, version.exponent, version.elements, wire, version.lane, payload)

    def _progress(self, chunk: int, seen: int, lane: int, answer: int = 0) -> bytes:
        wire = packet.UP_BYTES[self.member.wire]
        return self._packet(Kind.PROGRESS, chunk, answer, 0, wire, lane, seen.to_bytes(8, "big"))

    def _packet(
        self, kind: Kind, chunk: int, exponent: int, elements: int, wire: int, lane: int, payload: bytes
    ) -> bytes:
        member = self.member
        slot = packet.slot_field(chunk, member.slots)
        fields = Header(
            packet.MAGIC, kind, member.session, member.epoch, chunk, slot, packet.FROM_SWITCH,
            exponent, elements, wire, member.channel if member.profile == "core" else lane,
        )  # fmt: skip
        return tagged(packet.encode(fields, payload), member.key)


class Switch:
    """All sessions of a switch: finds the one that a packet belongs to.

    Attributes:
        counters: packets by what became of them, beyond those of each `Aggregation`.
    """

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.sessions: dict[int, Aggregation] = {}

    def install(self, member: Membership, addresses: tuple[Address, ...]) -> None:
        """Begin an epoch; the session's earlier epoch ends with it."""
        self.remove(member.session)
        self.sessions[member.session] = Aggregation(member, addresses)

    def remove(self, session: int) -> None:
        """End a session."""
        if (ended := self.sessions.pop(session, None)) is not None:
            self.counters += ended.counters

    def unfinished(self, session: int) -> int:
        """Bitmap of the workers that the lowest unfinished chunk of a session waits for; 0 where none is."""
        return self.sessions[session].unfinished() if session in self.sessions else 0

    def total(self, counter: str) -> int:
        """A counter, all sessions together."""
        return self.counters[counter] + sum(session.counters[counter] for session in self.sessions.values())

    def move(self, member: Membership, addresses: tuple[Address, ...]) -> None:
        """A worker has another address."""
        self.sessions[member.session].addresses = addresses

    def mismatched(self, session: int) -> int:
        """Bitmap of the workers whose bucket was of another number or size than that of those before them."""
        return self.sessions[session].mismatched if session in self.sessions else 0

    def receive(self, data: bytes, source: Address, now: float = 0.0) -> list[Outgoing]:
        """Take a packet in; the packets to send."""
        if len(data) < packet.HEADER_BYTES:
            self.counters["malformed"] += 1
            return []
        found = self.sessions.get(int.from_bytes(data[2:4], "big"))
        if found is None or found.member.epoch != int.from_bytes(data[4:8], "big"):
            self.counters["foreign"] += 1
            return []
        opened = open_tagged(data, found.member.key)
        parsed = packet.decode(opened) if opened is not None else None
        if parsed is None or parsed[0].kind == Kind.CONTROL:
            self.counters["forged" if opened is None else "malformed"] += 1
            return []
        return found.receive(*parsed, source, now)
