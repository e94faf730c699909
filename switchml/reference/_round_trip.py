"""How long to wait before a repeat."""

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
