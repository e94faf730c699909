"""Sessions on the switch's side: who gathers under which name. Pure: messages and time in, messages out.

A gathering ends in two steps, so that what a killed process left behind can never be half of it: once all ranks of a
world are fresh they are offered an epoch, and only when each has confirmed that offer does the epoch begin and the
session's earlier one end.
"""

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Protocol

from trainkit.switchml import _packet as packet
from trainkit.switchml._buffers import footprint
from trainkit.switchml._control import PROTOCOL, Message
from trainkit.switchml._membership import Address, Membership

Replies = list[tuple[Address, Message]]

_FRESH = 1.5
"""Seconds after which a worker that stopped asking is no longer counted."""


class DataPlane(Protocol):
    """What a session needs of the switch that adds."""

    def install(self, member: Membership, addresses: tuple[Address, ...]) -> None:
        """Begin an epoch."""

    def remove(self, session: int) -> None:
        """End a session."""

    def unfinished(self, session: int) -> int:
        """Bitmap of the workers that the lowest unfinished chunk waits for."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a switch admits."""

    sessions: int = 64
    """Sessions at once."""
    slots: int = 512
    """Slots a session."""
    memory: int = 1 << 30
    """Bytes of slots, all sessions together."""
    idle: float = 600.0
    """Seconds of silence of all its workers after which a session is dropped."""


@dataclasses.dataclass(frozen=True)
class Programmed:
    """A session that a switch was programmed for beforehand; workers fill it, and can ask for no more."""

    number: int
    """Its number on the switch."""
    hosts: tuple[str, ...]
    """IPv4 address of rank r."""
    slots: int
    """Most slots, a power of two."""
    elements: int
    """Elements a packet."""


@dataclasses.dataclass
class _Candidate:
    rank: int
    nonce: str
    source: Address
    seen: float
    elements: int
    slots: int
    wire: str
    profile: str
    lanes: int


@dataclasses.dataclass
class _Gathering:
    """An epoch, offered or begun."""

    member: Membership
    salt: str
    nonces: tuple[str, ...]
    addresses: tuple[Address, ...]
    heard: list[float]
    ports: tuple[int, ...]
    ready: set[int] = dataclasses.field(default_factory=set)
    left: set[int] = dataclasses.field(default_factory=set)
    aborted: Message | None = None

    def place(self, op: str) -> Message:
        member = self.member
        agreed = {
            f.name: getattr(member, f.name) for f in dataclasses.fields(member) if f.name not in ("worker", "key")
        }
        return {"op": op, "salt": self.salt, "ports": self.ports, **agreed}


@dataclasses.dataclass
class _Session:
    number: int
    candidates: dict[tuple[int, int], _Candidate] = dataclasses.field(default_factory=dict)
    offer: _Gathering | None = None
    active: _Gathering | None = None


