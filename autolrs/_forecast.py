"""Where will this loss be? Extrapolation of a short loss curve with an honest standard deviation.

AutoLRS (Jin et al., ICLR 2021, section 4.2) fits one exponential `a exp(b t) + c`. Real curves are sums of many rates and
a hundred noisy losses seldom tell which, so the answer here is an average over many shapes by their evidence, the
noise level marginalised.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_ndtr, ndtr, ndtri, stdtrit

from trainkit.autolrs._shapes import Shapes, Terms

Array = NDArray[np.float64]

_MOST_POINTS = 64
_ROUNDS = 3
# Prior shares of one exponential, two, and a power law.
_SHARES = (0.65, 0.15, 0.2)
# Prior density of a single exponential's log rate: rate^-0.2. What has barely moved is slow, not finished.
_SLOW = 0.2
# Prior standard deviation of the drop inside the window, in units of the curve's range, for a shape that falls wholly
# inside it; it shrinks with this power of the share that does.
_PRIOR_STD, _PRIOR_POWER = 1.4, 0.3
# A falling term is the rule, a rising one the exception.
_RISING = 0.03
_LEAST_NOISE = 1e-4
_OUTLIER = 3.5
# No shape is the true one: this share of the drop still to come is doubt. A sum of two rates is a sum of more.
_DOUBT = (0.02, 0.6, 0.05)
# The shapes' own bands are this much too narrow over curves of all families.
_WIDER = 1.25
# Band of the interface: mean +- 1.2816 std holds four fifths of a Gaussian, and of the belief.
_BAND, _Z = 0.8, float(ndtri(0.9))
_NEGLIGIBLE = 9.0
# Standard normal quantiles that stand for a Gaussian.
_QUANTILES = (np.arange(15) + 0.5) / 15


@dataclass(frozen=True)
class Forecast:
    """The noise-free loss at the horizon.

    Attributes:
        mean: expected loss, in the unit of the losses; inf for a curve that diverged.
        std: of the noise-free value (not of a single noisy loss): four fifths of the belief lie within 1.2816 of it
            around the mean, as for a Gaussian; inf where nothing is known.
    """

    mean: float
    std: float


def _difference_noise(t: Array, y: Array) -> float:
    """Robust noise level from second differences on an uneven grid (Gasser, Sroka and Jennen-Steinmetz, 1986)."""
    gap = t[2:] - t[:-2]
    left, right = (t[2:] - t[1:-1]) / gap, (t[1:-1] - t[:-2]) / gap
    residual = (left * y[:-2] + right * y[2:] - y[1:-1]) / np.sqrt(left**2 + right**2 + 1.0)
    return float(1.4826 * np.median(np.abs(residual)))


def _binned(t: Array, y: Array) -> tuple[Array, Array, Array]:
    """At most `_MOST_POINTS` points: the first ones, where a curve bends most, and means of the rest, with their counts."""
    head = min(len(t), _MOST_POINTS // 2)
    bins = min(len(t) - head, _MOST_POINTS // 2)
    starts = np.concatenate([np.arange(head), head + (np.arange(bins) * (len(t) - head)) // max(bins, 1)])
    count = np.diff(np.append(starts, len(t))).astype(np.float64)
    return np.add.reduceat(t, starts) / count, np.add.reduceat(y, starts) / count, count


def forecast(
    losses: ArrayLike, horizon: float, *, steps: ArrayLike | None = None, floor: float | None = None
) -> Forecast:
    """Forecasts the noise-free loss at step `horizon` from a short curve. Never raises.

    Every shape (one exponential, the sum of two, power laws) is fitted to the raw losses in units of the curve's own
    range; the shapes are averaged by their evidence, so a curve whose asymptote cannot be identified gets a wide band
    instead of a confident guess.

    Args:
        losses: [n] loss values, any scale and offset; non-finite ones inside the curve are dropped.
        horizon: step to forecast, on the axis of `steps`.
        steps: [n] increasing step numbers of the losses, default 0, 1, ...
        floor: a value that the noise-free loss cannot fall below (0 for a cross entropy), if known.

    Returns:
        The forecast. A curve that ends in nan or inf, has no finite loss, or overflows, diverged: mean and std are inf. One
        loss is its own forecast with std inf; two are forecast by the last, with twice their difference as std.
    """
    y = np.asarray(losses, dtype=np.float64).ravel()
    t = np.arange(len(y), dtype=np.float64) if steps is None else np.asarray(steps, dtype=np.float64).ravel()[: len(y)]
    y = y[: len(t)]
    if len(y) == 0 or not np.isfinite(y[-1]):
        return Forecast(float("inf"), float("inf"))
    good = np.isfinite(y) & np.isfinite(t)
    t, y = t[good], y[good]
    if len(y) == 0:
        return Forecast(float("inf"), float("inf"))
    if len(y) < 3 or t[-1] <= t[0]:
        std = 2.0 * float(np.ptp(y)) if len(y) > 1 else float("inf")
        return _floored(float(y[-1]), std, floor)
    offset = float(np.median(y))
    t, y, count = _binned(t, y)
    with np.errstate(over="ignore"):
        scale = float(np.ptp(y))
    if not np.isfinite(scale):
        return Forecast(float("inf"), float("inf"))
    if scale <= 1e-12 * max(abs(offset), 1e-300):
        return _floored(offset, 0.0, floor)
    mean, std = _average(
        t, (y - offset) / scale, count, float(horizon), None if floor is None else (floor - offset) / scale
    )
    return _floored(offset + scale * mean, scale * std, floor)


def _floored(mean: float, std: float, floor: float | None) -> Forecast:
    return Forecast(mean if floor is None else max(mean, float(floor)), std)


def _average(t: Array, y: Array, count: Array, horizon: float, floor: float | None) -> tuple[float, float]:
    """Mean and std at the horizon of the evidence-weighted mixture, in the curve's own units."""
    window = t[-1] - t[0]
    u = (t - t[0]) / window
    shapes = Shapes(u, max(horizon - t[0], 0.0) / window)
    belief = np.repeat(np.log(_SHARES), shapes.sizes)
    noise, weight, correlation = max(_difference_noise(u, y), _LEAST_NOISE), count, 0.0
    for rounds_left in reversed(range(_ROUNDS)):
        # Neighbours that agree hold fewer facts: a wandering curve counts as a shorter one.
        facts = weight * (1.0 - correlation) / (1.0 + correlation)
        fit = _fit(shapes.terms(), y, facts, noise)
        density = fit.log_evidence + belief - _SLOW * shapes.log_speed
        log_weight = density + shapes.log_share
        if rounds_left:
            residual = y - fit.fitted(int(np.argmax(log_weight)))
            spread = max(1.4826 * float(np.median(np.abs(residual))), _LEAST_NOISE)
            weight = count / np.maximum(np.abs(residual) / (_OUTLIER * spread), 1.0) ** 2
            freedom = max(float(weight.sum()) - 3.0, 1.0)
            noise = max(float(np.sqrt((weight * residual**2).sum() / freedom)), _LEAST_NOISE)
            if len(y) >= 6:
                correlation = float(residual[1:] @ residual[:-1]) / max(float(residual @ residual), 1e-300)
                correlation = min(max(correlation, 0.0), 0.9)
            shapes.close_in(density)
    return _band(fit, log_weight, np.repeat(_DOUBT, shapes.sizes), floor)


