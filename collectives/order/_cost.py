"""What a collective costs in a given order: slow and obvious, what the compiled searches are tested against."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from trainkit.collectives.order._check import Costs, OrderError, checked_costs, checked_order
from trainkit.collectives.order._patterns import Stage, Trees, bcube, double_binary_tree, halving_doubling

Algorithm = Literal["ring", "halving_doubling", "double_binary_tree", "bcube"]
Objective = Literal["sum", "bottleneck"]
ALGORITHMS = ("ring", "halving_doubling", "double_binary_tree", "bcube")


def order_cost(
    cost: Any,
    order: Sequence[int],
    algorithm: Algorithm = "ring",
    *,
    objective: Objective = "sum",
    latency: Any = None,
    base: int = 2,
) -> float:
    """What one pass of a collective costs when rank r sits on host `order[r]`.

    An all-reduce is two passes. What one message between two hosts costs is `latency + share * cost`, with the share of
    the message that it carries. A ring: the sum over its hops (`objective="sum"`) or the dearest ("bottleneck"), the
    share counted as 1, data flowing from rank r to rank r + 1. Halving-doubling and BCube: the sum over stages of the
    stage's dearest exchange. Double binary tree: the dearest way from a root to a leaf, half of the message on each tree.
    Whatever flows both ways at once costs its slower direction.

    Args:
        cost: `[N, N]`, what the whole message costs from host i to host j, in any unit.
        order: rank -> host.
        algorithm: "ring", "halving_doubling", "double_binary_tree" or "bcube".
        objective: "bottleneck" is for rings.
        latency: `[N, N]`, what every message costs besides, in the same unit; none if left out.
        base: hosts in a group of BCube.

    Raises:
        OrderError: a matrix, an order or a choice that breaks a rule.
    """
    costs = checked_costs(cost)
    delays = np.zeros_like(costs) if latency is None else checked_costs(latency, "latency", len(costs))
    hosts = checked_order(order, len(costs))
    made = pattern(algorithm, len(costs), objective=objective, base=base)
    if made is None:
        hops = [float(delays[i, j] + costs[i, j]) for i, j in pairwise((*hosts, hosts[0]))] if len(hosts) > 1 else [0.0]
        return sum(hops) if objective == "sum" else max(hops)
    return (
        trees_cost(costs, delays, made, hosts) if isinstance(made, Trees) else stages_cost(costs, delays, made, hosts)
    )


def pattern(algorithm: str, size: int, *, objective: str, base: int) -> list[Stage] | Trees | None:
    """Who meets whom; None for a ring.

    Raises:
        OrderError: an unknown algorithm or objective, or "bottleneck" where there is no ring.
    """
    if algorithm not in ALGORITHMS:
        raise OrderError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if objective not in ("sum", "bottleneck"):
        raise OrderError(f"objective must be sum or bottleneck, got {objective!r}")
    if algorithm == "ring":
        return None
    if objective == "bottleneck":
        raise OrderError(f"objective='bottleneck' is for rings: {algorithm} already counts the dearest of each stage")
    if algorithm == "double_binary_tree":
        return double_binary_tree(size)
    return halving_doubling(size) if algorithm == "halving_doubling" else bcube(size, base)


def stages_cost(cost: Costs, latency: Costs, stages: list[Stage], hosts: Sequence[int]) -> float:
    """The sum over stages of the dearest exchange."""
    total = 0.0
    for weight, pairs in stages:
        total += max(_both_ways(cost, latency, weight, hosts[a], hosts[b]) for a, b in pairs)
    return total


def trees_cost(cost: Costs, latency: Costs, trees: Trees, hosts: Sequence[int]) -> float:
    """The dearest way from a root to a leaf."""
    dearest = 0.0
    for parents in trees.parents:
        for rank in range(len(hosts)):
            way, at = 0.0, rank
            while (up := parents[at]) >= 0:
                way += _both_ways(cost, latency, trees.weight, hosts[at], hosts[up])
                at = up
            dearest = max(dearest, way)
    return dearest


def _both_ways(cost: Costs, latency: Costs, weight: float, i: int, j: int) -> float:
    return float(max(latency[i, j], latency[j, i]) + weight * max(cost[i, j], cost[j, i]))
