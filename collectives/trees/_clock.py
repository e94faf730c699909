"""The time that a search may take, seen by the linear solver and by native loops alike."""

from collections.abc import Callable
from time import monotonic

from trainkit.collectives.trees._problem import Progress


class OutOfTime(Exception):
    """The time of a phase is over."""


class Clock:
    """Runs from when it is made.

    Args:
        seconds: the time of all phases together.
        progress: called with (phase, done, total) now and then.
    """

    def __init__(self, seconds: float, progress: Progress) -> None:
        self.seconds, self.start, self.progress = seconds, monotonic(), progress

    def left(self, part: float = 1.0) -> float:
        """Seconds until this part of the time is over; negative when it is."""
        return self.start + part * self.seconds - monotonic()

    def ticking(self, phase: str, done: int, total: int) -> None:
        """A progress function without an end."""
        if self.progress:
            self.progress(phase, done, total)

    def until(self, part: float) -> Callable[[str, int, int], None]:
        """A progress function that ends what calls it when this part of the time is over.

        Native loops call theirs every 50 ms or so and pass on what it raises.
        """

        def tick(phase: str, done: int, total: int) -> None:
            if self.left(part) < 0:
                raise OutOfTime(phase)
            self.ticking(phase, done, total)

        return tick
