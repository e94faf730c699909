"""The annealing law's clock: how far along the run's one curve a trial has come.

With a schedule of rates r_i the loss falls as L = L0 + A S1^-a - C S2, where S1 is the sum of the rates so far and S2 the
annealed area (Tissue et al. 2024, arXiv 2408.11029, section 3; the multi-power form of Luo et al. 2025, arXiv 2503.12811,
bends S2). From one state, on the same batches, all trials share L0, A and a: what a small rate does, a larger one does
sooner. So a trial's loss is read as a time on the common curve, its effective S1, and the lag ln S1 - ln(effective S1) says
what the rate itself spoils. A lag has no unit of loss: nothing here depends on the loss's scale or offset.

Trials are measured at a running average of their weights, which to first order are the weights of a run whose rates fall:
an average with weights w_j over steps j equals steps at r_i times sum(w_j for j >= i). So S2 is the same share of every
trial's rate and cancels between them, and S1 is the mean of those sums.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainkit.autolrs._average import POWER

Array = NDArray[np.float64]

# Mean of the tail sums 1 - u^(POWER + 1) of the averaging weights: a trial's averaged weights lag by a fifth.
AVERAGED = 1.0 - 1.0 / (POWER + 2.0)
# A loss above the start is beyond the curve: nepers for each of the curve's own falls, and where they end.
_MOST_LAG = 20.0


@dataclass(frozen=True)
class Path:
    """A trial on the law's clock.

    Attributes:
        rate: peak rate of the trial.
        sums: [n] S1 at each measured loss, the run so far included; the first is the search's start.
        losses: [n] losses there, finite.
    """

    rate: float
    sums: Array
    losses: Array


@dataclass(frozen=True)
class Lag:
    """What a trial's rate spoils.

    Attributes:
        value: ln S1 - ln(effective S1) at the trial's end, nepers, relative to the reference trial.
        std: std of it by the noise of the losses.
    """

    value: float
    std: float


def loss_noise(losses: Array) -> float:
    """Std of one measured loss by second differences (robust), 0 for fewer than four losses."""
    if len(losses) < 4:
        return 0.0
    bends = np.abs(losses[2:] - 2.0 * losses[1:-1] + losses[:-2]) / math.sqrt(6.0)
    return float(1.4826 * np.median(bends))


def reference(paths: Sequence[Path]) -> int:
    """The trial with the least last loss, whose path the others are read on."""
    return int(np.argmin([path.losses[-1] for path in paths]))


def lags(paths: Sequence[Path], memory: float, misfit: float) -> list[Lag]:
    """Each trial's lag behind the reference trial's path.

    Args:
        paths: trials from one state; not empty, each with a loss at the start and at least one more.
        memory: share of the sum of rates before the search that counts on its clock: 1 by the law as it is published, less
            where the run's first steps, which paid most, are not of the curve's present piece.
        misfit: std by which two trials' losses differ at the same S1, in the loss's unit. Where the curve is flat at its end,
            it makes the lags uncertain: a plateau says nothing of rates.
    """
    best = paths[reference(paths)]
    clock, curve = _log_sums(best.sums, memory), np.minimum.accumulate(best.losses)
    fall = float(curve[0] - curve[-1])
    noise = loss_noise(best.losses)
    # slope of the curve at its end, by its last half: loss a neper; a fall within the noise is none
    half = len(curve) // 2
    slope = max((float(curve[half] - curve[-1]) - noise) / max(float(clock[-1] - clock[half]), 1e-9), 1e-300)
    found = []
    for path in paths:
        end, now = float(path.losses[-1]), float(_log_sums(path.sums, memory)[-1])
        if fall <= 0.0:
            effective = float(clock[0])
        elif end <= curve[0]:
            effective = float(np.interp(-end, -curve, clock))
        else:
            effective = float(clock[0]) - (end - float(curve[0])) / fall
        blur = math.hypot(max(loss_noise(path.losses), noise), misfit)
        unsure = blur / slope if fall > 0.0 else _MOST_LAG
        found.append(Lag(min(now - effective, _MOST_LAG), min(unsure, _MOST_LAG)))
    return found


def _log_sums(sums: Array, memory: float) -> Array:
    """Log of S1 as a search's clock reads it; a run's start, where it is 0, is put two nepers before its first loss."""
    clock = np.maximum(sums - sums[0], 0.0) + memory * sums[0]
    if clock[0] <= 0.0:
        clock[0] = clock[1] * math.exp(-2.0)
    return np.asarray(np.log(np.maximum(clock, 1e-300)))
