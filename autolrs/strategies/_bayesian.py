"""The default: Bayesian, by forecasts of the loss at the run's end under the schedule that follows.

A trial's losses are read on the annealing law's clock (`_law.py`): how many steps' worth of progress its rate would make by
the run's end, after what it spoils. A Gaussian process over log rate holds that progress (`_belief.py`). A further trial is
made only while the progress that it is expected to win exceeds the progress of the steps that it costs, as in
cost-sensitive freeze-thaw optimisation (CFBO, NeurIPS 2025): both are nepers of the same sum of rates, so the rule has no
constant of its own.
"""

import math
from collections.abc import Sequence

import numpy as np

from trainkit.autolrs._belief import Belief, Known, Observed
from trainkit.autolrs._forecast import Forecast, forecast
from trainkit.autolrs._law import Path, lags, reference
from trainkit.autolrs._prior import Prior
from trainkit.autolrs.strategies._strategy import Situation, Trial, worked

# Two rates nearer than this are one: a trial each would tell nothing.
_APART = 0.2
# How far from the rates that worked a rate is tried, decades: the spacing of the library's rates, within which a lag is known
# to go from nothing to all (`benchmarks/autolrs/prior.py`).
_REACH = 0.5
# A running trial ends when it is so unlikely to win, after this share of its steps.
_HOPELESS, _SEEN = 0.05, 0.5
# Std of a lag of which nothing was seen, nepers.
_NOTHING = 10.0


