"""A Gaussian process over log10 rate of the lag that a rate causes, and what it leaves of the run's progress.

Mean function: progress ln S1 at the run's end, more rate, more of it, less the lag, which grows with the rate as
(rate / critical rate)^growth. The critical rate is unknown: the belief is a mixture over it, weighed by the evidence of the
trials and by what was known before, each piece of which is an observation of it with a std. The rest is a Matern 5/2 process
with each trial's own noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainkit.autolrs._prior import Prior
from trainkit.autolrs._surrogate import matern52

Array = NDArray[np.float64]

# Draws of the belief, always the same; grid steps in decades of candidates and of critical rates.
_DRAWS, _STEP, _CRITICAL_STEP = 512, 0.05, 0.05
# A mistaken piece of knowledge: so often, and then so many stds wide.
_MISTAKEN, _WIDE = 0.05, 3.0
_MOST_LAG = 20.0
# A difference in progress that is wider than this is told apart by any trial, nepers.
_MOST_SPREAD = 3.0
# Spread of the lag at which trials diverge, decades of the rate; and of the lag's unknown zero, nepers.
_EDGE, _ZERO = 0.3, 0.5


@dataclass(frozen=True)
class Known:
    """An observation of the critical rate: log10 of it, and its std in decades."""

    log_rate: float
    std: float


@dataclass(frozen=True)
class Observed:
    """A trial: log10 rate, lag and its std in nepers; a lag of inf for one that diverged."""

    log_rate: float
    lag: float
    std: float


class Belief:
    """What is believed of every rate's progress.

    Args:
        prior: constants.
        known: observations of the critical rate, at least one.
        trials: observed trials.
        low: log10 of the least rate.
        high: log10 of the greatest rate.
        done: S1 before the search.
        ahead: steps to come, each weighted by the schedule's share of the peak rate.
        weight: what a lag seen in a trial is worth at the run's end.
    """

    def __init__(
        self,
        prior: Prior,
        known: Sequence[Known],
        trials: Sequence[Observed],
        low: float,
        high: float,
        *,
        done: float,
        ahead: float,
        weight: float,
    ) -> None:
        self._prior = prior
        tried = np.array([t.log_rate for t in trials])
        grid = np.linspace(low, high, max(round((high - low) / _STEP), 1) + 1)
        self.grid = np.concatenate([grid, tried])
        self._tried = len(grid) + np.arange(len(tried))
        critical: Array = np.asarray(np.arange(low - 1.0, high + 2.0, _CRITICAL_STEP), dtype=np.float64)
        log_weight = sum((_log_known(critical, k) for k in known), np.zeros(len(critical)))
        mean = self._mean(critical, self.grid)  # [M, G]
        hazard = self._hazard(mean)
        finite = np.array([math.isfinite(t.lag) for t in trials], dtype=bool)
        for i, t in enumerate(trials):
            chance = hazard[:, self._tried[i]]
            log_weight += np.log(np.maximum(1.0 - chance if math.isfinite(t.lag) else chance, 1e-12))
        x, at = tried[finite], self._tried[finite]
        y = np.array([t.lag for t in trials])[finite]
        std = np.array([t.std for t in trials])[finite]
        covariance = prior.spread**2 * matern52(self.grid, self.grid, prior.length)
        if len(x):
            own = prior.noise**2 + std**2 + (prior.relative_noise * mean[:, at]) ** 2  # [M, n]
            inner = covariance[np.ix_(at, at)] + _ZERO**2 + own[:, None, :] * np.eye(len(x))
            factor = np.linalg.cholesky(inner)
            half = np.linalg.solve(factor, (y - mean[:, at])[:, :, None])[:, :, 0]
            log_weight += -0.5 * (half**2).sum(1) - np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(1)
            # the zero of the lag is common to all rates: it does not tell them apart and stays out of the rest
            across = np.linalg.solve(factor, np.broadcast_to(covariance[at], (len(critical), len(x), len(self.grid))))
            shift = np.einsum("mng,mn->mg", across, half)
        else:
            across, shift = np.zeros((len(critical), 0, len(self.grid))), np.zeros_like(mean)
        weights = np.exp(log_weight - log_weight.max())
        weights /= weights.sum()
        self.critical = Known(
            float(weights @ critical),
            float(np.sqrt(weights @ (critical - weights @ critical) ** 2)),
        )
        self._draw(weights, mean, shift, covariance, across, hazard, done, ahead, weight)

    def _mean(self, critical: Array, rates: Array) -> Array:
        exponent = self._prior.growth * (rates[None, :] - critical[:, None])
        return np.asarray(np.minimum(10.0 ** np.minimum(exponent, 3.0), _MOST_LAG))

    def _hazard(self, mean: Array) -> Array:
        """Chance that a trial diverges, by its mean lag."""
        over = (np.log10(np.maximum(mean, 1e-12)) - math.log10(self._prior.divergence)) / self._prior.growth
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(over / _EDGE * 1.7, -30.0, 30.0))))

    def _draw(
        self,
        weights: Array,
        mean: Array,
        shift: Array,
        covariance: Array,
        across: Array,
        hazard: Array,
        done: float,
        ahead: float,
        weight: float,
    ) -> None:
        """Samples [N, G] of progress at the run's end, in nepers."""
        count = np.floor(np.cumsum(weights) * _DRAWS + 0.5).astype(int)
        draws = np.random.default_rng(0)
        samples = []
        # what the trials leave open differs little between critical rates: that of the likeliest stands for all
        likeliest = int(np.argmax(weights))
        values, vectors = np.linalg.eigh(covariance - across[likeliest].T @ across[likeliest])
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        for m in np.flatnonzero(np.diff(count, prepend=0)):
            n = count[m] - (count[m - 1] if m else 0)
            lag = mean[m] + shift[m] + draws.standard_normal((n, len(self.grid))) @ root.T
            unstable = draws.random((n, len(self.grid))) < hazard[m]
            samples.append(np.where(unstable, _MOST_LAG, lag))
        lag = np.concatenate(samples)
        lag[:, self._tried] = np.minimum(lag[:, self._tried], _MOST_LAG)
        self._weight, self._lag = weight, np.median(lag, axis=0)
        self.progress = np.log(self._prior.memory * done + 10.0**self.grid * ahead) - weight * lag

    def of(self, trial: int) -> Array:
        """[N] draws of a tried rate's progress at the run's end, nepers."""
        return np.asarray(self.progress[:, self._tried[trial]])

    def near(self, log_rate: float) -> Array:
        """[N] draws of the progress of the grid's rate nearest to one, nepers."""
        return np.asarray(self.progress[:, int(np.argmin(np.abs(self.grid - log_rate)))])

    def improvement(self, best: Array | None) -> Array:
        """[G] what a trial of a rate is expected to win over the best rate's progress [N], nepers.

        The knowledge gradient of a choice between the two: a trial shows the lag with its noise, so the difference is
        drawn in towards its mean by the share of its variance that the trial can show. Without a best rate the base is
        the middle of all.
        """
        base = best[:, None] if best is not None else float(np.median(self.progress))
        ahead = self.progress - base
        mean = ahead.mean(0)
        blur = self._weight * np.hypot(self._prior.noise, self._prior.relative_noise * self._lag)
        spread = np.minimum(ahead.std(0), _MOST_SPREAD)
        shown = spread / np.maximum(np.hypot(spread, blur), 1e-12)
        return np.asarray(np.maximum(mean + shown * (ahead - mean), 0.0).mean(0))

    def chance(self, trial: int, best: int) -> float:
        """Probability that a trial's rate makes more progress than the best one's."""
        return float((self.of(trial) > self.of(best)).mean())


def _log_known(critical: Array, known: Known) -> Array:
    z = (critical - known.log_rate) / known.std
    narrow = (1.0 - _MISTAKEN) * np.exp(-0.5 * z**2)
    return np.asarray(np.log(narrow + _MISTAKEN / _WIDE * np.exp(-0.5 * (z / _WIDE) ** 2) + 1e-12))
