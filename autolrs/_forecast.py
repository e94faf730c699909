"""Where will this loss be? Extrapolation of a short loss curve with an honest standard deviation.

AutoLRS (Jin et al., ICLR 2021, section 4.2) fits one exponential `a exp(b t) + c`. Real curves are sums of many rates and
a hundred noisy losses seldom tell which, so the answer here is an average over many curve shapes by their evidence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_ndtr, ndtr

Array = NDArray[np.float64]

_MOST_POINTS = 64
# Coefficients are those of the drop inside the observed window, in units of the curve's own range.
_PRIOR_STD = 1.0
# A falling component is the rule, a rising one the exception.
_RISING = 0.02
_LEAST_NOISE = 1e-4
_DIGITS = 9
_OUTLIER = 3.5
_DOUBT = 0.06
# Prior shares of a constant, one exponential, two, and a power law; and of the two refined shapes.
_SHARES = (0.0005, 0.25, 0.55, 0.2)
_REFINED_SHARES = (0.05, 0.003)


@dataclass(frozen=True)
class Forecast:
    """The noise-free loss at the horizon.

    Attributes:
        mean: expected loss, in the unit of the losses; inf for a curve that diverged.
        std: standard deviation of the noise-free value (not of a single noisy loss); inf where nothing is known.
    """

    mean: float
    std: float


@dataclass(frozen=True)
class _Shapes:
    """Decay shapes on the unit window: `fast` and `slow` hold one function per model, falling from 1 at u = 0."""

    rates: Array  # [M, 2] rates per window, 0 where the model has no such term
    powers: Array  # [M, 2] exponent and time scale of a power law, 0 where the model is exponential
    log_prior: Array  # [M]


@cache
def _shapes() -> _Shapes:
    singles = np.geomspace(0.02, 60.0, 25)
    coarse = np.geomspace(0.02, 60.0, 14)
    pairs = [(fast, slow) for i, slow in enumerate(coarse) for fast in coarse[i + 2 :]]
    laws = [(p, scale) for p in (0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0, 1.3) for scale in (0.003, 0.01, 0.03, 0.1, 0.3)]
    rates = [(0.0, 0.0)] + [(r, 0.0) for r in singles] + pairs + [(0.0, 0.0)] * len(laws)
    powers = [(0.0, 0.0)] * (1 + len(singles) + len(pairs)) + laws
    counts = (1, len(singles), len(pairs), len(laws))
    share = [part / count for part, count in zip(_SHARES, counts, strict=True) for _ in range(count)]
    return _Shapes(np.array(rates), np.array(powers), np.log(np.array(share)))


def _terms(shapes: _Shapes, u: Array) -> Array:
    """The two terms of every model at times `u` (in windows): [2, M, len(u)], each 1 at u = 0 and 0 at u = 1."""
    rates, (exponent, scale) = shapes.rates.T[:, :, None], shapes.powers.T[:, :, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        last = np.exp(-rates)
        terms = np.where(rates > 0, (np.exp(-rates * u) - last) / (1.0 - last), 0.0)
        last = (1.0 + 1.0 / scale) ** -exponent
        terms[0] += np.where(exponent > 0, ((1.0 + u / scale) ** -exponent - last) / (1.0 - last), 0.0)
    return np.asarray(terms)


def _moments(terms: Array) -> Array:
    """[5, M, n]: the terms a and b, aa, ab, bb; their sums over the points are what a regression needs."""
    a, b = terms
    return np.stack([a, b, a * a, a * b, b * b])


@lru_cache(maxsize=16)
def _table(times: bytes) -> Array:
    """The moments of all table shapes at times `u`, given as bytes: most curves have the same few grids of steps."""
    return _moments(_terms(_shapes(), np.frombuffer(times)))


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


@dataclass(frozen=True)
class _Fit:
    log_weight: Array  # [M] log posterior weight, not normalised
    mean: Array  # [M, 3]
    root: Array  # [M, 3, 3] inverse of the information's Cholesky factor: its square is the covariance


def _fit(moments: Sequence[Array], y: Array, weight: Array, noise: float, log_prior: Array) -> _Fit:
    """Gaussian linear regression of every model at once, with its log evidence and its terms' signs weighed."""
    precision = weight / noise**2
    a, b, aa, ab, bb = np.concatenate([part @ precision for part in moments], axis=1)
    ay, by = np.concatenate([part[:2] @ (precision * y) for part in moments], axis=1)
    prior = 1.0 / _PRIOR_STD**2
    # information = L L', L by rows of (1, a, b)
    l00 = float(np.sqrt(precision.sum() + prior))
    l10, l20 = a / l00, b / l00
    l11 = np.sqrt(aa + prior - l10**2)
    l21 = (ab - l20 * l10) / l11
    l22 = np.sqrt(bb + prior - l20**2 - l21**2)
    root = np.zeros((len(a), 3, 3))
    root[:, 0, 0], root[:, 1, 1], root[:, 2, 2] = 1.0 / l00, 1.0 / l11, 1.0 / l22
    root[:, 1, 0] = -l10 / (l00 * l11)
    root[:, 2, 0] = -(l20 / l00 + l21 * root[:, 1, 0]) / l22
    root[:, 2, 1] = -l21 / (l11 * l22)
    against = np.stack([np.full(len(a), precision @ y), ay, by], axis=1)
    half = np.einsum("mij,mj->mi", root, against)
    mean = np.einsum("mji,mj->mi", root, half)
    log_evidence = 0.5 * (half**2).sum(1) - np.log(l00 * l11 * l22)
    std = np.sqrt((root[:, :, 1:] ** 2).sum(1))
    used = np.stack([aa, bb], axis=1) > 0
    falling = np.where(used, log_ndtr(mean[:, 1:] / std), 0.0).sum(1)
    return _Fit(log_prior + log_evidence + np.logaddexp(falling, np.log(_RISING)), mean, root)


