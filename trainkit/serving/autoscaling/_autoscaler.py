"""Scale up on drops, release GPUs that nobody touched: the scheduler's own two signals (Symphony, arXiv 2308.07470)."""

import math
from dataclasses import dataclass, field


@dataclass
class Autoscaler:
    """Decides after each window of observation how many GPUs there should be.

    The scheduler takes the lowest-numbered idle GPU, so what a load does not need stays untouched as whole GPUs.

    - Up, at once: where a share q of the requests was bad, N GPUs served 1 - q of the load, so N / (1 - q) serve it.
      GPUs that are still starting count in N: the same drops do not ask for them twice.
    - Down, by hysteresis: what stayed untouched in every window for `hold_s` is released, but for `spare`. Drops, and
      each change, begin the time anew.

    Args:
        least: GPUs that are always kept.
        most: GPUs there may be.
        bad: share of late and dropped requests that is put up with.
        hold_s: seconds that a GPU must be untouched; longer than the load's usual ups and downs.
        spare: untouched GPUs that are kept for sudden load.

    Raises:
        ValueError: a number is out of its range.
    """

    least: int
    most: int
    bad: float = 0.01
    hold_s: float = 30.0
    spare: int = 0
    _since: float | None = field(default=None, init=False)
    _untouched: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"least is from 1 to most, got {self.least} and {self.most}")
        if not 0 <= self.bad < 1 or not self.hold_s > 0 or self.spare < 0:
            raise ValueError(
                f"bad is from 0 to below 1, hold_s above 0, spare from 0 on, got {self.bad}, {self.hold_s}, {self.spare}"
            )

    def observe(self, now_s: float, gpus: int, *, starting: int = 0, answered: int, bad: int, untouched: int) -> int:
        """A window ended.

        Args:
            now_s: its end, seconds.
            gpus: GPUs that serve.
            starting: GPUs on their way.
            answered: requests that ended in the window, bad ones included.
            bad: those late or dropped.
            untouched: serving GPUs that ran nothing in the window.

        Returns:
            How many GPUs there should be, those on their way included.
        """
        there = gpus + starting
        if bad > self.bad * answered:
            self._since = None
            share = min(bad / answered, 0.5)  # at most twice the GPUs in a step: what is bad may be no lack of GPUs
            return self._within(max(there, gpus + math.ceil(gpus * share / (1 - share))))
        if self._since is None:
            self._since, self._untouched = now_s, untouched
        self._untouched = min(self._untouched, untouched)
        if now_s - self._since < self.hold_s:
            return self._within(there)
        # what has not come by now was not needed either
        wanted = self._within(gpus - max(0, self._untouched - self.spare))
        self._since = None
        return wanted

    def _within(self, gpus: int) -> int:
        return min(self.most, max(self.least, gpus))
