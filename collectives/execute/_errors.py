"""Errors of a running schedule, by their cause."""


class ExecutionError(RuntimeError):
    """A collective could not run to its end; the message names the cause and the mend."""


class PeerLost(ExecutionError):
    """A rank is dead, paused beyond the deadline or never came to the collective.

    Attributes:
        rank: the rank that is missing.
        op: number of the schedule's operation that was waited for, or None.
    """

    def __init__(self, message: str, rank: int, op: int | None = None) -> None:
        super().__init__(message)
        self.rank, self.op = rank, op