class Sessions:
    """All sessions of one switch.

    Args:
        plane: the switch that adds.
        token: shared secret; empty without.
        receive_buffer: bytes of the switch's socket; packets in flight never fill more than half of it.
        limits: what is admitted.
        programmed: the sessions of a switch that knows no others, by name; None takes any.
        lane: of which lane of its sessions this switch is.
        ports: where the workers of a session find its lanes.
        core: it takes profile "core" only.
    """

    def __init__(
        self,
        plane: DataPlane,
        token: bytes,
        receive_buffer: int,
        limits: Limits | None = None,
        programmed: Mapping[str, Programmed] | None = None,
        lane: int = 0,
        ports: tuple[int, ...] = (),
        core: bool = False,
    ) -> None:
        self._lane, self._ports, self._core = lane, ports, core or programmed is not None
        self._plane, self._token, self._receive_buffer = plane, token, receive_buffer
        self._limits, self._programmed = limits or Limits(), programmed
        self._sessions: dict[str, _Session] = {}
        self._epoch = secrets.randbits(31)

    def receive(self, message: Message, source: Address, now: float) -> Replies:
        """Take a message in; the messages to send."""
        if message["op"] == "join":
            return self._join(message, source, now)
        found = self._find(message, source)
        if found is None:
            return [(source, {"op": "lost", "epoch": message.get("epoch"), "number": message.get("number")})]
        session, gathering, rank = found
        gathering.heard[rank] = now
        if message["op"] == "ready":
            return self._ready(session, gathering, rank, now)
        if message["op"] == "ping":
            return [(source, gathering.aborted or self._pong(gathering, now))]
        if message["op"] == "abort" and gathering.aborted is None:
            return self._abort(gathering, str(message.get("why"))[:500], message.get("ranks"))
        if message["op"] == "leave":
            gathering.left.add(rank)
            if gathering is session.active and len(gathering.left) == gathering.member.world:
                self._plane.remove(session.number)
                session.active = None
        return []

    def sweep(self, now: float) -> None:
        """Drop the sessions of which nobody has been heard for long."""
        for name, session in list(self._sessions.items()):
            heard = [candidate.seen for candidate in session.candidates.values()]
            for gathering in (session.offer, session.active):
                heard += gathering.heard if gathering else []
            if not heard or now - max(heard) > (self._limits.idle if session.active else _FRESH):
                self._plane.remove(session.number)
                del self._sessions[name]

    def table(self, now: float) -> list[Message]:
        """A row a session: name, epoch, world, agreed sizes, seconds since each worker was heard."""
        return [
            {**session.active.place("row"), "session": name, "silent": self._silent(session.active, now)}
            for name, session in self._sessions.items()
            if session.active
        ]

    def _find(self, message: Message, source: Address) -> tuple[_Session, _Gathering, int] | None:
        number, epoch, rank = (message.get(key) for key in ("number", "epoch", "rank"))
        for session in self._sessions.values():
            for gathering in (session.active, session.offer):
                if gathering is None or (session.number, gathering.member.epoch) != (number, epoch):
                    continue
                if isinstance(rank, int) and 0 <= rank < gathering.member.world and gathering.addresses[rank] == source:
                    return session, gathering, rank
        return None

    def _join(self, message: Message, source: Address, now: float) -> Replies:
        name = message.get("session")
        why = _refusal(message)
        if why is None and self._core and message["profile"] != "core":
            why = f"profile {message['profile']}: this switch adds in hardware or in the kernel, give profile='core'"
        if why is None and self._programmed is not None:
            why = self._unprogrammed(message, source)
        if why is None and name not in self._sessions and len(self._sessions) >= self._limits.sessions:
            self.sweep(now)
            if len(self._sessions) >= self._limits.sessions:
                why = f"the switch has its {self._limits.sessions} sessions already: end one, or start another switch"
        nonce = message.get("nonce")
        if why is not None:
            return [(source, {"op": "refused", "nonce": nonce, "why": why})]
        session = self._sessions.setdefault(str(name), _Session(self._number(str(name))))
        rank, world = message["rank"], message["world"]
        active = session.active
        if active and active.member.world == world and active.nonces[rank] == nonce:
            return [(source, active.place("go"))]
        candidate = _Candidate(
            rank, str(nonce), source, now, message["elements"], message["slots"], message["wire"], message["profile"],
            message.get("lanes", 1),
        )  # fmt: skip
        session.candidates[world, rank] = candidate
        for key, other in list(session.candidates.items()):
            if now - other.seen > _FRESH:
                del session.candidates[key]
        ranks = [session.candidates.get((world, r)) for r in range(world)]
        present = [other for other in ranks if other is not None]
        if len(present) < world or (conflict := _conflict(present)):
            why = conflict if len(present) == world else _other_world(session, world)
            seen = [other.rank for other in present]
            return [(source, {"op": "wait", "nonce": nonce, "seen": seen, "why": why})]
        if session.offer and session.offer.nonces == tuple(other.nonce for other in present):
            return [(source, session.offer.place("offer"))]
        try:
            session.offer = self._offer(session.number, present, now)
        except ValueError as error:
            return [(source, {"op": "refused", "nonce": nonce, "why": str(error)})]
        return [(address, session.offer.place("offer")) for address in session.offer.addresses]

    def _offer(self, number: int, present: list[_Candidate], now: float) -> _Gathering:
        world = len(present)
        wanted = [(candidate.elements, candidate.slots) for candidate in present]
        for programmed in (self._programmed or {}).values():
            if programmed.number == number:
                wanted.append((programmed.elements, programmed.slots))
        elements = min(pair[0] for pair in wanted)
        room = self._receive_buffer // 2 // (world * footprint(4 * elements))
        slots = max(1, min(room, self._limits.slots, *(pair[1] for pair in wanted)))
        if present[0].profile == "core":  # hardware finds a slot by the low bits of the chunk
            slots = 1 << slots.bit_length() - 1
        taken = sum(_memory(s.active.member) for s in self._sessions.values() if s.active and s.number != number)
        self._epoch = (self._epoch + 1) % 2**32
        member = Membership(
            number, self._epoch, world, 0, slots, elements, present[0].wire, present[0].profile, self._lane
        )
        if taken + _memory(member) > self._limits.memory:
            raise ValueError(
                f"{_memory(member)} bytes of slots for {slots} slots of {elements} elements, but the switch has "
                f"{self._limits.memory - taken} left: ask for fewer slots"
            )
        addresses = tuple(candidate.source for candidate in present)
        nonces = tuple(candidate.nonce for candidate in present)
        ports = self._ports[: min(candidate.lanes for candidate in present)]
        return _Gathering(member, secrets.token_hex(16), nonces, addresses, [now] * world, ports)

    def _ready(self, session: _Session, gathering: _Gathering, rank: int, now: float) -> Replies:
        if gathering is session.active:
            return [(gathering.addresses[rank], gathering.place("go"))]
        if (candidate := session.candidates.get((gathering.member.world, rank))) is not None:
            candidate.seen = now
        gathering.ready.add(rank)
        if len(gathering.ready) < gathering.member.world:
            return []
        session.active, session.offer = gathering, None
        session.candidates.clear()
        self._plane.install(gathering.member.with_key(self._token, gathering.salt), gathering.addresses)
        return [(address, gathering.place("go")) for address in gathering.addresses]

    def _pong(self, gathering: _Gathering, now: float) -> Message:
        missing = self._plane.unfinished(gathering.member.session)
        return {
            "op": "pong",
            "epoch": gathering.member.epoch,
            "silent": self._silent(gathering, now),
            "left": sorted(gathering.left),
            "missing": [rank for rank in range(gathering.member.world) if missing >> rank & 1],
        }

    def _silent(self, gathering: _Gathering, now: float) -> list[float]:
        return [round(now - heard, 3) for heard in gathering.heard]

    def _abort(self, gathering: _Gathering, why: str, ranks: object) -> Replies:
        named = [rank for rank in ranks if isinstance(rank, int)][:64] if isinstance(ranks, list) else []
        gathering.aborted = {"op": "aborted", "epoch": gathering.member.epoch, "why": why, "ranks": named}
        return [(address, gathering.aborted) for address in gathering.addresses]

    def _unprogrammed(self, message: Message, source: Address) -> str | None:
        """Why a switch that was programmed beforehand cannot take a join."""
        assert self._programmed is not None
        name, rank = message["session"], message["rank"]
        session = self._programmed.get(name)
        if session is None:
            return f"session {name!r} is not one of {', '.join(self._programmed)}: deploy it, or name one of these"
        if message["world"] != len(session.hosts):
            return f"world size {message['world']}, session {name!r} was deployed for {len(session.hosts)} workers"
        if message["elements"] < session.elements:
            return f"{message['elements']} elements, session {name!r} was deployed for {session.elements}"
        if not (isinstance(source, tuple) and source[0] == session.hosts[rank]):
            return f"rank {rank} of session {name!r} was deployed for host {session.hosts[rank]}, this one is {source}"
        return None

    def _number(self, name: str) -> int:
        if self._programmed is not None:
            return self._programmed[name].number
        taken = {session.number for session in self._sessions.values()}
        return next(number for number in range(len(taken) + 1) if number not in taken)


