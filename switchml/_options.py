"""What a user may say of a session: the one list of options from which state, strategy and documentation come."""

import dataclasses
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainkit.switchml import _packet as packet
from trainkit.switchml._buffers import parse_address

MAX_CHANNELS = 64
Wire = Literal["int32", "int16", "int8"]
Fallback = Literal["error", "allreduce"]

_RENAMED = {"deadline_s": "timeout_s", "lanes": "channels"}


@dataclass(frozen=True)
class Options:
    """The arguments of `SwitchMLState`, checked."""

    switch: str
    """"host:port" of the switch; "[address]:port" for IPv6."""
    session: str = "default"
    """Name under which the workers meet."""
    token_file: str | None = None
    """File with the secret shared with the switch."""
    interface: str | None = None
    """Network interface to send from; None lets the system choose."""
    elements: int | None = None
    """Values a packet; None finds the most that the path carries."""
    slots: int | None = None
    """Packets in flight; None: as many as half the receive buffers hold, at most 20."""
    timeout_s: float = 30.0
    """Seconds without progress after which a bucket fails."""
    fallback: Fallback = "error"
    """What to do when the switch fails: raise, or go on with torch.distributed."""
    wire: Wire = "int32"
    """Integers from worker to switch."""
    profile: Literal["core", "full"] = "full"
    """What the switch can do: "core" for P4 and XDP."""
    channels: int | None = None
    """Independent streams, each with a thread here and one on the switch; None: as many as the switch has."""

    def __post_init__(self) -> None:
        parse_address(self.switch, "switch")
        profile = packet.PROFILES.get(self.profile)
        if profile is None:
            raise ValueError(f"profile is one of {', '.join(packet.PROFILES)}, got {self.profile!r}")
        if self.wire not in profile.wires:
            raise ValueError(f"wire of profile {self.profile} is one of {', '.join(profile.wires)}, got {self.wire!r}")
        if self.elements is not None and not profile.allows(self.elements):
            raise ValueError(f"elements of profile {self.profile} are {profile.sizes}, got {self.elements}")
        if self.slots is not None and not 1 <= self.slots <= packet.SLOT_MASK + 1:
            raise ValueError(f"slots are 1 to {packet.SLOT_MASK + 1}, got {self.slots}")
        if self.channels is not None and not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"channels are 1 to {MAX_CHANNELS}, got {self.channels}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s is a positive number of seconds, got {self.timeout_s}")
        if self.fallback not in ("error", "allreduce"):
            raise ValueError(f"fallback is 'error' or 'allreduce', got {self.fallback!r}")
        if not 0 < len(self.session) <= 64:
            raise ValueError(f"a session's name has 1 to 64 characters, got {len(self.session)}")

    def token(self) -> bytes:
        """The shared secret; empty without a file.

        Raises:
            ValueError: the file is missing, too short, or readable by others.
        """
        return read_token(self.token_file)


def current(options: dict[str, Any]) -> dict[str, Any]:
    """The options by their names of today: what was renamed is taken for one release, with a warning.

    Raises:
        TypeError: there is no such option.
    """
    named = {field.name for field in dataclasses.fields(Options)}
    taken: dict[str, Any] = {}
    for name, value in options.items():
        today = _RENAMED.get(name, name)
        if today not in named:
            raise TypeError(f"SwitchMLState has no option {name!r}: it has {', '.join(sorted(named))}")
        if today != name:
            warnings.warn(
                f"{name} is now called {today}: the old name goes with the next release", DeprecationWarning, 3
            )
        taken[today] = value
    if taken.get("fallback", "error") is None:
        warnings.warn("fallback=None is now 'error': the old word goes with the next release", DeprecationWarning, 3)
        taken["fallback"] = "error"
    return taken


def read_token(path: str | None) -> bytes:
    """The secret in a token file, without surrounding white space; empty for None.

    Raises:
        ValueError: the file cannot be read, is readable or writable by others, or holds fewer than 16 bytes.
    """
    if path is None:
        return b""
    make = f"make one with `(umask 077 && openssl rand -hex 32 > {path})`"
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            token = file.read(4096).strip()
    except OSError as error:
        raise ValueError(f"token file {path}: {error.strerror}: {make}") from error
    mode = stat.S_IMODE(status.st_mode)
    # root's group may read: so shows the mode of a credential that systemd hands over by an access list
    if mode & (0o037 if status.st_gid == 0 else 0o077):
        raise ValueError(f"token file {path} has mode {mode:04o}: others may read it; `chmod 600 {path}`")
    if len(token) < 16:
        raise ValueError(f"token file {path} holds {len(token)} bytes, at least 16 are needed: {make}")
    return token
