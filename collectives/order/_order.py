"""Which host should get which rank."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from trainkit.collectives._native import order_stages, order_trees
from trainkit.collectives.order._bounds import stages_bound, trees_bound
from trainkit.collectives.order._check import Costs, OrderError, checked_costs, checked_order, slower_way
from trainkit.collectives.order._cost import Algorithm, Objective, order_cost, pattern
from trainkit.collectives.order._patterns import Stage, Trees
from trainkit.collectives.order._ring import BOUND_SECONDS, Placement, cheapest_ring, narrowest_ring
from trainkit.collectives.order._seed import clustered

_ENUMERATED = 6
_ROUNDS = 40


@dataclass(frozen=True)
class Ordering:
    """An order of ranks, what it costs, and how much better any other could be."""

    order: tuple[int, ...]
    """Rank -> host (a row of the matrix)."""
    cost: float
    """What one pass costs in it, in the matrix's unit."""
    lower_bound: float
    """No order costs less."""
    given_cost: float
    """What the given order costs."""
    algorithm: Algorithm
    """The collective."""
    objective: Objective
    """What was made small."""
    converged: bool
    """Whether the search ended by itself: then the same seed gives the same order on every machine."""
    changed: bool
    """Whether this is another order than the given one."""

    @property
    def gap(self) -> float:
        """How much of the cost might still be saved: cost / lower_bound - 1 (inf above a bound of 0)."""
        if self.cost <= self.lower_bound:
            return 0.0
        return self.cost / self.lower_bound - 1 if self.lower_bound > 0 else math.inf

    @property
    def optimal(self) -> bool:
        """Whether the bound proves that nothing is cheaper (by more than a millionth)."""
        return self.gap <= 1e-6

    @property
    def gain(self) -> float:
        """What the given order costs over what this one costs (1 where nothing was gained)."""
        return self.given_cost / self.cost if self.cost > 0 else 1.0 if self.given_cost == 0 else math.inf


def order_ranks(
    cost: Any,
    algorithm: Algorithm = "ring",
    *,
    seconds: float = 10.0,
    seed: int = 0,
    objective: Objective = "sum",
    latency: Any = None,
    base: int = 2,
    given: Sequence[int] | None = None,
    least_gain: float = 0.02,
) -> Ordering:
    """An order of hosts in which a collective costs little: which host should get rank 0, which rank 1, ...

    What is counted says `order_cost`. Costs need not be symmetric: a ring's data flows from rank r to rank r + 1 (NCCL's
    rings, gloo's all-gather; pass `cost.T` for gloo's all-reduce, which flows the other way), and whatever flows both
    ways counts the slower one. Rings of up to 32 hosts are solved to a proof where time allows.

    Args:
        cost: `[N, N]`, what the whole message costs from host i to host j: seconds, or any other unit.
        algorithm: "ring" (torch's gloo, NCCL), "halving_doubling", "double_binary_tree" (NCCL) or "bcube".
        seconds: most wall time for the search; bounds and proofs take up to 5 seconds more. A search that ends before
            is a function of the arguments alone; one that was cut short depends on the machine (`Ordering.converged`),
            and so does a proof that takes longer than its 5 seconds.
        seed: of the search.
        objective: for rings, "sum" of the hops or the dearest one ("bottleneck"). Where hosts share thin links the sum
            is right: it counts how often a ring crosses them.
        latency: `[N, N]`, what every message costs besides, in the same unit.
        base: hosts in a group of BCube (gloo: 2).
        given: today's order, which is kept where less than `least_gain` is to be won; default 0, 1, ..., N - 1.
        least_gain: share of the given order's cost.

    Raises:
        OrderError: a matrix, an order or a choice that breaks a rule.
    """
    costs = checked_costs(cost)
    size = len(costs)
    delays = np.zeros_like(costs) if latency is None else checked_costs(latency, "latency", size)
    today = checked_order(range(size) if given is None else given, size)
    if not seconds >= 0 or math.isinf(seconds):
        raise OrderError(f"seconds must be a number of at least 0, got {seconds}")
    if not 0 <= least_gain < 1:
        raise OrderError(f"least_gain is a share of the given cost, from 0 to below 1, got {least_gain}")
    made = pattern(algorithm, size, objective=objective, base=base)

    def counted(order: Sequence[int]) -> float:
        return order_cost(costs, order, algorithm, objective=objective, latency=delays, base=base)

    before = counted(today)
    if size <= _ENUMERATED:
        best = min(permutations(range(size)), key=counted)
        found = Placement(list(best), counted(best), True)
    else:
        start = min(clustered(costs + delays), list(today), key=counted)
        found = _search(costs, delays, made, objective, start, seconds, seed % 2**63)
    after = counted(found.order)
    changed = after < (1 - least_gain) * before and after < before
    return Ordering(
        order=tuple(int(host) for host in found.order) if changed else today,
        cost=after if changed else before,
        lower_bound=min(found.lower_bound, after, before),
        given_cost=before,
        algorithm=algorithm,
        objective=objective,
        converged=found.converged,
        changed=changed,
    )


def _search(
    cost: Costs,
    latency: Costs,
    made: list[Stage] | Trees | None,
    objective: Objective,
    start: list[int],
    seconds: float,
    seed: int,
) -> Placement:
    if made is None:
        ring = cheapest_ring if objective == "sum" else narrowest_ring
        return ring(latency + cost, start, seconds, seed)
    cost, latency = slower_way(cost), slower_way(latency)
    if isinstance(made, Trees):
        order, converged, _ = order_trees(cost, latency, made.parents, made.weight, start, seed, _ROUNDS, seconds)
        return Placement(order, trees_bound(cost, latency, made, BOUND_SECONDS), converged)
    order, converged, _ = order_stages(cost, latency, *flat(made), start, seed, _ROUNDS, seconds)
    return Placement(order, stages_bound(cost, latency, made), converged)


def flat(stages: list[Stage]) -> tuple[list[float], list[int], list[int], list[int]]:
    """Stages as the compiled search takes them: weights, where each begins, left and right ranks."""
    pairs = [pair for stage in stages for pair in stage.pairs]
    first = np.cumsum([0, *(len(stage.pairs) for stage in stages)]).tolist()
    return [stage.weight for stage in stages], first, [a for a, _ in pairs], [b for _, b in pairs]