@dataclass(frozen=True)
class _Fit:
    """Linear regression of every model: level + a * first term + b * second term."""

    terms: Terms
    level: Array  # [M] at the window's end
    coefficients: Array  # [2, M]
    log_evidence: Array  # [M], up to a constant
    mean: Array  # [M] at the horizon
    std: Array  # [M] of the Gaussian that has the same band as the Student t

    def fitted(self, model: int) -> Array:
        """[n] one model's curve."""
        a, b = self.coefficients[:, model]
        return np.asarray(self.level[model] + a * self.terms.first[model] + b * self.terms.second[model])


def _fit(terms: Terms, y: Array, weight: Array, noise: float) -> _Fit:
    """Ridge regression of all models at once, the noise level marginalised, with the terms' signs weighed."""
    total = float(weight.sum())
    average = float(weight @ y) / total
    y = y - average
    shift1, shift2 = terms.first @ weight / total, terms.second @ weight / total
    first, second = terms.first - shift1[:, None], terms.second - shift2[:, None]
    ridge = (noise / _PRIOR_STD) ** 2 * terms.drop ** (-2.0 * _PRIOR_POWER)
    used = second[:, 0] > second[:, -1]
    g11, g22, g12 = (first * first) @ weight + ridge, (second * second) @ weight + ridge, (first * second) @ weight
    r1, r2 = first @ (weight * y), second @ (weight * y)
    determinant = g11 * g22 - g12**2
    v11, v22, v12 = g22 / determinant, g11 / determinant, -g12 / determinant
    a, b = v11 * r1 + v12 * r2, v12 * r1 + v22 * r2
    misfit = np.maximum(float(weight @ (y * y)) - a * r1 - b * r2, 0.0) + total * _LEAST_NOISE**2
    freedom = max(total - 3.0, 1.0)
    variance = misfit / freedom
    falling = log_ndtr(a / np.sqrt(variance * v11))
    falling += np.where(used, log_ndtr(b / np.sqrt(variance * v22)), 0.0)
    log_evidence = -0.5 * np.log(determinant / ridge**2) - 0.5 * max(total - 1.0, 1.0) * np.log(misfit)
    log_evidence += np.logaddexp(falling, np.log(_RISING))
    x1, x2 = terms.first_ahead - shift1, terms.second_ahead - shift2
    spread = 1.0 / total + v11 * x1**2 + 2.0 * v12 * x1 * x2 + v22 * x2**2
    std = np.sqrt(np.maximum(variance * spread, 0.0)) * float(stdtrit(freedom, 0.9)) / _Z
    level = average - a * shift1 - b * shift2
    return _Fit(terms, level, np.stack([a, b]), log_evidence, average + a * x1 + b * x2, std)


def _band(fit: _Fit, log_weight: Array, doubt: Array, floor: float | None) -> tuple[float, float]:
    """Centre of the mixture at the horizon, and the std whose band around it holds four fifths of the mixture.

    Not the mixture's variance: a few implausible models with a long way down would make that all there is.
    """
    likely = log_weight > log_weight.max() - _NEGLIGIBLE
    weight, mean = np.exp(log_weight[likely] - log_weight.max())[:, None], fit.mean[likely][:, None]
    std = np.hypot(fit.std[likely], doubt[likely] * np.abs(mean[:, 0] - fit.level[likely]))[:, None]
    if floor is None:
        values = mean + std * ndtri(_QUANTILES)
    else:  # each Gaussian given that it lies above the floor; far below it, at the floor
        above = ndtr(-np.minimum((floor - mean) / np.maximum(std, 1e-12), 30.0))
        values = np.maximum(mean - std * ndtri(above * (1.0 - _QUANTILES)), floor)
        weight = weight * np.maximum(above, 1e-12)
    share = np.broadcast_to(weight, values.shape).ravel()
    centre = _quantile(values.ravel(), share, 0.5)
    return centre, _WIDER * _quantile(np.abs(values.ravel() - centre), share, _BAND) / _Z


def _quantile(values: Array, weight: Array, share: float) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weight[order])
    return float(np.interp(share, (reached - 0.5 * weight[order]) / reached[-1], values[order]))
