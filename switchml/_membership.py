"""What a join has agreed: all that the state machines of a worker and a switch need to know of a session."""

import struct
from collections.abc import Hashable
from dataclasses import dataclass, replace

from trainkit.switchml._packet import PROFILES
from trainkit.switchml._tag import derived

Address = Hashable
"""Where a worker is reached: a socket address, or whatever the transport of a test calls one."""

Outgoing = tuple[Address, bytes]


@dataclass(frozen=True)
class Membership:
    """One worker's place in one epoch of a session (on the switch: of all workers, `worker` unused)."""

    session: int
    """Number of the session, 16 bits."""
    epoch: int
    """Number of this rendezvous, 32 bits, not 0; a fresh one for each."""
    world: int
    """Workers in the sum."""
    worker: int = 0
    """Rank of this worker."""
    slots: int = 16
    """Chunks in flight."""
    elements: int = 8192
    """Values a chunk."""
    wire: str = "int32"
    """Format of the integers."""
    profile: str = "full"
    """"core" or "full"."""
    channel: int = 0
    """Which independent stream of the session."""
    key: bytes = b""
    """Key of the data packets' tags; empty without a token."""
    control: bytes = b""
    """Key of this epoch's control messages."""

    def keyed(self, token: bytes, salt: str, said: str) -> "Membership":
        """The same membership with its keys.

        Both come from the token, the switch's `salt` for this epoch, and `said`, the digest of the workers' nonces for
        it. Data have none without a token, and where the profile has no tags: the token then guards the join alone.
        """
        agreed = (
            struct.pack(">HIBIIB", self.session, self.epoch, self.world, self.slots, self.elements, self.channel)
            + f"{self.wire} {self.profile}".encode()
        )
        of = token, bytes.fromhex(salt)
        context = agreed + bytes.fromhex(said)
        tagged = token and PROFILES[self.profile].tagged
        return replace(
            self, key=derived(*of, b"data", context) if tagged else b"", control=derived(*of, b"control", context)
        )

    def as_worker(self, worker: int) -> "Membership":
        """The same membership for rank `worker`."""
        return replace(self, worker=worker)