def _between_ends(low: float, high: float, count: int) -> Array:
    """`count` values from `low` to `high` in equal ratios."""
    return np.asarray(low * (high / low) ** (np.arange(count) / (count - 1)))


def _explained(phi: Array, y: Array, weight: Array) -> Array:
    """[M] sum of squares that each shape [M, n] and a constant explain."""
    total = weight.sum()
    gain = phi @ (weight * (y - (y * weight).sum() / total))
    spread = phi**2 @ weight - (phi @ weight) ** 2 / total
    return np.asarray(gain**2 / np.maximum(spread, 1e-300))


def _laws(exponents: Array, scales: Array, u: Array) -> Array:
    """[len(scales) * len(exponents), len(u)] power laws."""
    return np.asarray(np.exp(-exponents[:, None] * np.log1p(u / scales[:, None, None]))).reshape(-1, len(u))


_RATES, _EXPONENTS, _SCALES = _between_ends(0.02, 60.0, 60), np.linspace(0.2, 1.4, 13), _between_ends(0.003, 0.3, 9)


@lru_cache(maxsize=16)
def _coarse(times: bytes) -> tuple[Array, Array]:
    """The first round's exponentials and power laws."""
    u = np.frombuffer(times)
    return np.exp(-_RATES[:, None] * u), _laws(_EXPONENTS, _SCALES, u)


def _refined(u: Array, y: Array, weight: Array) -> tuple[float, float, float]:
    """The best single exponential's rate and the best power law's exponent and scale.

    Between the table's entries a nearly noise-free curve would fit none of them.
    """
    rates, exponents, scales = _RATES, _EXPONENTS, _SCALES
    falls, laws = _coarse(u.tobytes())
    for last in (False, False, True):
        best = int(np.argmax(_explained(falls, y, weight)))
        i, j = divmod(int(np.argmax(_explained(laws, y, weight))), len(exponents))
        if last:
            break
        rates = _between_ends(rates[max(best - 1, 0)], rates[min(best + 1, len(rates) - 1)], 17)
        scales, exponents = (
            _between_ends(scales[max(i - 1, 0)], scales[min(i + 1, len(scales) - 1)], 7),
            np.linspace(exponents[max(j - 1, 0)], exponents[min(j + 1, len(exponents) - 1)], 7),
        )
        falls, laws = np.exp(-rates[:, None] * u), _laws(exponents, scales, u)
    return float(rates[best]), float(exponents[j]), float(scales[i])


def _above(mean: Array, std: Array, floor: float) -> tuple[Array, Array]:
    """Moments of each Gaussian component once it is known to lie above `floor`."""
    safe = np.maximum(std, 1e-12)
    z = (floor - mean) / safe
    # Mills ratio by logarithms: the tail far below the floor must not become 0/0.
    ratio = np.exp(-0.5 * z**2 - 0.5 * np.log(2 * np.pi) - log_ndtr(-z))
    return mean + safe * ratio, safe * np.sqrt(np.clip(1.0 + z * ratio - ratio**2, 1e-6, 1.0))


def _between(mean: Array, std: Array, floor: float, end: Array) -> tuple[Array, Array]:
    """The same; and a component that falls from `end` on does so however little is known: half-way to the floor, then."""
    above, spread = _above(mean, std, floor)
    most = np.maximum(mean, 0.5 * (floor + end))
    wide = (mean < end) & (floor < end) & (above > most)
    return np.where(wide, most, above), np.where(wide, np.minimum(spread, (end - floor) / np.sqrt(12.0)), spread)


