"""Ask and tell over one learning rate: a Gaussian process, expected improvement, knowledge from stage to stage."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from trainkit.autolrs._surrogate import Posterior, posterior

Array = NDArray[np.float64]

_GRID = 257
# Where a cold search looks first, as fractions of the log range. Too high a rate shows itself within a few steps.
_COLD = (0.5, 0.75, 0.25)
# A warm search starts at the last choice and goes on in such steps, in decades.
_WARM = 0.5
# Per stage: what an old observation loses in weight, and how far the optimum may drift (decades).
_OLD_NOISE = 1.0
_SURPRISE = 10.0
_DECADES_APART = 0.12


class Backend(Protocol):
    """What a stage's search needs of an optimiser of one learning rate."""

    def ask(self) -> float: ...
    def tell(self, lr: float, mean: float, std: float) -> None: ...
    def best(self) -> float: ...
    def next_stage(self, chosen: float | None = None) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class _Observation:
    lr: float
    mean: float
    std: float


def check_range(low: float, high: float) -> None:
    """Raises ValueError unless 0 < low < high, both finite."""
    numeric = isinstance(low, Real) and isinstance(high, Real)
    if not (numeric and 0.0 < low < high and math.isfinite(high)):
        raise ValueError(
            f"learning rates must satisfy 0 < low < high, but got low={low!r}, high={high!r}: swap or widen"
        )


