"""The default: Bayesian optimisation of the progress at the run's end, under the harm that trials show.

By the annealing law (`_law.py`) the loss at the run's end falls with the sum of the rates, so more rate is more progress, up to
the critical rate, above which it does harm. Short losses rank the rates below it hardly at all (a small rate loses its noise
at once, and its progress only in the long run), but they do show harm: the loss at averaged weights ends above its start. So
that is what a trial is asked, and a Gaussian process (`_belief.py`) says where the next one is worth most.

A further trial is made only while the progress that it is expected to win exceeds the progress of the steps that it costs, as
in cost-sensitive freeze-thaw optimisation (CFBO, NeurIPS 2025): both are nepers of the same sum of rates, so the rule has no
constant of its own.
"""

import math
from collections.abc import Sequence

import numpy as np

from trainkit.autolrs._belief import DRAWS, Array, Belief, Known, Observed
from trainkit.autolrs._forecast import Forecast, forecast
from trainkit.autolrs._prior import Prior
from trainkit.autolrs.strategies._strategy import Situation, Trial, worked

# Two rates nearer than this are one, and no rate is tried further than that above those that worked, decades.
_APART, _REACH = 0.35, 1.0
# The rate in force does harm where the run has lost so much of what it had won.
_LOST = 0.5
# A running trial may end after this share of its steps.
_SEEN = 0.5


