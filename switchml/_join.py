"""Joining a session, the worker's side."""

import logging
import secrets
import select
import socket
import struct
import time
from dataclasses import dataclass, field, fields

from trainkit.switchml import _control as control
from trainkit.switchml._buffers import truesize
from trainkit.switchml._errors import SessionRefused, SwitchMLError, SwitchUnreachable, WorkerMissing
from trainkit.switchml._membership import Membership
from trainkit.switchml._options import MAX_CHANNELS, Options
from trainkit.switchml._packet import FROM_SWITCH
from trainkit.switchml._place import Place
from trainkit.switchml._reach import NAME_AFTER, RETRY, default_elements
from trainkit.switchml._text import shown

_log = logging.getLogger(__name__)

_CONFLICT = 3.0
_SLOTS = 20
_PAUSE = (0.002, 0.05)
"""Seconds between two questions while others are waited for: at first, at most."""


@dataclass
class _Join:
    """One join: its nonce, and what was heard for it."""

    options: Options
    place: Place
    token: bytes
    channel: int
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    cookie: str = ""
    offer: Membership | None = None
    heard: bool = False
    seen: list[int] | None = None
    why: tuple[str, float] | None = None
    ports: list[int] | None = None

    def question(self, asked: control.Message, key: bytes) -> bytes:
        """What to send now."""
        if self.offer is not None:
            of = control.Place(self.offer.session, self.offer.epoch, self.place.rank)
            return control.encode({"op": "ready"}, self.offer.control, 128, of)
        return control.encode({**asked, "nonce": self.nonce, "cookie": self.cookie}, key)

    def take(self, data: bytes, key: bytes, waited: float) -> bool:
        """Take a packet in; True where it says that others are waited for.

        Raises:
            SessionRefused: the switch says no.
        """
        of = control.place(data) if control.is_control(data) else control.NOWHERE
        if of.sender != FROM_SWITCH:
            return False
        if of.epoch:
            return self._of_offer(of, data)
        message = control.decode(data, key)
        if message is None:
            return False
        if message["op"] == "lost":
            if self.offer is not None and message.get("epoch") == self.offer.epoch:
                self.offer = None
            return False
        if message.get("nonce") != self.nonce:  # of an earlier join, or of somebody else's
            return False
        self.heard = True
        if message["op"] == "retry":
            self.cookie = str(message.get("cookie"))
        elif message["op"] == "refused":
            raise SessionRefused(
                f"switch {self.options.switch} refuses rank {self.place.rank}: {shown(message.get('why'), 500)}"
            )
        elif message["op"] == "offer":
            self.offer = self._member(message)
        elif message["op"] == "wait":
            seen = message.get("seen")
            self.seen = [rank for rank in seen if type(rank) is int] if isinstance(seen, list) else []
            self._conflict(message.get("why"), waited)
            return True
        return False

    def _of_offer(self, of: control.Place, data: bytes) -> bool:
        if self.offer is None or (of.session, of.epoch) != (self.offer.session, self.offer.epoch):
            return False
        message = control.decode(data, self.offer.control)
        if message is None:
            return False
        if message["op"] == "go":
            ports = message.get("ports")
            self.ports = [port for port in ports if type(port) is int] if isinstance(ports, list) else []
        elif message["op"] == "refused":
            raise SessionRefused(f"switch {self.options.switch}: {shown(message.get('why'), 500)}")
        elif message["op"] == "aborted":
            raise SwitchMLError(f"the session ended as it began: {shown(message.get('why'), 500)}")
        elif message["op"] == "wait":
            absent = message.get("absent")
            if isinstance(absent, list):
                self.seen = [rank for rank in range(self.place.world) if rank not in absent]
        return bool(message["op"] == "wait")

    def _conflict(self, said: object, waited: float) -> None:
        if not isinstance(said, str):
            self.why = None
            return
        self.why = (said, self.why[1] if self.why and self.why[0] == said else waited)
        if waited - self.why[1] > _CONFLICT:
            raise SessionRefused(
                f"session {self.options.session!r} on switch {self.options.switch}: {shown(said, 500)}"
            )

    def _member(self, message: control.Message) -> Membership | None:
        """What an offer says, with the keys that only this epoch has; None where it is not what was asked for."""
        hidden = ("worker", "key", "control")
        try:
            said = {one.name: message[one.name] for one in fields(Membership) if one.name not in hidden}
            member = Membership(**said, worker=self.place.rank)
            asked = (self.place.world, self.options.wire, self.options.profile, self.channel)
            usable = (member.world, member.wire, member.profile, member.channel) == asked
            if not (usable and 0 < member.slots <= 1 << 14 and 0 < member.elements <= 1 << 14):
                return None
            return member.keyed(self.token, message["salt"], message["said"])
        except (KeyError, TypeError, ValueError, AttributeError, struct.error):
            return None


