"""The published forecaster (AutoLRS, ICLR 2021, section 4.2 and the authors' code), kept for `preset="paper"`.

A quadratic smoothing spline with the worst residuals dropped, ten rounds, then one exponential by variable projection.
Where the authors' code stops with an error (a rank-deficient fit), the last loss stands in.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import UnivariateSpline
from scipy.optimize import fmin

from trainkit.autolrs._forecast import Forecast

Array = NDArray[np.float64]

_ROUNDS = 10
_DROPPED = 0.03


def paper_forecast(losses: Sequence[float], horizon: float, *, steps: Sequence[float] | None = None) -> Forecast:
    """The published point forecast; std is 0, for the method has none.

    Args:
        losses: [n] losses.
        horizon: step to forecast, on the axis of `steps`.
        steps: [n] step numbers, default 0, 1, ...

    Returns:
        The forecast; mean inf for non-finite losses.
    """
    y = np.asarray(losses, dtype=np.float64)
    x = np.arange(len(y), dtype=np.float64) if steps is None else np.asarray(steps, dtype=np.float64)
    if len(y) == 0 or not np.isfinite(y).all():
        return Forecast(math.inf, math.inf)
    if len(y) < 5:
        return Forecast(float(y[-1]), 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smooth = _denoised(x, y)
        mean = _exponential(x - x[0], smooth, horizon - x[0])
    return Forecast(mean if math.isfinite(mean) else float(y[-1]), 0.0)


def _denoised(x: Array, y: Array) -> Array:
    """Ten rounds of a spline that drop the worst residuals of the first half, then the spline on all points."""
    kept_x, kept_y = x, y
    middle = x[len(x) // 2]
    for _ in range(_ROUNDS):
        if len(kept_x) < 6:
            break
        residual = np.abs(UnivariateSpline(kept_x, kept_y, k=2)(kept_x) - kept_y)
        worst = np.argsort(residual)[len(residual) - max(int(_DROPPED * len(residual)), 1) :]
        drop = np.zeros(len(kept_x), dtype=bool)
        drop[worst] = kept_x[worst] < middle
        kept_x, kept_y = kept_x[~drop], kept_y[~drop]
    return np.asarray(UnivariateSpline(kept_x, kept_y, k=2)(x), dtype=np.float64)


def _exponential(x: Array, y: Array, horizon: float) -> float:
    def solved(beta: float) -> tuple[Array, float]:
        design = np.stack([np.exp(-np.exp(beta) * x), np.ones_like(x)], axis=1)
        coefficients, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
        return coefficients, float(residual[0]) if len(residual) else float(((design @ coefficients - y) ** 2).sum())

    beta = float(fmin(lambda b: solved(float(b[0]))[1], 0.0, xtol=1e-5, ftol=1e-5, disp=False)[0])
    (scale, level), _ = solved(beta)
    return float(scale * np.exp(-np.exp(beta) * horizon) + level)
