"""Sessions on the switch's side: who meets under which name. Pure: packets and time in, packets out.

A rendezvous ends in two steps, so that what a killed process left behind, or a recorder plays again, can never be half
of it: once all ranks of a world are fresh they are offered an epoch, and only when each has confirmed that offer, under
a key that only this epoch has, does it begin and the session's earlier one end.

Nothing is remembered and next to nothing is sent for an address that has not been proven (`_cookie.py`).
"""

import contextlib
import ipaddress
import json
import logging
import secrets
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from trainkit.switchml import _control as control
from trainkit.switchml import _packet as packet
from trainkit.switchml._buffers import truesize
from trainkit.switchml._control import SWITCH, Message
from trainkit.switchml._cookie import Cookies
from trainkit.switchml._limits import Limits, Preconfigured
from trainkit.switchml._membership import Address, Membership, Outgoing
from trainkit.switchml._rendezvous import FRESH, Candidate, Epoch, Session, conflict, protocol_refusal, refusal
from trainkit.switchml._text import shown

_log = logging.getLogger(__name__)

_FACTOR = 3
"""Bytes that go out for one that came in from an address that is not proven."""
_WAITING = 1024
"""Sessions that have not begun."""
_DEAD = 30.0
"""Seconds of silence after which a session makes room for another, where there is none."""
_IN_USE = 5.0
"""Seconds of silence after which a session that a switch was set up for may go to another job."""


class DataPlane(Protocol):
    """What a session needs of the switch that adds."""

    def install(self, member: Membership, addresses: tuple[Address, ...]) -> None:
        """Begin an epoch."""

    def move(self, member: Membership, addresses: tuple[Address, ...]) -> None:
        """A worker of the epoch has another address."""

    def remove(self, session: int) -> None:
        """End a session."""

    def unfinished(self, session: int) -> int:
        """Bitmap of the workers that the lowest unfinished chunk waits for."""

    def mismatched(self, session: int) -> int:
        """Bitmap of the workers whose bucket was not that of the others."""


