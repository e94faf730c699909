"""What a switch admits."""

import dataclasses


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
    share: float = 0.25
    """Part of the sessions, and of their memory, that the workers of one host may hold; its first is always taken."""

    @property
    def sessions_a_host(self) -> int:
        """Sessions that one host may be part of."""
        return max(1, int(self.share * self.sessions))


@dataclasses.dataclass(frozen=True)
class Preconfigured:
    """A session that a switch was set up for beforehand; workers fill it, and can ask for no more."""

    number: int
    """Its number on the switch."""
    hosts: tuple[str, ...]
    """IPv4 address of rank r."""
    slots: int
    """Most slots, a power of two."""
    elements: int
    """Elements a packet."""
