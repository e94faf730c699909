"""The cheapest ring, proved: integer programming by HiGHS, with a cut for each sub-tour as it shows up.

Dantzig, Fulkerson, Johnson, "Solution of a large-scale traveling-salesman problem", 1954; arcs whose reduced cost says
that no cheaper ring uses them are left out.
"""

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from trainkit.collectives.order._check import Costs

_TOLERANCE = 1e-7


def prove_ring(cost: Costs, order: list[int], seconds: float) -> tuple[list[int], float]:
    """The cheapest directed ring and a lower bound on it.

    Args:
        cost: `[N, N]` with N >= 4.
        order: a ring to start from.
        seconds: when time is up, the best ring so far and the best bound so far are returned.
    """
    end = time.monotonic() + seconds
    upper = float(cost[order, np.roll(order, -1)].sum())
    if upper == 0:
        return order, 0.0
    unit = upper / len(cost)
    program = _Program(cost / unit, order)
    bound = program.relax(end)
    bound = max(bound, program.solve(end))
    return program.order, unit * min(bound, program.upper)


class _Program:
    """Arcs, the cuts found so far, the best ring so far."""

    def __init__(self, cost: Costs, order: list[int]) -> None:
        self._cost = cost
        self._size = len(cost)
        self._take(order)
        # an arc dearer than a whole ring is in no better one
        self._tail, self._head = np.nonzero(~np.eye(self._size, dtype=bool) & (cost <= self.upper + _TOLERANCE))
        self._cuts: list[npt.NDArray[np.bool_]] = []

    def _take(self, order: list[int]) -> None:
        self.order = order
        self.upper = float(self._cost[order, np.roll(order, -1)].sum())

    def _matrix(self) -> tuple[Any, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        from scipy.sparse import csr_array, vstack

        arcs = np.arange(len(self._tail))
        ones = np.ones(len(arcs))
        out = csr_array((ones, (self._tail, arcs)), shape=(self._size, len(arcs)))
        into = csr_array((ones, (self._head, arcs)), shape=(self._size, len(arcs)))
        # a ring leaves every set of hosts
        leaving = [csr_array((side[self._tail] & ~side[self._head]).astype(float)[None]) for side in self._cuts]
        low = np.ones(2 * self._size + len(leaving))
        high = np.concatenate([np.ones(2 * self._size), np.full(len(leaving), np.inf)])
        return vstack([out, into, *leaving], format="csr"), low, high

    def relax(self, end: float) -> float:
        """The bound of the linear relaxation with the cuts that it breaks; leaves out arcs that it rules out."""
        from scipy.optimize import linprog

        bound = 0.0
        while (left := end - time.monotonic()) > 0:
            matrix, low, _ = self._matrix()
            rows = 2 * self._size
            weights = self._cost[self._tail, self._head]
            found = linprog(
                weights,
                A_ub=-matrix[rows:] if self._cuts else None,
                b_ub=-low[rows:] if self._cuts else None,
                A_eq=matrix[:rows],
                b_eq=low[:rows],
                bounds=(0, 1),
                options={"time_limit": left},
            )
            if found.status != 0:
                break
            bound = max(bound, float(found.fun) - _TOLERANCE)
            cut = self._narrowest(found.x)
            if not cut:
                used = set(zip(self.order, np.roll(self.order, -1).tolist(), strict=True))
                kept = found.fun + found.lower.marginals <= self.upper + _TOLERANCE
                kept |= np.array([arc in used for arc in zip(self._tail.tolist(), self._head.tolist(), strict=True)])
                self._tail, self._head = self._tail[kept], self._head[kept]
                break
            self._cuts += cut
        return bound

    def _narrowest(self, flow: npt.NDArray[np.float64]) -> list[npt.NDArray[np.bool_]]:
        """Sets of hosts that less than one arc leaves."""
        import networkx

        graph = networkx.Graph()
        graph.add_nodes_from(range(self._size))
        for i, j, amount in zip(self._tail.tolist(), self._head.tolist(), flow.tolist(), strict=True):
            if amount > 1e-9:
                before = graph.get_edge_data(i, j, {"weight": 0.0})["weight"]
                graph.add_edge(i, j, weight=before + amount)
        parts = list(networkx.connected_components(graph))
        if len(parts) > 1:
            return [self._side(part) for part in parts]
        # both ways together a ring crosses twice
        width, (one, _) = networkx.stoer_wagner(graph)
        return [self._side(one)] if width < 2 - 1e-6 else []

    def _side(self, hosts: "set[int] | list[int]") -> npt.NDArray[np.bool_]:
        side = np.zeros(self._size, dtype=bool)
        side[list(hosts)] = True
        return side

    def solve(self, end: float) -> float:
        """Whole arcs: solve, cut what falls apart, until one ring is left; a bound."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        bound = 0.0
        while (left := end - time.monotonic()) > 0:
            matrix, low, high = self._matrix()
            found = milp(
                self._cost[self._tail, self._head],
                integrality=1,
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(matrix, low, high),
                options={"time_limit": left, "mip_rel_gap": 0.0},
            )
            if found.mip_dual_bound is not None:
                bound = max(bound, float(found.mip_dual_bound) - _TOLERANCE)
            if found.status != 0:
                break
            chosen = np.flatnonzero(found.x > 0.5)
            after = dict(zip(self._tail[chosen].tolist(), self._head[chosen].tolist(), strict=True))
            loops = _loops(after)
            if len(loops) == 1:
                if self._cost[loops[0], np.roll(loops[0], -1)].sum() < self.upper:
                    self._take(loops[0])
                return max(bound, self.upper - 10 * _TOLERANCE)
            self._cuts += [self._side(loop) for loop in loops]
        return bound


def _loops(after: dict[int, int]) -> list[list[int]]:
    loops, left = [], set(after)
    while left:
        loop = [min(left)]
        while (step := after[loop[-1]]) != loop[0]:
            loop.append(step)
        left -= set(loop)
        loops.append(loop)
    return loops