class Bayesian:
    """One search.

    Args:
        prior: constants.
        situation: where the search stands.
        seen: trials of earlier searches.
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
        seen: Sequence[Observed],
        before: Sequence[tuple[float, float]],
        low: float,
        high: float,
        positive: bool,
    ) -> None:
        self._prior, self._at, self._before = prior, situation, list(before)
        self._low, self._high, self._positive = math.log10(low), math.log10(high), positive
        self._force = min(max(math.log10(situation.present), self._low), self._high)
        self._known, self._seen = [Known(math.log10(situation.user), prior.user_std)], list(seen)
        if situation.usual is not None:
            self._known.append(Known(math.log10(situation.usual) + prior.usual_offset, prior.usual_std))
        self._trials: list[Trial] = []
        self._now: float | None = None
        self._reason, self.asked = "", 0

    @property
    def critical(self) -> Known:
        """What is now believed of the critical rate."""
        return self._belief().critical

    @property
    def reason(self) -> str:
        """See `Strategy`."""
        return self._reason

    @property
    def observed(self) -> list[Observed]:
        """This search's trials."""
        return [
            Observed(min(max(math.log10(t.rate), self._low), self._high), self._works(t), t.diverged or not t.ended)
            for t in self._trials
        ]

    def begin(self, loss: float | None) -> None:
        """See `Strategy`."""
        self._now = loss

    def propose(self) -> float | None:
        """See `Strategy`."""
        at, able = self._at, self._able()
        if at.first:
            known = self._next_known(bool(able))
            if known is not None or able:
                self._reason = "a known rate works, and the run's first steps reward rates that harm it later"
                return known
        elif able:
            self._reason = "its rate works: a further one is tried from its end"
            return None
        if not able and not self._steady() and self._rises():
            self._reason = "the loss rises at a smaller rate as well"
            return None
        self.asked += 1
        belief = self._belief()
        surplus = self._surplus(belief)
        found = int(np.argmax(surplus))
        if surplus[found] <= 0.0:
            self._reason = "no other rate is expected to win what its trial costs"
            return None
        return float(10.0 ** belief.grid[found])

    def observe(self, trial: Trial) -> None:
        """See `Strategy`."""
        self._trials.append(trial)
        if self._now is None and trial.losses:
            self._now = trial.losses[0]

    def stop(self, trial: Trial) -> bool:
        """See `Strategy`."""
        if trial.taken < _SEEN * self._at.trial_steps or len(trial.losses) < 3:
            return False
        # twice what the run had gained is gone
        return trial.losses[-1] > trial.losses[0] + 2.0 * max(self._fallen(trial), trial.losses[0] - min(trial.losses))

    def choose(self) -> int | None:
        """See `Strategy`."""
        able = self._able()
        if able:
            belief = self._belief()
            return max(able, key=lambda i: float(self._of(belief, i).mean()))
        if self._steady():
            return None
        # a loss that rises at every rate, for a schedule of its own, say: where it rises least
        alive = [i for i, t in enumerate(self._trials) if t.ended and not t.diverged and t.losses[-1] < self._at.began]
        return min(alive, key=lambda i: self._trials[i].losses[-1], default=None)

    def forecast(self, trial: int) -> Forecast:
        """See `Strategy`."""
        told = self._trials[trial]
        if told.diverged or len(told.losses) < 2:
            return Forecast(math.inf, math.inf)
        points = sorted([*self._before, *zip(told.sums, told.losses, strict=True)])
        progress = self._of(self._belief(), trial)
        mean, std = float(np.mean(progress)), float(np.std(progress))
        sums, losses = [s for s, _ in points], [v for _, v in points]
        floor = 0.0 if self._positive else None
        found = forecast(losses, math.exp(mean), steps=sums, floor=floor)
        later = forecast(losses, math.exp(mean + std), steps=sums, floor=floor)
        return Forecast(found.mean, self._prior.forecast_scale * math.hypot(found.std, found.mean - later.mean))

    @property
    def fallback(self) -> float | None:
        """See `Strategy`."""
        return self._at.present if self._steady() else None

    def _next_known(self, works: bool) -> float | None:
        """The class's usual rate; then the user's own, if the usual one does not work or it is worth its trial."""
        at = self._at
        for rate in [at.user if at.usual is None else at.usual, at.user][len(self._trials) :]:
            x = min(max(math.log10(rate), self._low), self._high)
            if not self._apart(x):
                continue
            if not works:
                return float(10.0**x)
            belief = self._belief()
            if self._surplus(belief)[int(np.argmin(np.abs(belief.grid - x)))] > 0.0:
                return float(10.0**x)
        return None

    def _surplus(self, belief: Belief) -> Array:
        """[G] nepers that a trial is expected to win over the best rate so far, less what it costs; -inf out of reach."""
        at, able = self._at, self._able()
        steady = self._steady()
        if able:
            base = self._of(belief, able[-1])
            # whichever of the two loses, its steps are thrown away
            lost = np.full(len(belief.grid), at.trial_steps)
        else:
            # the rate in force goes on as it is; where that does harm, whatever works wins
            base = belief.near(self._force) if steady else np.full(DRAWS, float(belief.progress.min()))
            lost = at.trial_steps * belief.harmful
        cost = -np.log(np.maximum(1.0 - lost / max(at.left, at.trial_steps + 1), 1e-9))
        surplus = np.asarray(belief.improvement(base) * (at.until / at.left) - cost)
        reached = [math.log10(self._trials[i].rate) for i in able] or [self._force]
        surplus[belief.grid > max(reached) + _REACH] = -np.inf
        if steady:
            # that a smaller rate works as well says nothing for it, and what failed is not tried until it works by chance;
            # failures of the run's first steps are no failures later
            failed = [o.log_rate for o in self._seen if not (o.worked or o.first)]
            surplus[belief.grid <= self._force + _APART] = -np.inf
            surplus[belief.grid > min(failed, default=math.inf) - _APART] = -np.inf
        elif not at.first:
            surplus[belief.grid > self._force - _APART] = -np.inf
        surplus[[not self._apart(x) for x in belief.grid]] = -np.inf
        return surplus

    def _steady(self) -> bool:
        """Whether the rate in force has done no harm since it was chosen: it has not lost half of what was won."""
        at = self._at
        if at.first or self._now is None or not math.isfinite(at.best):
            return not at.first
        return self._now <= at.best + _LOST * max(at.began - at.best, 0.0)

    def _of(self, belief: Belief, trial: int) -> Array:
        """[DRAWS] progress of a trial's rate."""
        return belief.of(trial - len(self._trials))

    def _apart(self, x: float) -> bool:
        return all(abs(x - math.log10(t.rate)) >= _APART for t in self._trials)

    def _able(self) -> list[int]:
        return [i for i, trial in enumerate(self._trials) if self._works(trial)]

    def _works(self, trial: Trial) -> bool:
        most = self._spoilt(trial)
        if self._at.first and trial.losses:
            # the first steps fall at almost any rate: what comes back by half before the trial has ended goes on to rise
            most = (trial.losses[0] + min(trial.losses)) / 2.0
        return worked(trial, self._prior.slack * self._fallen(trial), most)

    def _spoilt(self, trial: Trial) -> float:
        """The loss above which a trial has spoiled what the run had won, whatever it began with."""
        if not self._steady() or not math.isfinite(self._at.best):
            return math.inf
        return self._at.best + self._prior.spoilt * self._fallen(trial)

    def _fallen(self, trial: Trial) -> float:
        """How far the run's loss has fallen by a trial's start, in its unit."""
        if self._at.first or not trial.losses:
            return 0.0
        return max(self._at.began - min(self._at.best, trial.losses[0]), 0.0)

    def _rises(self) -> bool:
        """Whether the last of two trials that lived, and failed, was slower than the other and no better."""
        alive = [t for t in self._trials if t.ended and not t.diverged]
        return len(alive) > 1 and alive[-1].rate < alive[-2].rate and alive[-1].losses[-1] >= alive[-2].losses[-1]

    def _belief(self) -> Belief:
        at = self._at
        force = [] if at.first or self._steady() else [Observed(self._force, False)]
        seen = [*force, *self._seen, *self.observed]
        return Belief(self._prior, self._known, seen, self._low, self._high, done=at.done, ahead=at.ahead)
