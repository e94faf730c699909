"""A tree of hosts and switches as nested sets of hosts, and how flows share its links."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Flows:
    """Flows that ran at the same time."""

    source: npt.NDArray[np.int64]
    """Sending host of each flow."""
    target: npt.NDArray[np.int64]
    """Receiving host of each flow."""
    rate: Floats
    """Bits/s of each flow."""

    @classmethod
    def of(cls, measured: Sequence[tuple[int, int, float]]) -> "Flows":
        """From (source, target, bits/s)."""
        source, target, rate = zip(*measured, strict=True)
        return cls(np.array(source), np.array(target), np.array(rate, dtype=np.float64))


def crossings(sets: Bools, flows: Flows) -> Bools:
    """[2 V, F]: which flow passes which link; first the V links up out of the sets, then those down into them.

    Args:
        sets: [V, N], the hosts below each vertex.
        flows: any.
    """
    out, into = sets[:, flows.source], sets[:, flows.target]
    return np.vstack([out & ~into, into & ~out])


def shares(crossing: Bools, capacity: Floats) -> Floats:
    """Max-min fair rate of each flow: what TCP flows of equal round trip come to.

    Args:
        crossing: [L, F], which flow passes which link.
        capacity: [L], infinite where unknown; every flow must pass a finite link.
    """
    rate = np.zeros(crossing.shape[1])
    active = np.ones(crossing.shape[1], dtype=bool)
    left = capacity.astype(np.float64)
    while active.any():
        count = (crossing & active).sum(axis=1)
        offer = np.divide(left, count, out=np.full(len(left), np.inf), where=count > 0)
        least = offer.min()
        settled = active & crossing[offer <= least * (1 + 1e-9)].any(axis=0)
        rate[settled] = max(least, 0.0)
        left -= (crossing & settled).sum(axis=1) * max(least, 0.0)
        active &= ~settled
    return rate
