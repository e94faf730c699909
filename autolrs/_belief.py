"""A Gaussian process over log10 rate of the harm that a rate does: how many decades it lies above the critical rate.

The harm rises by one a decade on average, from 0 at the critical rate, of which each piece of knowledge is an observation
with a std; what deviates from the line is a Matern 5/2 process. A trial shows the sign of the harm at its rate: the loss
ends above where it began, or not. Such observations are taken in by expectation propagation with a probit likelihood
(Rasmussen and Williams, 2006, section 3.6).

Progress is what the harm leaves of the sum of rates: below the critical rate the loss falls as if more rate were more steps,
above it the rate spoils more than it gains (`_law.py` has the law).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from trainkit.autolrs._prior import Prior
from trainkit.autolrs._surrogate import matern52

Array = NDArray[np.float64]

# Draws of the belief, always the same; grid steps in decades; rounds of expectation propagation, which settles in a few.
DRAWS, _STEP, _ROUNDS = 512, 0.05, 12
# Before anything is known: the middle of the range, and its std in decades.
_BLIND = 2.0
# The most that harm is worth, nepers: a trial that would spoil more is not adopted anyway.
_MOST_LAG = 20.0


@dataclass(frozen=True)
class Known:
    """An observation of the critical rate: log10 of it, and its std in decades."""

    log_rate: float
    std: float


@dataclass(frozen=True)
class Observed:
    """A trial: log10 of its rate, whether it worked, whether it diverged (its harm is far above 0, then), and by how many
    decades (std) the critical rate may have moved since; and whether that was at the run's start.
    """

    log_rate: float
    worked: bool
    diverged: bool = False
    blur: float = 0.0
    first: bool = False


class Belief:
    """What is believed of every rate.

    Args:
        prior: constants.
        known: observations of the critical rate.
        trials: observed trials.
        low: log10 of the least rate.
        high: log10 of the greatest rate.
        done: S1 before the search.
        ahead: steps to come, each weighted by the schedule's share of the peak rate.

    Attributes:
        grid: [G] log10 rates; those of the trials come last.
        progress: [DRAWS, G] ln of the sum of rates at the run's end that each rate is worth, nepers.
        critical: the critical rate.
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
    ) -> None:
        tried = np.array([t.log_rate for t in trials])
        self.grid = np.concatenate([np.linspace(low, high, max(round((high - low) / _STEP), 1) + 1), tried])
        self._tried = len(self.grid) - len(tried) + np.arange(len(tried))
        centre, variance = _combined([*known, Known((low + high) / 2.0, _BLIND)])
        # the last one is the line's height alone, which is what is asked of the critical rate
        mean = np.append(self.grid - centre, 0.0)
        covariance = np.full((len(mean), len(mean)), variance)
        covariance[:-1, :-1] += prior.spread**2 * matern52(self.grid, self.grid, prior.length)
        sites = _propagated(mean[self._tried], covariance[np.ix_(self._tried, self._tried)], trials, prior)
        mean, covariance = _conditioned(mean, covariance, self._tried, *sites)
        self.critical = Known(centre - float(mean[-1]), math.sqrt(max(float(covariance[-1, -1]), 1e-12)))
        values, vectors = np.linalg.eigh(covariance[:-1, :-1])
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        random = np.random.default_rng(0)
        harm = mean[:-1] + random.standard_normal((DRAWS, len(self.grid))) @ root.T
        self._fails = harm + prior.edge * random.standard_normal((DRAWS, 1)) > 0.0
        lag = np.minimum(10.0 ** np.minimum(prior.growth * harm, 3.0) / prior.growth, _MOST_LAG)
        self.progress = np.log(prior.memory * done + 10.0**self.grid * ahead) - lag

    def of(self, trial: int) -> Array:
        """[DRAWS] progress of a trial's rate, of the last one for -1."""
        return np.asarray(self.progress[:, self._tried[trial]])

    def near(self, log_rate: float) -> Array:
        """[DRAWS] progress of the grid's rate nearest to one."""
        return np.asarray(self.progress[:, int(np.argmin(np.abs(self.grid - log_rate)))])

    def improvement(self, best: Array) -> Array:
        """[G] nepers that a trial of a rate is expected to win over the best rate's progress [DRAWS], adopted if it works."""
        return np.asarray((np.maximum(self.progress - best[:, None], 0.0) * ~self._fails).mean(0))

    @property
    def harmful(self) -> Array:
        """[G] probability that a trial of a rate does not work."""
        return np.asarray(self._fails.mean(0))


def _combined(known: Sequence[Known]) -> tuple[float, float]:
    """Mean and variance of the product of Gaussian observations."""
    weights = np.array([k.std**-2.0 for k in known])
    return float(weights @ [k.log_rate for k in known] / weights.sum()), float(1.0 / weights.sum())


def _propagated(mean: Array, covariance: Array, trials: Sequence[Observed], prior: Prior) -> tuple[Array, Array]:
    """Expectation propagation: the Gaussian observations [n], as precisions and precision-weighted values, that stand for
    the trials.
    """
    precision, shift = np.full(len(trials), 1e-9), np.zeros(len(trials))
    for _ in range(_ROUNDS):
        for i, trial in enumerate(trials):
            m, c = _conditioned(mean, covariance, np.arange(len(trials)), precision, shift)
            # the trial's own part is taken out, its likelihood put in, and the moments compared
            left = 1.0 / max(float(c[i, i]), 1e-12) - precision[i]
            if left <= 0.0:
                continue
            at = (float(m[i]) / max(float(c[i, i]), 1e-12) - shift[i]) / left
            sign = -1.0 if trial.worked else 1.0
            edge = prior.further if trial.diverged else 0.0
            wide = math.sqrt(prior.edge**2 + trial.blur**2 + 1.0 / left)
            z = sign * (at - edge) / wide
            ratio = math.exp(-0.5 * z * z - 0.5 * math.log(2.0 * math.pi) - float(log_ndtr(z)))
            new_mean = at + sign * ratio / (left * wide)
            new_variance = 1.0 / left - ratio * (z + ratio) / (left * wide) ** 2
            precision[i] = max(1.0 / new_variance - left, 1e-9)
            shift[i] = new_mean / new_variance - at * left
    return precision, shift


def _conditioned(
    mean: Array, covariance: Array, at: NDArray[np.int_], precision: Array, shift: Array
) -> tuple[Array, Array]:
    """A Gaussian given observations of some of its entries, with precisions and precision-weighted values."""
    if not len(at):
        return mean, covariance
    gain = np.linalg.solve(covariance[np.ix_(at, at)] + np.diag(1.0 / precision), covariance[at]).T
    return mean + gain @ (shift / precision - mean[at]), covariance - gain @ covariance[at]
