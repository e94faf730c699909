"""A Gaussian process over log10 learning rate on a grid, each observation with its own noise."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_LENGTHS = (0.4, 0.7, 1.2, 2.0)  # decades
_JITTERS = (1e-4, 1e-2, 1e-1)  # of the signal's variance


@dataclass(frozen=True)
class Posterior:
    """Mean and standard deviation [G] on the grid, in the observations' unit."""

    mean: Array
    std: Array


def matern52(a: Array, b: Array, length: float) -> Array:
    """Matern 5/2 correlations [len(a), len(b)] (Rasmussen and Williams, 2006, equation 4.17)."""
    distance = np.sqrt(5.0) * np.abs(a[:, None] - b[None, :]) / length
    return np.asarray((1.0 + distance + distance**2 / 3.0) * np.exp(-distance))


def posterior(x: Array, y: Array, noise: Array, grid: Array) -> Posterior:
    """The posterior on `grid`, length scale and jitter by marginal likelihood on a small table.

    Args:
        x: [n] log10 rates.
        y: [n] finite values.
        noise: [n] standard deviations of the values.
        grid: [G] log10 rates.

    Returns:
        The posterior with the most likely length scale; with one observation the longest is as likely as any.
    """
    centre, scale = float(np.mean(y)), float(np.std(y))
    if scale <= 0.0 or not np.isfinite(scale):
        scale = max(float(np.max(noise, initial=0.0)), abs(centre) * 1e-3, 1e-12)
    z, variance = (y - centre) / scale, (noise / scale) ** 2
    best, best_likelihood = None, -np.inf
    for length in _LENGTHS:
        correlation = matern52(x, x, length)
        for jitter in _JITTERS:
            factor = np.linalg.cholesky(correlation + np.diag(variance + jitter + 1e-8))
            half = np.linalg.solve(factor, z)
            # A weak pull to lengths of about a decade: two points alone would say "white noise".
            pull = -0.5 * (np.log10(length) / 0.4) ** 2
            likelihood = -0.5 * float(half @ half) - float(np.log(np.diag(factor)).sum()) + pull
            if likelihood > best_likelihood:
                best, best_likelihood = (length, factor, half), likelihood
    assert best is not None
    length, factor, half = best
    across = np.linalg.solve(factor, matern52(x, grid, length))
    mean = across.T @ half
    std = np.sqrt(np.maximum(1.0 - (across**2).sum(0), 1e-12))
    return Posterior(centre + scale * mean, scale * std)
