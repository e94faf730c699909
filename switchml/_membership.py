"""What a join has agreed: all that the state machines of a worker and a switch need to know of a session."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

from trainkit.switchml._packet import PROFILES
from trainkit.switchml._tag import session_key

Address = Hashable
"""Where a worker is reached: a socket address, or whatever the transport of a test calls one."""

Outgoing = tuple[Address, bytes]


@dataclass(frozen=True)
class Membership:
    """One worker's place in one epoch of a session (on the switch: of all workers, `worker` unused)."""

    session: int
    """Number of the session, 16 bits."""
    epoch: int
    """Number of this gathering, 32 bits; a fresh one for each."""
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
    lane: int = 0
    """Which independent stream of the session."""
    key: bytes = b""
    """Session key of the tags; empty without a token."""

    def with_key(self, token: bytes, salt: str) -> "Membership":
        """The same membership with the session key of `token`, a switch's `salt` and the epoch.

        Unchanged without a token, and where the profile has no tags: the token then guards the join alone.
        """
        if not token or not PROFILES[self.profile].tagged:
            return self
        return replace(self, key=session_key(token, bytes.fromhex(salt), self.epoch))

    def as_worker(self, worker: int) -> "Membership":
        """The same membership for rank `worker`."""
        return replace(self, worker=worker)