class Sessions:
    """All sessions of one switch.

    Args:
        plane: the switch that adds.
        token: shared secret; empty without.
        receive_buffer: bytes of the switch's socket; packets in flight never fill more than half of it.
        limits: what is admitted.
        preconfigured: the sessions of a switch that knows no others, by name; None takes any.
        channel: of which channel of its sessions this switch is.
        ports: where the workers of a session find its channels.
        core: it takes profile "core" only.

    Attributes:
        refused: messages that were not of this protocol, had a wrong tag, or broke a rule.
    """

    def __init__(
        self,
        plane: DataPlane,
        token: bytes,
        receive_buffer: int,
        limits: Limits | None = None,
        preconfigured: Mapping[str, Preconfigured] | None = None,
        channel: int = 0,
        ports: tuple[int, ...] = (),
        core: bool = False,
    ) -> None:
        self._channel, self._ports, self._core = channel, ports, core or preconfigured is not None
        self._plane, self._token, self._receive_buffer = plane, token, receive_buffer
        self._key = control.control_key(token)
        self._limits, self._preconfigured = limits or Limits(), preconfigured
        self._sessions: dict[tuple[str, str], Session] = {}
        self._epochs: dict[tuple[int, int], tuple[Session, Epoch]] = {}
        self._epoch = secrets.randbits(31)
        self._cookies = Cookies()
        self.refused = 0

    def receive(self, data: bytes, source: Address, now: float) -> list[Outgoing]:
        """Take a control packet in; the packets to send."""
        of = control.place(data) if control.is_control(data) else SWITCH
        if of.sender == packet.FROM_SWITCH:
            self.refused += 1
            return []
        if of.epoch:
            return self._within(of, data, source, now)
        message = control.decode(data, self._key)
        if message is None:
            self.refused += 1
            return []
        if message["op"] == "probe":
            # as long as the question: does the path carry it?
            answer = {"op": "probed", "nonce": _short(message.get("nonce"))}
            return self._unproven(source, answer, data, size=len(data))
        if message["op"] != "join":
            self.refused += 1
            return []
        nonce = _short(message.get("nonce"))
        if (why := protocol_refusal(message)) is not None:
            return self._unproven(source, {"op": "refused", "nonce": nonce, "why": why}, data)
        made = self._cookies.age(message.get("cookie"), source, nonce, now)
        if made is None:
            retry = {"op": "retry", "nonce": nonce, "cookie": self._cookies.made(source, nonce, now)}
            return self._unproven(source, retry, data)
        return [(source, control.encode(self._join(message, source, made, now), self._key, of=SWITCH))]

    def sweep(self, now: float, idle: float | None = None) -> None:
        """Drop the sessions of which nobody has been heard for long."""
        idle = self._limits.idle if idle is None else idle
        for session in list(self._sessions.values()):
            if now - session.last_heard() > (idle if session.active else FRESH):
                self._drop(session)

    def table(self, now: float) -> list[Message]:
        """A row a session: name, job, epoch, world, agreed sizes, seconds since each worker was heard."""
        rows = []
        for session in self._sessions.values():
            if session.active:
                agreed = session.active.offer(0)
                fields = {name: agreed[name] for name in ("epoch", "world", "slots", "elements", "wire", "profile")}
                rows.append(
                    {"session": session.name, "job": session.job, **fields, "silent": session.active.silent(now)}
                )
        return rows

    def _unproven(self, source: Address, answer: Message, data: bytes, size: int = 0) -> list[Outgoing]:
        sent = control.encode(answer, self._key, size, SWITCH)
        return [(source, sent)] if len(sent) <= _FACTOR * len(data) else []

    def _within(self, of: control.Place, data: bytes, source: Address, now: float) -> list[Outgoing]:
        """A message of an epoch."""
        found = self._epochs.get((of.session, of.epoch))
        if found is None:
            return self._unproven(source, {"op": "lost", "epoch": of.epoch, "n": _number_of(data)}, data)
        session, epoch = found
        message = control.decode(data, epoch.member.control)
        if message is None or of.sender >= epoch.member.world:
            self.refused += 1
            return []
        rank, op = of.sender, message["op"]
        if epoch.addresses[rank] != source:
            return self._elsewhere(session, epoch, rank, message, data, source, now)
        epoch.heard[rank] = now
        if op == "ready":
            return [epoch.to(source, self._ready(session, epoch, rank, now))]
        if op == "ping" and _newer(epoch, rank, message):
            return [epoch.to(source, epoch.ended or self._pong(epoch, message["n"], now))]
        if op == "abort" and epoch.ended is None:
            return self._abort(epoch, message)
        if op == "leave":
            epoch.left.add(rank)
            if epoch is session.active and len(epoch.left) == epoch.member.world:
                self._end(session)
        return []

    def _elsewhere(
        self, session: Session, epoch: Epoch, rank: int, message: Message, data: bytes, source: Address, now: float
    ) -> list[Outgoing]:
        """A worker of this epoch by its key, from an address that is not its own: a NAT or conntrack forgot it."""
        purpose = f"{epoch.member.epoch} {rank}"
        if self._preconfigured is not None and _host(source) != _host(epoch.addresses[rank]):
            return []
        if message["op"] == "ping" and _newer(epoch, rank, message):
            moved = {"op": "moved", "n": message["n"], "cookie": self._cookies.made(source, purpose, now)}
            sent = epoch.to(source, moved)
            return [sent] if len(sent[1]) <= _FACTOR * len(data) else []
        if message["op"] == "move" and self._cookies.age(message.get("cookie"), source, purpose, now) is not None:
            _log.warning(
                "rank %d of session %s now sends from %s, before from %s: a NAT or firewall forgot it",
                rank, shown(session.name), source, epoch.addresses[rank],
            )  # fmt: skip
            epoch.addresses[rank], epoch.heard[rank] = source, now
            if epoch is session.active:
                self._plane.move(epoch.member, tuple(epoch.addresses))
        return []

    def _join(self, message: Message, source: Address, made: float, now: float) -> Message:
        nonce = message["nonce"]
        why = refusal(message) or self._other_plane(message, source)
        if why is None:
            name = message["session"], "" if self._preconfigured is not None else message["job"]
            why = self._no_room(name, source, now) or self._in_use(name, message["job"], now)
        if why is not None:
            return {"op": "refused", "nonce": nonce, "why": why}
        session = self._sessions.get(name)
        if session is None:
            session = self._sessions[name] = Session(message["session"], message["job"])
        session.job = message["job"]
        rank, world, active = message["rank"], message["world"], session.active
        if active and active.member.world == world and active.nonces[rank] == nonce:
            return active.offer(rank)
        candidate = Candidate(
            rank, nonce, source, now, made, message["elements"], message["slots"], message["wire"], message["profile"],
            message["channels"],
        )  # fmt: skip
        if not session.take(candidate, world, now):
            return {"op": "wait", "nonce": nonce, "seen": [], "why": None}
        present = session.present(world)
        if len(present) < world or (said := conflict(present)):
            why = said if len(present) == world else session.other_world(world)
            return {"op": "wait", "nonce": nonce, "seen": [other.rank for other in present], "why": why}
        if not (session.offer and session.offer.nonces == tuple(other.nonce for other in present)):
            try:
                self._offer(session, present, now)
            except ValueError as error:
                return {"op": "refused", "nonce": nonce, "why": str(error)}
        assert session.offer is not None
        return session.offer.offer(rank)

    def _offer(self, session: Session, present: list[Candidate], now: float) -> None:
        world = len(present)
        wanted = [(candidate.elements, candidate.slots) for candidate in present]
        if self._preconfigured is not None:
            configured = self._preconfigured[session.name]
            wanted.append((configured.elements, configured.slots))
        elements = min(pair[0] for pair in wanted)
        room = self._receive_buffer // 2 // (world * truesize(4 * elements))
        slots = max(1, min(room, self._limits.slots, *(pair[1] for pair in wanted)))
        if present[0].profile == "core":  # hardware finds a slot by the low bits of the chunk
            slots = 1 << slots.bit_length() - 1
        if session.number < 0:
            session.number = self._number(session.name)
        self._epoch = self._epoch % (2**32 - 1) + 1
        epoch = session.offered(self._epoch, present, slots, elements, self._channel, self._ports, now)
        self._check_memory(session, epoch)
        epoch.member = epoch.member.keyed(self._token, epoch.salt, epoch.said)
        self._forget(session.offer)
        session.offer = epoch
        self._epochs[session.number, epoch.member.epoch] = session, epoch

    def _check_memory(self, session: Session, epoch: Epoch) -> None:
        taken = Counter[str]()
        for other in self._sessions.values():
            if other.active and other is not session:
                size = _memory(other.active.member)
                taken.update({"": size, **{host: size for host in {_network(a) for a in other.active.addresses}}})
        size, limit = _memory(epoch.member), self._limits.memory
        what = f"{size} bytes of slots for {epoch.member.slots} slots of {epoch.member.elements} elements"
        if taken[""] + size > limit:
            raise ValueError(f"{what}, but the switch has {limit - taken['']} left: ask for fewer slots")
        for host in {_network(address) for address in epoch.addresses}:
            if taken[host] and taken[host] + size > self._limits.share * limit:
                raise ValueError(f"{what}, but host {host} already holds {taken[host]}: ask for fewer slots")

    def _ready(self, session: Session, epoch: Epoch, rank: int, now: float) -> Message:
        if epoch.ended is not None:
            return epoch.ended
        if epoch is not session.active:
            if (candidate := session.candidates.get((epoch.member.world, rank))) is not None:
                candidate.seen = now
            epoch.ready.add(rank)
            absent = [other for other in range(epoch.member.world) if other not in epoch.ready]
            if absent:
                return {"op": "wait", "absent": absent}
            self._begin(session, epoch)
        return epoch.ended or {"op": "go", "ports": epoch.ports}

    def _begin(self, session: Session, epoch: Epoch) -> None:
        session.candidates.clear()
        try:
            self._plane.install(epoch.member, tuple(epoch.addresses))
        except (ValueError, RuntimeError, OSError) as error:  # the session's own misfortune, and nobody else's
            _log.warning("session %s cannot begin: %s", shown(session.name), error)
            epoch.ended = {"op": "refused", "why": str(error)[:500]}
            return
        self._forget(session.active)
        session.active, session.offer = epoch, None

    def _pong(self, epoch: Epoch, number: int, now: float) -> Message:
        session, ranks = epoch.member.session, range(epoch.member.world)
        missing, mismatched = self._plane.unfinished(session), self._plane.mismatched(session)
        return {
            "op": "pong",
            "n": number,
            "silent": epoch.silent(now),
            "left": sorted(epoch.left),
            "missing": [rank for rank in ranks if missing >> rank & 1],
            "mismatched": [rank for rank in ranks if mismatched >> rank & 1],
        }

    def _abort(self, epoch: Epoch, message: Message) -> list[Outgoing]:
        ranks = message.get("ranks")
        named = [rank for rank in ranks if type(rank) is int][:64] if isinstance(ranks, list) else []
        epoch.ended = {"op": "aborted", "why": shown(message.get("why"), 500), "ranks": named}
        return [epoch.to(address, epoch.ended) for address in epoch.addresses]

    def _end(self, session: Session) -> None:
        if session.active:
            self._plane.remove(session.number)
        self._forget(session.active)
        session.active = None

    def _forget(self, epoch: Epoch | None) -> None:
        if epoch is not None:
            self._epochs.pop((epoch.member.session, epoch.member.epoch), None)

    def _drop(self, session: Session) -> None:
        self._end(session)
        self._forget(session.offer)
        for name, other in list(self._sessions.items()):
            if other is session:
                del self._sessions[name]

    def _no_room(self, name: tuple[str, str], source: Address, now: float) -> str | None:
        """Why a session cannot be added to those there are."""
        known = self._sessions.get(name)
        if known is not None and known.active:
            return None
        most, share, host = self._limits.sessions, self._limits.sessions_a_host, _network(source)
        for attempt in range(2):
            active = [session for session in self._sessions.values() if session.active]
            if len(active) >= most:
                why = f"the switch has its {most} sessions already: end one, or start another switch"
            elif sum(host in map(_network, session.sources()) for session in active) >= share:
                why = f"host {host} is part of {share} of this switch's {most} sessions already: end one"
            else:
                break
            if attempt:
                return why
            self.sweep(now, _DEAD)
        if known is None and len(self._sessions) - len(active) >= _WAITING:
            self.sweep(now)
            waiting = [session for session in self._sessions.values() if not session.active]
            if len(waiting) >= _WAITING:  # who fills the room makes room
                hosts = Counter(_network(source) for session in waiting for source in session.sources())
                fills = hosts.most_common(1)[0][0]
                self._drop(next(s for s in waiting if fills in map(_network, s.sources()) or not s.sources()))
        return None

    def _in_use(self, name: tuple[str, str], job: str, now: float) -> str | None:
        """A session that the switch was set up for belongs to one job at a time."""
        session = self._sessions.get(name)
        if session is None or session.job == job:
            return None
        if (silent := now - session.last_heard()) > _IN_USE:
            self._drop(session)
            return None
        return (
            f"session {shown(name[0])!r} belongs to another job, last heard {max(0.0, silent):.1f} s ago: end that, or "
            "deploy a session of another name"
        )

    def _other_plane(self, message: Message, source: Address) -> str | None:
        """Why this kind of switch cannot take a join."""
        if self._core and message["profile"] != "core":
            return f"profile {message['profile']}: this switch adds in hardware or in the kernel, give profile='core'"
        if self._preconfigured is None:
            return None
        name, rank = message["session"], message["rank"]
        session = self._preconfigured.get(name)
        if session is None:
            known = ", ".join(self._preconfigured)
            return f"session {shown(name)!r} is not one of {known}: deploy it, or name one of these"
        if message["world"] != len(session.hosts):
            return f"world size {message['world']}, session {name!r} was deployed for {len(session.hosts)} workers"
        if message["elements"] < session.elements:
            return f"{message['elements']} elements, session {name!r} was deployed for {session.elements}"
        if _host(source) != session.hosts[rank]:
            deployed = session.hosts[rank]
            return f"rank {rank} of session {name!r} was deployed for host {deployed}, this one is {_host(source)}"
        return None

    def _number(self, name: str) -> int:
        if self._preconfigured is not None:
            return self._preconfigured[name].number
        taken = {session.number for session in self._sessions.values()}
        return next(number for number in range(len(taken) + 1) if number not in taken)


def _memory(member: Membership) -> int:
    return 2 * member.slots * member.elements * 4


def _short(nonce: object) -> str:
    return nonce[:64] if isinstance(nonce, str) else ""


def _number_of(data: bytes) -> Any:
    """The number of a ping whose tag cannot be checked: it is only given back."""
    with contextlib.suppress(ValueError, RecursionError):
        message = json.loads(data[packet.HEADER_BYTES : -packet.TAG_BYTES])
        if isinstance(message, dict) and type(message.get("n")) is int and message["n"] < 2**63:
            return message["n"]
    return None


def _newer(epoch: Epoch, rank: int, message: Message) -> bool:
    """Whether a ping is not a repetition."""
    number = message.get("n")
    if type(number) is not int or number <= epoch.pinged[rank]:
        return False
    epoch.pinged[rank] = number
    return True


def _host(source: Address) -> str:
    return str(source[0]) if isinstance(source, tuple) else str(source)


def _network(source: Address) -> str:
    """Who is one host to a switch: an IPv4 address, or what one IPv6 host may take as its own."""
    host = _host(source)
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host.partition("%")[0])
        if address.version == 6 and not address.is_loopback and not address.is_link_local:
            return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return host
