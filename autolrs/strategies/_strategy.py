"""What a search asks of a strategy, and what it tells it."""

import math
from dataclasses import dataclass
from typing import Protocol

from trainkit.autolrs._forecast import Forecast


@dataclass(frozen=True)
class Trial:
    """A trial so far.

    Attributes:
        rate: peak rate tried.
        taken: steps taken.
        steps: steps of the trial after which each loss was measured, from 0.
        losses: search losses there.
        sums: S1 there, the run so far included.
        ended: whether it took all the steps it was given.
        diverged: whether its loss is not finite, or far above the start without coming back.
    """

    rate: float
    taken: int
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    sums: tuple[float, ...]
    ended: bool
    diverged: bool


@dataclass(frozen=True)
class Situation:
    """Where a search stands in the run.

    Attributes:
        first: whether no step has been taken yet.
        done: S1 of the run so far.
        began: loss that the run began with; inf at its start.
        best: loss at averaged weights at the end of the last committed trial; inf before the first.
        ahead: steps to come, each weighted by the schedule's share of the peak rate.
        left: steps to come.
        until: those of them that the search decides: from the run's start, up to the second search.
        trial_steps: longest trial.
        present: rate in force.
        usual: rate that the optimizer's class usually does well with; None: unknown.
        user: rate that the user gave, within the range.
    """

    first: bool
    done: float
    began: float
    best: float
    ahead: float
    left: int
    until: int
    trial_steps: int
    present: float
    usual: float | None
    user: float


class Strategy(Protocol):
    """One search's mind."""

    keeps: bool
    """Whether the winner's steps are committed; else the stage starts again from the state before the search."""

    def begin(self, loss: float | None) -> None:
        """Takes in the search loss before the first trial; None: it is not measured."""

    def propose(self) -> float | None:
        """The next rate to try; None: the search ends."""

    def observe(self, trial: Trial) -> None:
        """Takes in a trial that ended, was stopped or diverged."""

    def stop(self, trial: Trial) -> bool:
        """Whether the running trial is not worth its remaining steps."""

    def choose(self) -> int | None:
        """Index of the observed trial to go on with; None: no rate worked."""

    def forecast(self, trial: int) -> Forecast:
        """Loss at the horizon if the run goes on with an observed trial's rate."""

    @property
    def fallback(self) -> float | None:
        """The rate in force, where none is chosen and it is known to do no harm; None: it is not known."""

    @property
    def reason(self) -> str:
        """Why the search ended, in a few words."""

    @property
    def asked(self) -> int:
        """How many rates came from a model, not from a fixed design."""


def worked(trial: Trial, slack: float = 0.0, most: float = math.inf) -> bool:
    """Whether a rate may be adopted: its trial ran to its end, finite, and ended no higher than it began.

    What rises and comes back is the noise of a higher rate, which the annealed end takes away.

    Args:
        trial: the trial.
        slack: rise that is within the noise, in the loss's unit.
        most: loss that it may not end above, whatever it began with.
    """
    if trial.diverged or not trial.ended or not all(map(math.isfinite, trial.losses)):
        return False
    if len(trial.losses) < 2:
        return len(trial.losses) == 1
    return trial.losses[-1] <= min(trial.losses[0] + slack, most)