class Bayesian:
    """One search.

    Args:
        prior: constants.
        situation: where the search stands.
        known: what earlier searches believe of the critical rate.
        aged: lags that the last search observed, their stds widened by what has passed since.
        before: (S1, loss) of the run so far.
        low: least rate.
        high: greatest rate.
        positive: whether losses cannot fall below 0.
    """

    keeps = True

    def __init__(
        self,
        prior: Prior,
        situation: Situation,
        known: Sequence[Known],
        aged: Sequence[Observed],
        before: Sequence[tuple[float, float]],
        low: float,
        high: float,
        positive: bool,
    ) -> None:
        self._prior, self._at, self._aged, self._before = prior, situation, list(aged), list(before)
        self._low, self._high, self._positive = math.log10(low), math.log10(high), positive
        self._known = [*known]
        if situation.usual is not None:
            self._known.append(Known(math.log10(situation.usual) + prior.usual_offset, prior.usual_std))
        if situation.first or not known:
            self._known.append(Known(math.log10(situation.user), prior.user_std))
        self._trials: list[Trial] = []
        self._reason, self.asked = "", 0

    @property
    def critical(self) -> Known:
        """What is now believed of the critical rate."""
        return self._belief(self._trials).critical

    @property
    def reason(self) -> str:
        """See `Strategy`."""
        return self._reason

    def worth_a_search(self) -> bool:
        """Whether another rate than the present one is expected to win more than finding it costs."""
        belief = self._believed(self._aged)
        present = math.log10(self._at.present)
        gain = belief.improvement(belief.near(present))
        return float(gain[np.abs(belief.grid - present) <= _REACH].max()) > self._cost(self._at.trial_steps)

    def propose(self) -> float | None:
        """See `Strategy`."""
        at = self._at
        firsts = [at.usual if at.usual is not None else at.user, at.user] if at.first else [at.present]
        for rate in firsts[len(self._trials) :]:
            x = min(max(math.log10(rate), self._low), self._high)
            if self._apart(x):
                return float(10.0**x)
        belief, best = self._belief(self._trials), self._leading()
        gain = belief.improvement(None if best is None else belief.of(best)) * (at.until / at.left)
        gain[[not (self._apart(x) and self._near(x)) for x in belief.grid]] = -np.inf
        self.asked += 1
        found = int(np.argmax(gain))
        steps = max(at.trial_steps, self._trials[best].taken if best is not None else 0)
        cost = self._cost(steps) if self._sound() else 0.0
        if not math.isfinite(gain[found]):
            self._reason = "the range is tried"
            return None
        if gain[found] <= cost:
            self._reason = f"another trial would win {gain[found]:.2g} nepers and cost {cost:.2g}"
            return None
        return float(10.0 ** belief.grid[found])

    def observe(self, trial: Trial) -> None:
        """See `Strategy`."""
        self._trials.append(trial)

    def stop(self, trial: Trial) -> bool:
        """See `Strategy`."""
        best = self.choose()
        if best is None or trial.taken < _SEEN * self._at.trial_steps or len(trial.losses) < 3:
            return False
        there = self._trials[best]
        if trial.losses[-1] < float(np.interp(trial.steps[-1], there.steps, there.losses)):
            return False
        return self._belief([*self._trials, trial]).chance(len(self._trials), best) < _HOPELESS

    def choose(self) -> int | None:
        """See `Strategy`."""
        able = [i for i, trial in enumerate(self._trials) if self._works(trial)]
        able = able or [i for i, trial in enumerate(self._trials) if self._no_worse(trial)]
        if not able:
            return None
        belief = self._belief(self._trials)
        return max(able, key=lambda i: float(belief.of(i).mean()))

    def _sound(self) -> bool:
        """Whether a search may end by its cost: a rate worked, or a slower one than that in force rose as far, too."""
        if any(map(self._works, self._trials)):
            return True
        alive = [t for t in self._trials if t.ended and not t.diverged]
        return len(alive) > 1 and alive[-1].losses[-1] >= alive[0].losses[-1]

    def _no_worse(self, trial: Trial) -> bool:
        """Whether a trial ended no higher than that of the rate in force, which rises, too: a loss with a schedule of its own."""
        if self._at.first or trial.diverged or not trial.ended:
            return False
        first = self._trials[0]
        return first.ended and not first.diverged and trial.losses[-1] <= first.losses[-1]

    def _leading(self) -> int | None:
        """The trial to be beaten: the chosen one, else of those that did not diverge the one with the most progress."""
        best = self.choose()
        alive = [i for i, trial in enumerate(self._trials) if not trial.diverged and trial.ended]
        if best is not None or not alive:
            return best
        belief = self._belief(self._trials)
        return max(alive, key=lambda i: float(belief.of(i).mean()))

    @property
    def rates(self) -> list[float]:
        """Rates of the observed trials."""
        return [trial.rate for trial in self._trials]

    @property
    def lags(self) -> tuple[tuple[float, float, float], ...]:
        """(log10 rate, lag, std) of each trial."""
        return tuple((o.log_rate, o.lag, o.std) for o in self._observed(self._trials))

    def forecast(self, trial: int) -> Forecast:
        """See `Strategy`."""
        told = self._trials[trial]
        healthy = [t for t in self._trials if not t.diverged and len(t.losses) >= 2]
        if told.diverged or told not in healthy:
            return Forecast(math.inf, math.inf)
        paths = [_path(t) for t in healthy]
        best = paths[reference(paths)]
        points = sorted([*self._before, *zip(best.sums.tolist(), best.losses.tolist(), strict=True)])
        progress = self._belief(self._trials).of(trial)
        mean, std = float(np.mean(progress)), float(np.std(progress))
        sums, losses = [s for s, _ in points], [v for _, v in points]
        floor = 0.0 if self._positive else None
        found = forecast(losses, math.exp(mean), steps=sums, floor=floor)
        later = forecast(losses, math.exp(mean + std), steps=sums, floor=floor)
        return Forecast(found.mean, self._prior.forecast_scale * math.hypot(found.std, found.mean - later.mean))

    def _cost(self, steps: int) -> float:
        """Nepers of progress that `steps` of the steps to come are worth."""
        return -math.log(max(1.0 - steps / max(self._at.left, steps + 1), 1e-9))

    def _near(self, x: float) -> bool:
        """Whether a rate is within reach: of those whose loss fell, or between them and those that failed."""
        ended = [t for t in self._trials if t.ended and not t.diverged]
        fell = [math.log10(t.rate) for t in ended if self._works(t) or t.losses[-1] <= t.losses[0]]
        fails = [math.log10(t.rate) for t in self._trials if t.diverged or (t.ended and math.log10(t.rate) not in fell)]
        most = min(fails, default=math.inf) - _APART
        if not fell:
            return x <= most
        return min(fell) - _REACH <= x <= max(max(fell) + _REACH, most if fails else -math.inf)

    def _apart(self, x: float) -> bool:
        return all(abs(x - math.log10(t.rate)) >= _APART for t in self._trials)

    def _observed(self, trials: Sequence[Trial]) -> list[Observed]:
        """The trials' lags; of one whose losses say nothing, that it did not diverge."""
        paths = [None if t.diverged or len(t.losses) < 2 else _path(t) for t in trials]
        healthy = [p for p in paths if p is not None]
        seen = iter(lags(healthy, self._prior.memory, self._misfit(healthy)) if healthy else [])
        found = []
        for trial, path in zip(trials, paths, strict=True):
            x = min(max(math.log10(trial.rate), self._low), self._high)
            if path is None:
                found.append(Observed(x, math.inf, 0.0) if trial.diverged else Observed(x, 0.0, _NOTHING))
            else:
                lag = next(seen)
                found.append(Observed(x, lag.value, lag.std))
        return found

    def _misfit(self, paths: Sequence[Path]) -> float:
        """By how much losses at the same S1 differ: a share of what the run, or its best trial, has fallen."""
        return self._prior.misfit * max(self._at.fallen, *(float(p.losses[0] - p.losses.min()) for p in paths))

    def _works(self, trial: Trial) -> bool:
        return worked(trial, self._prior.misfit * self._at.fallen)

    def _belief(self, trials: Sequence[Trial]) -> Belief:
        """The belief after some trials."""
        return self._believed(self._observed(trials))

    def _believed(self, observed: Sequence[Observed]) -> Belief:
        at, prior = self._at, self._prior
        weight = prior.first_weight if at.first else prior.later_weight
        return Belief(prior, self._known, observed, self._low, self._high, done=at.done, ahead=at.ahead, weight=weight)


def _path(trial: Trial) -> Path:
    return Path(trial.rate, np.array(trial.sums), np.array(trial.losses))
