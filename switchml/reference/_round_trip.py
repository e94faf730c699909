"""How long to wait before a retransmission, and how soon one is answered again."""

_FIRST = 0.05
_FLOOR = 0.02
_CEILING = 1.0


class RoundTrip:
    """Smoothed round trip and its deviation; the timeout backs off twofold (RFC 6298, with other constants).

    Attributes:
        smoothed: seconds; 0 before the first sample.
    """

    def __init__(self) -> None:
        self.smoothed = 0.0
        self._deviation = 0.0

    def sample(self, seconds: float, asked: bool = False) -> None:
        """Take in a round trip; where the result had to be asked for and may have been lost, no more than twofold."""
        if asked:
            seconds = min(seconds, 2 * self.smoothed)
        if self.smoothed == 0.0:
            self.smoothed, self._deviation = seconds, seconds / 2
            return
        self._deviation += (abs(seconds - self.smoothed) - self._deviation) / 4
        self.smoothed += (seconds - self.smoothed) / 8

    def timeout(self, tries: int) -> float:
        """Seconds to wait for the answer to try number `tries`, from 1."""
        first = _FIRST if self.smoothed == 0.0 else max(_FLOOR, 1.5 * self.smoothed + 4 * self._deviation)
        return float(min(_CEILING, first * 2 ** min(tries - 1, 10)))


class ShortestTrip:
    """The shortest of late round trips, as the switch sees them: from a result to the worker's next packet for its slot."""

    def __init__(self) -> None:
        self._least = self._before = float("inf")
        self._count = 0

    def sample(self, seconds: float) -> None:
        """Take in a round trip."""
        self._least = min(self._least, seconds)
        self._count += 1
        if self._count == 64:
            self._before, self._least, self._count = self._least, float("inf"), 0

    @property
    def value(self) -> float:
        """Seconds; before the first sample what a worker waits at least before it asks again, and never more."""
        return min(self._least, self._before, _FLOOR)


class Answers:
    """Answers to one worker's retransmissions of one chunk: the first at once, each later one after twice the time."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self._count = 0
        self._last = 0.0

    def due(self, trip: float, now: float) -> bool:
        """Whether one may be given now, that is at most once in `trip` seconds and ever less often."""
        if self._count > 0 and now - self._last < min(_CEILING, trip * 2 ** min(self._count, 20) / 2):
            return False
        self._count, self._last = self._count + 1, now
        return True