def forecast(
    losses: ArrayLike, horizon: float, *, steps: ArrayLike | None = None, floor: float | None = None
) -> Forecast:
    """Forecasts the noise-free loss at step `horizon` from a short curve. Never raises.

    Every shape (constant, one exponential, two exponentials, power law) is fitted to the raw losses in units of the
    curve's own range; the shapes are averaged by their evidence, so a curve whose asymptote cannot be identified gets
    a wide band instead of a confident guess.

    Args:
        losses: [n] loss values, any scale and offset; non-finite ones inside the curve are dropped.
        horizon: step to forecast, on the axis of `steps`.
        steps: [n] step numbers of the losses in any order, default 0, 1, ...
        floor: a value that the noise-free loss cannot fall below (0 for a cross entropy), if known.

    Returns:
        The forecast. A curve that ends in nan or inf, or has no finite loss, diverged: mean and std are inf. One
        loss is its own forecast with std inf; two are forecast by the last, with twice their difference as std.
    """
    y = _numbers(losses)
    t = np.arange(len(y), dtype=np.float64) if steps is None else _numbers(steps)[: len(y)]
    y = y[: len(t)]
    if (np.diff(t) < 0.0).any():
        order = np.argsort(t, kind="stable")
        t, y = t[order], y[order]
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
    scale = float(np.ptp(y))
    if scale <= 1e-12 * max(abs(offset), 1e-300):
        return _floored(offset, 0.0, floor)
    # rounded: what another unit or offset of the loss leaves of rounding errors must not decide between two equal shapes
    unit = np.round((y - offset) / scale, _DIGITS)
    mean, std = _average(t, unit, count, float(horizon), None if floor is None else (floor - offset) / scale)
    return _floored(offset + scale * mean, scale * std, floor)


def _numbers(values: ArrayLike) -> Array:
    """[n] values as float64: tensors with gradients, too; what is no number is nan."""
    held = values.detach().cpu() if hasattr(values, "detach") else values
    try:
        found = np.asarray(held)
        return np.asarray(found.real if np.iscomplexobj(found) else found, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        flat = np.asarray(held, dtype=object).ravel()
        return np.array([float(v) if isinstance(v, int | float | np.number) else np.nan for v in flat])


def _floored(mean: float, std: float, floor: float | None) -> Forecast:
    return Forecast(mean if floor is None else max(mean, float(floor)), std)


def _average(t: Array, y: Array, count: Array, horizon: float, floor: float | None) -> tuple[float, float]:
    """Mean and std at the horizon of the evidence-weighted mixture, in the curve's own units."""
    window = t[-1] - t[0]
    u, ahead = (t - t[0]) / window, np.array([max(horizon - t[0], 0.0) / window])
    rate, exponent, scale = _refined(u, y, count)
    shapes = _shapes()
    refined = _Shapes(
        np.array([[rate, 0.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [exponent, scale]]), np.log(_REFINED_SHARES)
    )
    moments = (_table(u.tobytes()), _moments(_terms(refined, u)))
    log_prior = np.append(shapes.log_prior, refined.log_prior)
    later = np.concatenate([_terms(shapes, ahead), _terms(refined, ahead)], axis=1)[:, :, 0]
    at_horizon = np.stack([np.ones(len(log_prior)), *later], axis=1)

    noise = max(_difference_noise(u, y), _LEAST_NOISE)
    weight = count / count.mean()
    for _ in range(2):  # the first round finds outliers, the second what they hid
        fit = _fit(moments, y, weight, noise, log_prior)
        best = int(np.argmax(fit.log_weight))
        part, row = (moments[0], best) if best < len(shapes.rates) else (moments[1], best - len(shapes.rates))
        residual = y - fit.mean[best, 0] - fit.mean[best, 1:] @ part[:2, row]
        spread = max(1.4826 * float(np.median(np.abs(residual))), _LEAST_NOISE)
        weight = count / count.mean() / np.maximum(np.abs(residual) / (_OUTLIER * spread), 1.0) ** 2
        noise = max(_noise_level(residual, weight), _LEAST_NOISE)
    fit = _fit(moments, y, weight, noise, log_prior)

    posterior = np.exp(fit.log_weight - fit.log_weight.max())
    means = np.einsum("mi,mi->m", at_horizon, fit.mean)
    stds = np.sqrt((np.einsum("mij,mj->mi", fit.root, at_horizon) ** 2).sum(1))
    # No family is the true one: part of every drop still to come is doubt.
    stds = np.hypot(stds, _DOUBT * np.abs(means - fit.mean[:, 0]))
    if floor is not None:
        posterior = posterior * np.maximum(ndtr((means - floor) / np.maximum(stds, 1e-12)), 1e-12)
        means, stds = _between(means, stds, floor, fit.mean[:, 0])
    posterior = posterior / posterior.sum()
    # The median: a few shapes with a long way down must not drag the whole forecast with them.
    order = np.argsort(means)
    mean = float(np.interp(0.5, np.cumsum(posterior[order]) - 0.5 * posterior[order], means[order]))
    return mean, float(np.sqrt(posterior @ (stds**2 + (means - mean) ** 2)))


def _noise_level(residual: Array, weight: Array) -> float:
    """Standard deviation of the residuals, raised where neighbours agree: a wandering curve holds fewer facts."""
    freedom = max(len(residual) - 3.0, 1.0)
    variance = float((weight * residual**2).sum()) / freedom
    if variance <= 0.0 or len(residual) < 6:
        return float(np.sqrt(variance))
    correlation = float((residual[1:] * residual[:-1]).sum() / (residual**2).sum())
    correlation = min(max(correlation, 0.0), 0.9)
    return float(np.sqrt(variance * (1.0 + correlation) / (1.0 - correlation)))