def _memory(member: Membership) -> int:
    return 2 * member.slots * member.elements * 4


def _refusal(message: Message) -> str | None:
    """Why a join cannot be taken, whoever else there is."""
    if message.get("v") != PROTOCOL:
        return f"protocol {message.get('v')!r}, the switch speaks {PROTOCOL}: install the same trainkit on all hosts"
    rank, world, elements, slots = numbers = [message.get(key) for key in ("rank", "world", "elements", "slots")]
    name, nonce, wire = (message.get(key) for key in ("session", "nonce", "wire"))
    profile = packet.PROFILES.get(str(message.get("profile")))
    if profile is None or not isinstance(nonce, str) or any(type(number) is not int for number in numbers):
        return "a join lacks a field or has one of the wrong type"
    assert rank is not None and world is not None and elements is not None and slots is not None
    if type(message.get("lanes", 1)) is not int or message.get("lanes", 1) < 1:
        return "lanes are 1 or more"
    if not isinstance(name, str) or not 0 < len(name) <= 64 or len(nonce) > 64:
        return "a session's name has 1 to 64 characters"
    if not 1 <= world <= profile.workers or not 0 <= rank < world:
        return f"rank {rank} of world size {world}: at most {profile.workers} workers, ranks 0 to world size - 1"
    if not profile.allows(elements) or wire not in profile.wires or not 1 <= slots <= packet.SLOT_MASK + 1:
        return f"{elements} elements, wire {wire}, {slots} slots: profile {profile.name} has {profile.elements}, {profile.wires}"
    return None


def _conflict(present: list[_Candidate]) -> str | None:
    for what in ("wire", "profile"):
        said = [getattr(candidate, what) for candidate in present]
        if len(set(said)) > 1:
            return f"the ranks say {what} {said}: give all the same"
    return None


def _other_world(session: _Session, world: int) -> str | None:
    for (other, rank), _ in session.candidates.items():
        if other != world:
            return f"rank {rank} of this session says world size {other}, this worker says {world}: give all the same"
    return None
