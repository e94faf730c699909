"""A P4 switch as the data plane of SwitchML's sessions: epochs begin and end, and who is missing is read."""

import ipaddress
import time
from collections import deque
from collections.abc import Hashable
from typing import TYPE_CHECKING, Protocol

from trainkit.p4._description import Description
from trainkit.p4._entries import Entry, Item, difference
from trainkit.p4._frames import Datagram, datagram, udp_frame

if TYPE_CHECKING:
    from trainkit.p4._client import Connection, Packet

SEND, READ, RESET = 0, 1, 2
"""Operations of the headers `packet_out` and `packet_in`."""

_READ_WAIT = 0.3
_READ_AGAIN = 0.25


class Member(Protocol):
    """What is read of a SwitchML membership."""

    @property
    def session(self) -> int:
        """Number of the session."""

    @property
    def epoch(self) -> int:
        """Number of the epoch."""


class Plane:
    """Begins and ends epochs on a switch, and carries its control packets.

    Args:
        switch: the switch, programmed as `description` says.
        description: its workers and sessions.
    """

    def __init__(self, switch: "Connection", description: Description) -> None:
        self._switch, self._description = switch, description
        self._hosts = {worker.ip: worker for worker in description.workers}
        self._epochs: dict[int, int] = {}
        self._waiting: deque[Packet] = deque()
        self._missing: dict[int, tuple[float, int]] = {}

    def install(self, member: Member, addresses: tuple[Hashable, ...]) -> None:
        """Begin an epoch: from now on its packets are added, those of the session's earlier one are foreign."""
        session = self._description.sessions[member.session]
        items: list[Item] = []
        for rank, (worker, address) in enumerate(zip(session.workers, addresses, strict=True)):
            assert isinstance(address, tuple)
            udp, bit = address[1], 1 << rank
            key = (session.number, member.epoch, rank, worker.ip, udp, worker.port)
            items.append(Entry("member", key, "set_member", (bit,)))
            place = (worker.mac, worker.ip, udp, bit)
            items.append(Entry("receiver", (session.number, rank + 1), "set_receiver", place))
        self._switch.write(difference(self._joined(session.number), items))
        self._epochs[session.number] = member.epoch

    def move(self, member: Member, addresses: tuple[Hashable, ...]) -> None:
        """A worker of the epoch has another UDP port; its slots stay as they are."""
        self.install(member, addresses)

    def mismatched(self, session: int) -> int:
        """Not known on a switch: a bucket of another size is dropped as malformed."""
        return 0

    def remove(self, session: int) -> None:
        """End a session's epoch; its packets are foreign from now on."""
        self._switch.write(difference(self._joined(session), []))
        self._epochs.pop(session, None)

    def unfinished(self, session: int) -> int:
        """Bitmap of the workers that the lowest unfinished chunk of a session waits for; 0 where none is."""
        read, missing = self._missing.get(session, (0.0, 0))
        if session in self._epochs and time.monotonic() - read > _READ_AGAIN:
            missing = self._read_missing(session)
            self._missing[session] = time.monotonic(), missing
        return missing

    def reset(self, session: int) -> None:
        """End a session's epoch and forget what its slots hold."""
        self.remove(session)
        for index in self._versions(session):
            self._switch.send(b"", operation=RESET, index=index)
        self._gather(session)

    def receive(self, seconds: float) -> Datagram | None:
        """The next control message of a worker; None if none comes in time."""
        packet = self._waiting.popleft() if self._waiting else self._switch.receive(seconds)
        return datagram(packet.payload) if packet and packet.fields["operation"] == SEND else None

    def send(self, address: tuple[str, int], data: bytes) -> None:
        """A control message to a worker at (IPv4 address, UDP port)."""
        worker = self._hosts.get(int(ipaddress.IPv4Address(address[0])))
        if worker is not None:
            own = self._description.mac, self._description.ip
            self._switch.send(udp_frame(own, (worker.mac, worker.ip), address[1], data), port=worker.port)

    def _joined(self, session: int) -> list[Item]:
        found = self._switch.read(("member", "receiver"))
        return [item for item in found if isinstance(item, Entry) and item.key[0] == session]

    def _versions(self, session: int) -> range:
        described = self._description.sessions[session]
        return range(described.base, described.base + 2 * described.slots)

    def _read_missing(self, session: int) -> int:
        everybody = (1 << len(self._description.sessions[session].workers)) - 1
        for index in self._versions(session):
            self._switch.send(b"", operation=READ, index=index)
        waiting = [
            (fields["chunk"], fields["seen"] ^ everybody)
            for fields in self._gather(session)
            if fields["epoch"] == self._epochs[session] and fields["seen"] not in (0, everybody)
        ]
        return min(waiting)[1] if waiting else 0

    def _gather(self, session: int) -> list[dict[str, int]]:
        """The switch's answers for all versions of a session, as far as they come; workers' messages are kept."""
        asked = set(self._versions(session))
        answers: list[dict[str, int]] = []
        until = time.monotonic() + _READ_WAIT
        while asked and (left := until - time.monotonic()) > 0:
            packet = self._switch.receive(left)
            if packet is None or packet.fields["operation"] == SEND:
                self._waiting += [packet] if packet else []
            elif packet.fields["index"] in asked:
                asked.discard(packet.fields["index"])
                answers.append(packet.fields)
        return answers
