"""Orders for rings: compiled local search, Held and Karp's bound, proofs up to 32 hosts."""

import time
from typing import NamedTuple

import numpy as np

from trainkit.collectives._native import order_ring, order_ring_bound
from trainkit.collectives.order._certify import prove_ring
from trainkit.collectives.order._check import Costs

PROVED = 32
"""Rings of so many hosts are solved to a proof."""
BOUND_SECONDS = 5.0
"""Time for a bound or a proof, on top of the search's."""
_FOREVER = 10**12


class Placement(NamedTuple):
    """What a search found."""

    order: list[int]
    lower_bound: float
    converged: bool


def cheapest_ring(cost: Costs, start: list[int], seconds: float, seed: int) -> Placement:
    """A ring whose hops cost little in sum, and what no ring undercuts."""
    size = len(cost)
    order, converged, _ = order_ring(cost, start, seed, 2000 * size, _patience(size), seconds)
    upper = float(cost[order, np.roll(order, -1)].sum())
    bound = order_ring_bound(cost, upper, 1500, BOUND_SECONDS)
    if size <= PROVED and bound < upper * (1 - 1e-9):
        order, proof = prove_ring(cost, order, BOUND_SECONDS)
        bound = max(bound, proof)
    return Placement(order, bound, converged)


def narrowest_ring(cost: Costs, start: list[int], seconds: float, seed: int) -> Placement:
    """A ring whose dearest hop is cheap; of those with the same dearest hop one with a cheap sum.

    Bisection over the costs that occur: a threshold is met where the search finds a ring without a dearer hop.
    """
    size, end = len(cost), time.monotonic() + seconds
    values = np.unique(cost[~np.eye(size, dtype=bool)])
    order, converged = start, True

    def dearest(hosts: list[int]) -> float:
        return float(cost[hosts, np.roll(hosts, -1)].max())

    def search(limit: float, hosts: list[int], patience: int) -> list[int]:
        nonlocal converged
        # what is above the limit costs more than any ring below it
        penalised = np.where(cost > limit, cost + size * values[-1], cost)
        found, ended, _ = order_ring(penalised, hosts, seed, _FOREVER, patience, max(0.0, end - time.monotonic()))
        converged &= ended
        return [int(host) for host in found]

    low = int(np.searchsorted(values, _bottleneck_bound(cost)))
    bound = float(values[low])
    high = int(np.searchsorted(values, dearest(order)))
    while low < high:
        middle = (low + high) // 2
        found = search(values[middle], order, 20 * size)
        if dearest(found) < dearest(order):
            order, high = found, int(np.searchsorted(values, dearest(found)))
        if dearest(found) > values[middle]:
            low = middle + 1
    if size <= PROVED:
        order, bound = _prove_narrowest(cost, values, order, bound)
    smooth = search(dearest(order), order, _patience(size))
    return Placement(smooth if dearest(smooth) <= dearest(order) else order, bound, converged)


def _patience(size: int) -> int:
    return max(5000, 40 * size)


def _prove_narrowest(cost: Costs, values: Costs, order: list[int], bound: float) -> tuple[list[int], float]:
    """Step below the dearest hop until it is proved that nothing is there."""
    end = time.monotonic() + BOUND_SECONDS
    while (dearest := float(cost[order, np.roll(order, -1)].max())) > bound and time.monotonic() < end:
        below = float(values[np.searchsorted(values, dearest) - 1])
        found, over = prove_ring((cost > below).astype(float), order, end - time.monotonic())
        if over > 1e-6:
            return order, dearest  # every ring has a hop above `below`
        if cost[found, np.roll(found, -1)].max() >= dearest:
            break
        order = found
    return order, bound


def _bottleneck_bound(cost: Costs) -> float:
    """A ring enters and leaves every host, by two different ones, and falls apart at no host."""
    size = len(cost)
    open_ = cost + np.diag(np.full(size, np.inf))
    least = max(float(open_.min(axis=0).max()), float(open_.min(axis=1).max()))
    either = np.minimum(open_, open_.T)
    least = max(least, float(np.sort(either, axis=1)[:, 1].max()))
    values = np.unique(either[np.isfinite(either)])
    low, high = int(np.searchsorted(values, least)), len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if _holds_together(open_ <= values[middle]):
            high = middle
        else:
            low = middle + 1
    return max(least, float(values[low]))


def _holds_together(allowed: "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]") -> bool:
    import networkx
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    if connected_components(csr_array(allowed), directed=True, connection="strong")[0] > 1:
        return False
    return bool(networkx.is_biconnected(networkx.from_numpy_array(allowed | allowed.T)))
