"""Stages of a given length: each trial is forecast to its stage's end at a constant rate, and a search asks by the forecasts.

From one state and on the same batches a small rate walks the path of a larger one more slowly: after the same sum of rates
both are at about the same loss, until the larger one's noise tells them apart. So the larger rate's losses, in the smaller
one's time, show what its own few steps cannot. Used only as far as the two agree where both are known.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from trainkit.autolrs._forecast import Forecast
from trainkit.autolrs._search import Backend, LRSearch
from trainkit.autolrs.strategies._strategy import Trial

# A trial is given up when its forecast is worse than the best one by this many stds, and its loss too, after this share.
_DOMINATED, _LEAST_SEEN = 1.0, 0.5
# Two trials are on the same path when, after the same sum of rates, they differ by at most this share of the drop.
_SAME_PATH = 0.2

Forecaster = Callable[[Sequence[float], Sequence[float], float], Forecast]


class Forecasting:
    """One search for a stage at a constant rate.

    Args:
        backend: proposes the rates.
        forecaster: (steps, losses, horizon) -> forecast.
        trial_steps: longest trial.
        horizon: steps from the search's start to the stage's end.
        scale: factor on a forecast's std.
    """

    keeps = True
    fallback = None

    def __init__(self, backend: Backend, forecaster: Forecaster, trial_steps: int, horizon: int) -> None:
        self._backend, self._forecaster = backend, forecaster
        self._trial_steps, self._horizon = trial_steps, horizon
        self._trials: list[Trial] = []
        self._forecasts: list[Forecast] = []
        self._best: int | None = None
        self.asked = 0
        self.reason = "its trials are spent"

    def begin(self, loss: float | None) -> None:
        """See `Strategy`."""

    def propose(self) -> float | None:
        """See `Strategy`."""
        self.asked += 1
        return self._backend.ask()

    def observe(self, trial: Trial) -> None:
        """See `Strategy`."""
        self._trials.append(trial)
        self._forecasts.append(self._foreseen(trial))
        self._backend.tell(trial.rate, self._forecasts[-1].mean, self._forecasts[-1].std)
        self._reconsider()
        if (
            trial.ended
            and not trial.diverged
            and (self._best is None or self._beats(len(self._trials) - 1, self._best))
        ):
            self._best = len(self._trials) - 1

    def stop(self, trial: Trial) -> bool:
        """See `Strategy`."""
        if self._best is None or trial.taken < _LEAST_SEEN * self._trial_steps or len(trial.losses) < 3:
            return False
        best, found = self._trials[self._best], self._foreseen(trial)
        recent = max(len(trial.losses) // 3, 1)
        now = float(np.mean(trial.losses[-recent:]))
        then = float(np.mean(np.interp(trial.steps[-recent:], best.steps, best.losses)))
        there = self._forecasts[self._best]
        return now > then and found.mean - there.mean > _DOMINATED * math.hypot(found.std, there.std)

    def choose(self) -> int | None:
        """See `Strategy`."""
        return self._best

    def forecast(self, trial: int) -> Forecast:
        """See `Strategy`."""
        return self._forecasts[trial]

    def _beats(self, new: int, best: int) -> bool:
        rates = self._trials[new].rate, self._trials[best].rate
        if isinstance(self._backend, LRSearch):
            return self._backend.expected(rates[0])[0] < self._backend.expected(rates[1])[0]
        return self._forecasts[new].mean < self._forecasts[best].mean

    def _reconsider(self) -> None:
        """A fast trial shows slower ones what lies ahead of them: forecasts them again and tells the search."""
        for index, trial in enumerate(self._trials[:-1]):
            if trial.diverged or trial.rate > self._trials[-1].rate:
                continue
            found = self._foreseen(trial)
            if found != self._forecasts[index]:
                self._forecasts[index] = found
                if isinstance(self._backend, LRSearch):  # it replaces what it was told of a rate
                    self._backend.tell(trial.rate, found.mean, found.std)

    def _foreseen(self, trial: Trial) -> Forecast:
        """The trial's forecast from its own losses, followed by those of a faster trial on the same path."""
        if trial.diverged:
            return Forecast(math.inf, math.inf)
        times, values = [float(s) for s in trial.steps], [float(v) for v in trial.losses]
        own = len(values)
        if own >= 3:
            drop = values[0] - values[-1]
            faster = sorted(
                (t for t in self._trials if t.rate > 1.2 * trial.rate and not t.diverged), key=lambda t: t.rate
            )
            for other in faster:
                ahead = [s * other.rate / trial.rate for s in other.steps]
                there = float(np.interp(times[-1], ahead, other.losses))
                if drop > 0 and abs(there - values[-1]) <= _SAME_PATH * drop:
                    # what it gives back is its own noise or instability, which a slower rate does not have
                    end = len(ahead) if other.losses[-1] <= there else other.losses.index(min(other.losses)) + 1
                    more = [(t, v) for t, v in zip(ahead[:end], other.losses[:end], strict=True) if t > times[-1]]
                    shift, scale = values[own - 1] - there, times[own - 1]
                    times += [t for t, _ in more]
                    values += [v + shift * math.exp(1.0 - t / scale) for t, v in more]
        return self._forecaster(times, values, float(self._horizon))