class LRSearch:
    """Bayesian search for the learning rate with the least loss.

    Args:
        low: least rate.
        high: greatest rate.
        seed: of the small random shifts of the first points; the same seed asks the same rates.
        kappa: None asks by expected improvement; a number asks by the lower confidence bound mean - kappa * std.

    Raises:
        ValueError: unless 0 < low < high.
    """

    def __init__(self, low: float, high: float, seed: int = 0, *, kappa: float | None = None) -> None:
        check_range(low, high)
        self.low, self.high, self.seed, self.kappa = low, high, seed, kappa
        self._told: list[_Observation] = []
        self._before: list[_Observation] = []
        self._centre: float | None = None
        self._stage = 0

    @property
    def _grid(self) -> Array:
        return np.linspace(math.log10(self.low), math.log10(self.high), _GRID)

    def ask(self) -> float:
        """The next rate to try."""
        planned = self._design()
        if planned is not None:
            return planned
        belief = self._posterior()
        if self.kappa is not None:
            gain = self.kappa * belief.std - belief.mean
        else:
            target = min(belief.mean[self._nearest(o.lr)] for o in self._told)
            z = (target - belief.mean) / belief.std
            gain = belief.std * (z * ndtr(z) + np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi))
        gain = np.asarray(gain, dtype=np.float64)
        for seen in self._told:  # the same rate again would be the same trial again
            gain[np.abs(self._grid - math.log10(seen.lr)) < _DECADES_APART] = -np.inf
        works = max((o.lr for o in self._told if math.isfinite(o.mean)), default=0.0)
        for seen in self._told:  # what is faster than a rate that diverged diverges, too
            if seen.lr > works:
                gain[self._grid > math.log10(seen.lr)] = -np.inf
        best = int(np.argmax(gain))
        return float(10.0 ** self._grid[best]) if np.isfinite(gain[best]) else max(self.best(), self.low)

    def tell(self, lr: float, mean: float, std: float) -> None:
        """Reports a trial; a rate told again replaces what was told of it.

        Args:
            lr: rate that was tried.
            mean: forecast loss; nan or inf for a trial that diverged.
            std: its standard deviation, same unit.
        """
        told = _Observation(float(lr), float(mean), float(std))
        known = [i for i, o in enumerate(self._told) if o.lr == told.lr]
        if known:
            self._told[known[0]] = told
        else:
            self._told.append(told)

    def best(self) -> float:
        """The tried rate with the least posterior mean; the middle of the range before any finite trial."""
        finite = [o for o in self._told if math.isfinite(o.mean)]
        if not finite:
            return self._centre if self._centre is not None else math.sqrt(self.low * self.high)
        belief = self._posterior()
        return min(finite, key=lambda o: float(belief.mean[self._nearest(o.lr)])).lr

    def expected(self, lr: float) -> tuple[float, float]:
        """Posterior mean and std of the loss at `lr`; (inf, inf) before any finite trial."""
        if not any(math.isfinite(o.mean) for o in self._told):
            return float("inf"), float("inf")
        belief, at = self._posterior(), self._nearest(lr)
        return float(belief.mean[at]), float(belief.std[at])

    def next_stage(self, chosen: float | None = None) -> None:
        """Keeps what was learned as a blurred prior around the choice (None: `best`), and begins a new stage's search."""
        if any(math.isfinite(o.mean) for o in self._told):
            self._centre, self._before = self.best(), self._told
        self._centre = self._centre if chosen is None else chosen
        self._told = []
        self._stage += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values, JSON-able but for non-finite floats."""
        pack = [[(o.lr, o.mean, o.std) for o in told] for told in (self._told, self._before)]
        return {"told": pack[0], "before": pack[1], "centre": self._centre, "stage": self._stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`'s result; the next ask is the same as there."""
        self._told = [_Observation(*o) for o in state["told"]]
        self._before = [_Observation(*o) for o in state["before"]]
        self._centre, self._stage = state["centre"], int(state["stage"])

    def _nearest(self, lr: float) -> int:
        return int(np.argmin(np.abs(self._grid - math.log10(lr))))

    def _design(self) -> float | None:
        """The next fixed point of this stage, None when improvement should lead."""
        low, high = math.log10(self.low), math.log10(self.high)
        if self._centre is None:
            offsets = [low + f * (high - low) for f in _COLD]
            shift = np.random.default_rng([self.seed, self._stage]).uniform(-0.05, 0.05) * (high - low)
        else:
            offsets, shift = [math.log10(self._centre) + d for d in self._around()], 0.0
        for offset in offsets[len(self._told) :]:
            x = min(max(offset + shift, low), high)
            if all(abs(x - math.log10(o.lr)) >= _DECADES_APART for o in self._told):
                return float(10.0**x)
        return None

    def _around(self) -> list[float]:
        """Decades from the last choice to look at: there, faster, on the better side, and on while that falls."""
        losses = [o.mean for o in self._told]
        offsets = [0.0, _WARM if not losses or math.isfinite(losses[0]) else -_WARM]
        if len(losses) >= 2:
            offsets.append(2 * offsets[1] if losses[1] <= losses[0] else -offsets[1])
            while len(offsets) <= len(losses) and losses[len(offsets) - 1] < min(losses[: len(offsets) - 1]):
                offsets.append(offsets[-1] + math.copysign(_WARM, offsets[-1]))
        return offsets

    def _posterior(self) -> Posterior:
        """Belief on the grid: this stage's trials, and the last stage's with their level removed and noise added."""
        x, y, noise = _prepared(self._told)
        if self._before:
            bx, by, bnoise = _prepared(self._before)
            if len(x) and len(bx):
                level = np.interp(x, *_sorted(bx, by))
                residual = level - y
                by = by - float(np.mean(residual))
                spread = float(np.std(by)) or 1.0
                # Old trials that the new ones contradict are forgotten: the optimum has jumped.
                spread *= 1.0 + _SURPRISE * float(np.var(residual)) / spread**2
                x, y = np.concatenate([x, bx]), np.concatenate([y, by])
                noise = np.concatenate([noise, np.hypot(bnoise, _OLD_NOISE * spread)])
        return posterior(x, y, noise, self._grid)


def _sorted(x: Array, y: Array) -> tuple[Array, Array]:
    order = np.argsort(x)
    return x[order], y[order]


def _prepared(told: list[_Observation]) -> tuple[Array, Array, Array]:
    """Log rates, values and noises with the hopeless ones drawn in: how bad they were must not blur the good ones."""
    x = np.array([math.log10(o.lr) for o in told])
    y = np.array([o.mean for o in told])
    noise = np.array([o.std for o in told])
    finite = np.isfinite(y)
    if not finite.any():
        return x, np.zeros(len(x)), np.ones(len(x))
    low = float(y[finite].min())
    middle = float(np.median(y[finite]))
    step = middle - low if middle > low else float(np.ptp(y[finite])) or max(abs(low) * 0.1, 1e-6)
    cap = low + 3.0 * step
    y = np.where(finite, np.minimum(np.where(finite, y, cap), cap), cap)
    noise = np.where(np.isfinite(noise), np.minimum(noise, 3.0 * step), 0.3 * step)
    return x, y, noise
