"""Errors of a session, by their cause."""


class SwitchMLError(RuntimeError):
    """A gradient could not be aggregated; the message names the cause and what to do."""


class SwitchUnreachable(SwitchMLError):
    """The switch does not answer."""


class WorkerMissing(SwitchMLError):
    """A worker of the session is dead, paused beyond the time limit or never joined.

    Attributes:
        ranks: the missing workers.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class SessionRefused(SwitchMLError):
    """The switch does not take this worker: wrong world size, wrong token, no room, another version."""


class SessionLost(SwitchMLError):
    """The switch no longer knows this epoch: it was restarted, or the session was joined anew."""
