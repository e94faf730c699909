"""The workers of one session finding together: who asks, what is offered, who has confirmed it."""

import dataclasses
import secrets
from typing import Any

from trainkit.switchml import _control as control
from trainkit.switchml import _packet as packet
from trainkit.switchml._control import PROTOCOL, Message
from trainkit.switchml._membership import Address, Membership, Outgoing
from trainkit.switchml._packet import FROM_SWITCH
from trainkit.switchml._text import shown

FRESH = 1.5
"""Seconds after which a worker that stopped asking is no longer counted."""


@dataclasses.dataclass
class Candidate:
    """A worker that asks to join."""

    rank: int
    nonce: str
    source: Address
    seen: float
    made: float
    """When its cookie was made: of two who claim a rank, the later one counts."""
    elements: int
    slots: int
    wire: str
    profile: str
    channels: int


@dataclasses.dataclass
class Epoch:
    """An epoch, offered or begun."""

    member: Membership
    salt: str
    said: str
    nonces: tuple[str, ...]
    addresses: list[Address]
    heard: list[float]
    ports: tuple[int, ...]
    pinged: list[int]
    ready: set[int] = dataclasses.field(default_factory=set)
    left: set[int] = dataclasses.field(default_factory=set)
    ended: Message | None = None
    """What its workers are told instead: it was aborted, or could not begin."""

    def offer(self, rank: int) -> Message:
        """What rank `rank` is told of it."""
        hidden = ("worker", "key", "control")
        agreed = {f.name: getattr(self.member, f.name) for f in dataclasses.fields(Membership) if f.name not in hidden}
        return {"op": "offer", "nonce": self.nonces[rank], "salt": self.salt, "said": self.said, **agreed}

    def to(self, address: Address, message: Message) -> Outgoing:
        """A message of this epoch."""
        of = control.Place(self.member.session, self.member.epoch, FROM_SWITCH)
        return address, control.encode(message, self.member.control, of=of)

    def silent(self, now: float) -> list[float]:
        """Seconds since each worker was heard."""
        return [round(now - heard, 2) for heard in self.heard]


@dataclasses.dataclass
class Session:
    """All that goes on under one name of one job."""

    name: str
    job: str
    number: int = -1
    """On the switch; -1 until it is offered an epoch."""
    candidates: dict[tuple[int, int], Candidate] = dataclasses.field(default_factory=dict)
    offer: Epoch | None = None
    active: Epoch | None = None

    def last_heard(self) -> float:
        """When any of its workers was heard last; seconds."""
        heard = [candidate.seen for candidate in self.candidates.values()]
        for epoch in (self.offer, self.active):
            heard += epoch.heard if epoch else []
        return max(heard, default=float("-inf"))

    def sources(self) -> list[Address]:
        """Where its workers are: those of its epoch, else those who ask."""
        return list(self.active.addresses) if self.active else [c.source for c in self.candidates.values()]

    def take(self, candidate: Candidate, world: int, now: float) -> bool:
        """Count a worker in; False where a later join of the same rank is known already."""
        known = self.candidates.get((world, candidate.rank))
        if known is not None and known.made > candidate.made:
            return False
        self.candidates[world, candidate.rank] = candidate
        for key, other in list(self.candidates.items()):
            if now - other.seen > FRESH:
                del self.candidates[key]
        return True

    def present(self, world: int) -> list[Candidate]:
        """The ranks of a world that ask now."""
        ranks = (self.candidates.get((world, rank)) for rank in range(world))
        return [candidate for candidate in ranks if candidate is not None]

    def other_world(self, world: int) -> str | None:
        """Who says that the session has another size."""
        for other, rank in self.candidates:
            if other != world:
                return (
                    f"rank {rank} of this session says world size {other}, this worker says {world}: give all the same"
                )
        return None

    def offered(
        self,
        number: int,
        present: list[Candidate],
        slots: int,
        elements: int,
        channel: int,
        ports: tuple[int, ...],
        now: float,
    ) -> Epoch:
        """A new epoch for these workers, without its keys and with a number to be told apart by."""
        first = present[0]
        nonces = tuple(candidate.nonce for candidate in present)
        member = Membership(self.number, number, len(present), 0, slots, elements, first.wire, first.profile, channel)
        return Epoch(
            member=member,
            salt=secrets.token_hex(16),
            said=control.digest(self.name, self.job, nonces),
            nonces=nonces,
            addresses=[candidate.source for candidate in present],
            heard=[now] * len(present),
            ports=ports[: min(candidate.channels for candidate in present)],
            pinged=[-1] * len(present),
        )


def refusal(message: Message) -> str | None:
    """Why a join cannot be taken, whoever else there is."""
    fields: dict[str, Any] = {name: message.get(name) for name in ("rank", "world", "elements", "slots", "channels")}
    name, job, nonce, wire = (message.get(key) for key in ("session", "job", "nonce", "wire"))
    profile = packet.PROFILES.get(str(message.get("profile")))
    texts = (name, job, nonce, wire)
    if profile is None or any(type(n) is not int for n in fields.values()) or any(type(t) is not str for t in texts):
        return "a join lacks a field or has one of the wrong type"
    rank, world, elements, slots, channels = fields.values()
    if not 0 < len(str(name)) <= 64 or len(str(nonce)) > 64 or len(str(job)) > 64:
        return "a session's name has 1 to 64 characters"
    if channels < 1:
        return f"{channels} channels: at least 1"
    if not 1 <= world <= profile.workers or not 0 <= rank < world:
        return f"rank {rank} of world size {world}: at most {profile.workers} workers, ranks 0 to world size - 1"
    if not profile.allows(elements) or wire not in profile.wires or not 1 <= slots <= packet.SLOT_MASK + 1:
        return (
            f"{elements} elements, wire {shown(wire, 20)}, {slots} slots: profile {profile.name} has {profile.sizes}, "
            f"{', '.join(profile.wires)}"
        )
    return None


def protocol_refusal(message: Message) -> str | None:
    """Why a worker of another version cannot join."""
    if message.get("v") == PROTOCOL:
        return None
    return f"protocol {shown(message.get('v'), 20)}, the switch speaks {PROTOCOL}: install the same trainkit"


def conflict(present: list[Candidate]) -> str | None:
    """What the ranks do not agree on."""
    for what in ("wire", "profile"):
        said = [getattr(candidate, what) for candidate in present]
        if len(set(said)) > 1:
            return f"the ranks say {what} {', '.join(map(str, said))}: give all the same"
    return None