def join(
    endpoint: socket.socket, buffer: int, options: Options, place: Place, token: bytes, channel: int = 0
) -> tuple[Membership, list[int]]:
    """Join; returns when all ranks have.

    Args:
        endpoint: socket connected to a switch that has answered.
        buffer: bytes of its receive buffer.
        options: what the user asked for.
        place: this worker's.
        token: shared secret; empty without.
        channel: which of the session's independent streams this is.

    Returns:
        What was agreed, and the switch's port for each channel.

    Raises:
        SwitchUnreachable: no answer at all in time.
        SessionRefused: the switch says no.
        WorkerMissing: other ranks did not come in time.
    """
    key = control.control_key(token)
    elements = options.elements or default_elements(endpoint, buffer, options, key)
    room = max(1, buffer // 2 // truesize(4 * elements))
    asked = {
        "op": "join", "v": control.PROTOCOL, "session": options.session, "job": place.job, "rank": place.rank,
        "world": place.world, "elements": elements, "slots": min(options.slots or _SLOTS, room), "wire": options.wire,
        "profile": options.profile, "channels": options.channels or MAX_CHANNELS,
    }  # fmt: skip
    now = _Join(options, place, token, channel)
    began, named, pause = time.monotonic(), False, _PAUSE[0]
    while (waited := time.monotonic() - began) < options.timeout_s:
        waiting = False
        for data in _exchange(endpoint, now.question(asked, key)):
            waiting = now.take(data, key, waited) or waiting
            if now.offer is not None and now.ports is not None:
                return now.offer, now.ports
        if waiting:
            time.sleep(pause)
            pause = min(1.5 * pause, _PAUSE[1])
        if not named and waited > NAME_AFTER:
            named = True
            who = _ranks(_absent(now.seen, place.world)) if now.heard else "an answer"
            _log.warning("session %s waits for %s of %d ranks", shown(options.session), who, place.world)
    if not now.heard:
        raise SwitchUnreachable(
            f"switch {options.switch} has stopped answering, for {options.timeout_s:g} s: is it alive?"
        )
    absent = _absent(now.seen, place.world)
    raise WorkerMissing(
        f"session {options.session!r} waited {options.timeout_s:g} s for {_ranks(absent)} of {place.world} ranks: "
        "are they running, with the same switch and session?",
        tuple(absent),
    )


def _exchange(endpoint: socket.socket, question: bytes) -> list[bytes]:
    """Send one packet and gather what comes within a moment."""
    answers: list[bytes] = []
    until = time.monotonic() + RETRY
    try:
        endpoint.send(question)
    except OSError:  # refused: nobody listens there now
        time.sleep(RETRY)
        return answers
    while not answers and (left := until - time.monotonic()) > 0:
        if select.select([endpoint], [], [], left)[0]:
            try:
                answers.append(endpoint.recv(65535))
            except OSError:
                time.sleep(max(0.0, until - time.monotonic()))
                break
    return answers


def _absent(seen: list[int] | None, world: int) -> list[int]:
    return [rank for rank in range(world) if rank not in (seen or [])]


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
