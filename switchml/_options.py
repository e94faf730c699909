"""What a user may say of a session."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainkit.switchml import _packet as packet
from trainkit.switchml._buffers import parse_address

MAX_LANES = 64
Wire = Literal["int32", "int16", "int8"]


@dataclass(frozen=True)
class Options:
    """The arguments of `SwitchMLState`, checked."""

    switch: str
    """"host:port" of the switch."""
    session: str = "default"
    """Name under which the workers meet."""
    token_file: str | None = None
    """File with the secret shared with the switch."""
    interface: str | None = None
    """Network interface to send from."""
    elements: int | None = None
    """Values a packet; None finds the most that the path carries."""
    slots: int | None = None
    """Packets in flight; None: as many as half the receive buffers hold, at most 20."""
    deadline_s: float = 30.0
    """Seconds without progress after which a bucket fails."""
    fallback: Literal["allreduce"] | None = None
    """What to do when the switch fails."""
    wire: Wire = "int32"
    """Integers from worker to switch."""
    profile: Literal["core", "full"] = "full"
    """What the switch can do: "core" for P4 and XDP."""
    lanes: int | None = None
    """Independent streams, each with a thread here and one on the switch; None: as many as the switch has."""

    def __post_init__(self) -> None:
        parse_address(self.switch, "switch")
        profile = packet.PROFILES.get(self.profile)
        if profile is None:
            raise ValueError(f"profile is one of {', '.join(packet.PROFILES)}, got {self.profile!r}")
        if self.wire not in profile.wires:
            raise ValueError(f"wire of profile {self.profile} is one of {', '.join(profile.wires)}, got {self.wire!r}")
        if self.elements is not None and not profile.allows(self.elements):
            raise ValueError(f"elements of profile {self.profile} are {profile.elements}, got {self.elements}")
        if self.slots is not None and not 1 <= self.slots <= packet.SLOT_MASK + 1:
            raise ValueError(f"slots are 1 to {packet.SLOT_MASK + 1}, got {self.slots}")
        if self.lanes is not None and not 1 <= self.lanes <= MAX_LANES:
            raise ValueError(f"lanes are 1 to {MAX_LANES}, got {self.lanes}")
        if not self.deadline_s > 0:
            raise ValueError(f"deadline_s is a positive number of seconds, got {self.deadline_s}")
        if self.fallback not in (None, "allreduce"):
            raise ValueError(f"fallback is None or 'allreduce', got {self.fallback!r}")
        if not 0 < len(self.session) <= 64:
            raise ValueError(f"a session's name has 1 to 64 characters, got {len(self.session)}")

    def token(self) -> bytes:
        """The shared secret; empty without a file.

        Raises:
            ValueError: the file is missing or too short.
        """
        return read_token(self.token_file)


def read_token(path: str | None) -> bytes:
    """The secret in a token file, without surrounding white space; empty for None.

    Raises:
        ValueError: the file cannot be read or holds fewer than 16 bytes.
    """
    if path is None:
        return b""
    try:
        token = Path(path).read_bytes().strip()
    except OSError as error:
        raise ValueError(
            f"token file {path}: {error.strerror}: make one with `openssl rand -hex 32 > {path}`"
        ) from error
    if len(token) < 16:
        raise ValueError(
            f"token file {path} holds {len(token)} bytes, at least 16 are needed: `openssl rand -hex 32 > {path}`"
        )
    return token
