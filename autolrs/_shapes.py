"""Shapes of decay, and grids over their parameters that close in on where the evidence lies.

Time runs in observed windows: u = 0 at the first loss, 1 at the last. Every shape falls by 1 inside the window.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# A grid keeps what is at most e^7 times less likely than its best node.
_KEEP = 7.0
# The slowest rate bends by this share until the horizon: slower ones are straight lines too.
_STRAIGHT = 0.2
_SLOWEST, _FASTEST = 0.05, 60.0
# Two rates closer than this are one.
_APART = float(np.log(1.3))
_EXPONENTS, _TIMES = (0.1, 1.4), (float(np.log(0.002)), float(np.log(0.5)))
_SINGLE, _DOUBLE, _POWER = 20, 9, 10

Limits = Callable[[Array], tuple[Array, Array]]


class Grid:
    """A grid over one or two parameters: `outer` [K], and for each of its values a row of the other, `inner` [K, J].

    A ridge of likely parameters is narrow and oblique, so each row closes in by itself.

    Args:
        outer: [K] first parameter, evenly spaced; one value if there is only the second.
        size: J, nodes in a row.
        limits: outer -> least and greatest inner value of each row.
    """

    def __init__(self, outer: Array, size: int, limits: Limits) -> None:
        self.outer, self.size = outer, size
        self._range, self._limits = (outer[0], outer[-1]), limits
        self._low, self._high = limits(outer)
        self._whole = float(self._areas().sum()) * size

    def _areas(self) -> Array:
        step = self.outer[1] - self.outer[0] if len(self.outer) > 1 else 1.0
        return np.asarray((self._high - self._low) / (self.size - 1) * step)

    @property
    def inner(self) -> Array:
        """[K, J] second parameter."""
        return np.asarray(self._low[:, None] + (self._high - self._low)[:, None] * np.linspace(0.0, 1.0, self.size))

    @property
    def log_share(self) -> Array:
        """[K * J] log of each node's share of the whole parameter space: a uniform prior."""
        return np.repeat(np.log(np.maximum(self._areas() / self._whole, 1e-300)), self.size)

    def close_in(self, log_density: Array) -> None:
        """Moves the nodes to where the density [K * J] is high, one node beyond it on each side."""
        density, inner, rows = log_density.reshape(-1, self.size), self.inner, np.arange(len(self.outer))
        likely = density > density.max(1, keepdims=True) - _KEEP
        cell = (self._high - self._low) / (self.size - 1)
        low = inner[rows, likely.argmax(1)] - cell
        high = inner[rows, self.size - 1 - likely[:, ::-1].argmax(1)] + cell
        if len(rows) > 1:
            kept = np.flatnonzero(density.max(1) > density.max() - _KEEP)
            step, (least, most) = self.outer[1] - self.outer[0], self._range
            outer = np.linspace(
                max(self.outer[kept[0]] - step, least), min(self.outer[kept[-1]] + step, most), len(rows)
            )
            low, high = np.interp(outer, self.outer, low), np.interp(outer, self.outer, high)
            self.outer = outer
        bounds = self._limits(self.outer)
        self._low, self._high = np.clip(low, *bounds), np.clip(high, *bounds)


@dataclass(frozen=True)
class Terms:
    """The two terms of every model, each 0 at u = 1; the second is 0 everywhere where a model has one term.

    Attributes:
        first: [M, n] falls by 1 inside the window.
        second: [M, n] a slower exponential; per unit of coefficient it holds as much in all as the first term.
        first_ahead: [M] the first term at the horizon.
        second_ahead: [M] the second one.
        drop: [M] share of the first term's total that falls inside the window.
    """

    first: Array
    second: Array
    first_ahead: Array
    second_ahead: Array
    drop: Array


class Shapes:
    """One exponential, the sum of two, and power laws (1 + u / s)^-p.

    Args:
        u: [n] times of the losses.
        ahead: time of the horizon.
    """

    def __init__(self, u: Array, ahead: float) -> None:
        self._times = np.append(u, [1.0, ahead])
        slowest = float(np.log(min(_STRAIGHT / max(ahead, 1.0), _SLOWEST)))
        fastest = float(np.log(min(_FASTEST, 2.0 / max(float(np.median(np.diff(u))), 1e-3))))

        def between(low: float, high: float) -> Limits:
            return lambda outer: (np.full(len(outer), low), np.full(len(outer), high))

        self._slowest = slowest
        slower = np.linspace(slowest, fastest - 2 * _APART, _DOUBLE)
        self._single = Grid(np.zeros(1), _SINGLE, between(slowest, fastest))
        self._double = Grid(slower, _DOUBLE, lambda slow: (slow + _APART, np.full(len(slow), fastest)))
        self._power = Grid(np.linspace(*_EXPONENTS, _POWER), _POWER, between(*_TIMES))
        self.sizes = (_SINGLE, _DOUBLE**2, _POWER**2)
        """Number of models of each family, in order."""

    def terms(self) -> Terms:
        """The models at the grids' present nodes."""
        single, double = self._single.inner.ravel(), self._double.inner.ravel()
        times = self._times
        exponentials = np.exp(-np.exp(np.concatenate([single, double, self._double.outer]))[:, None] * times)
        scaled = times / np.exp(self._power.inner)[:, :, None]
        laws = np.exp(-self._power.outer[:, None, None] * np.log1p(scaled)).reshape(-1, len(times))
        ones = len(single) + len(double)
        first, second = np.concatenate([exponentials[:ones], laws]), np.zeros((ones + len(laws), len(times)))
        second[len(single) : ones] = np.repeat(exponentials[ones:], _DOUBLE, axis=0)
        drop = first[:, 0] - first[:, -2]
        first, second = ((term - term[:, -2:-1]) / drop[:, None] for term in (first, second))
        return Terms(first[:, :-2], second[:, :-2], first[:, -1], second[:, -1], drop)

    @property
    def log_share(self) -> Array:
        """[M] log prior share of every node within its family."""
        return np.concatenate([self._single.log_share, self._double.log_share, self._power.log_share])

    @property
    def log_speed(self) -> Array:
        """[M] log of a single exponential's rate over the slowest one, 0 for the other families."""
        rest = np.zeros(sum(self.sizes[1:]))
        return np.concatenate([self._single.inner.ravel() - self._slowest, rest])

    def close_in(self, log_density: Array) -> None:
        """Moves every family's nodes to where the density [M], prior shares excluded, is high."""
        parts = np.split(log_density, np.cumsum(self.sizes)[:-1])
        for grid, part in zip((self._single, self._double, self._power), parts, strict=True):
            grid.close_in(part)
