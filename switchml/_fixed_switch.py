"""The control plane of a switch that can only add: P4 hardware, or a program in the kernel.

Its data plane drops what belongs to no installed epoch and hands packets of kind CONTROL over; what they ask for is
answered here, by the same sessions as those of the software switch. So a worker joins either in the same way, and
learns in the same way who is missing.
"""

from collections.abc import Mapping

from trainkit.switchml import _control as control
from trainkit.switchml._limits import Preconfigured
from trainkit.switchml._membership import Address, Outgoing
from trainkit.switchml._session import DataPlane, Sessions

_UNBOUNDED = 1 << 40


class FixedSwitch:
    """Joins, keep-alives, aborts and leaves of the sessions that a switch was set up for. Needs no clock or socket.

    Args:
        plane: the switch that adds.
        sessions: what it was set up for, by name.
        token: secret that workers must share to join; empty without. Data have no tag in profile `core`.
    """

    def __init__(self, plane: DataPlane, sessions: Mapping[str, Preconfigured], token: bytes = b"") -> None:
        self._sessions = Sessions(plane, token, _UNBOUNDED, preconfigured=sessions)

    def receive(self, data: bytes, source: Address, now: float) -> list[Outgoing]:
        """Take in the UDP payload of a CONTROL packet from (IPv4 address, port); the packets to send."""
        return self._sessions.receive(data, source, now)

    def sweep(self, now: float) -> None:
        """Drop the sessions of which nobody has been heard for long; call every few seconds."""
        self._sessions.sweep(now)

    def table(self, now: float) -> list[control.Message]:
        """A row a joined session: name, epoch, agreed sizes, seconds since each worker was heard."""
        return self._sessions.table(now)
