"""Errors of a running schedule, by their cause."""


class ExecutionError(RuntimeError):
    """A collective could not run to its end; the message names the cause and what to do."""


class PeerLost(ExecutionError):
    """A rank is dead, has left, was paused beyond the time-out or never came to the collective.

    Attributes:
        rank: the rank that is missing.
        op: number of the schedule's operation that was waited for, or None.
    """

    def __init__(self, message: str, rank: int, op: int | None = None) -> None:
        super().__init__(message)
        self.rank, self.op = rank, op


class CollectiveTimeout(ExecutionError):
    """A collective is not complete in the time that a `wait(timeout)` gave it; it goes on, and may be waited for again.

    Attributes:
        rank: a rank that is waited for, or None where that is not known.
    """

    def __init__(self, message: str, rank: int | None) -> None:
        super().__init__(message)
        self.rank = rank
