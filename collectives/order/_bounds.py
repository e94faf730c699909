"""Lower bounds on halving-doubling, BCube and the double binary tree: what no order can undercut."""

import numpy as np

from trainkit.collectives._native import order_walks
from trainkit.collectives.order._check import Costs
from trainkit.collectives.order._patterns import Stage, Trees


def stages_bound(cost: Costs, latency: Costs, stages: list[Stage]) -> float:
    """A bound on the sum over stages of the dearest exchange.

    Args:
        cost: `[N, N]`, symmetric.
        latency: `[N, N]`, symmetric.
        stages: who meets whom.

    Every exchange costs at least the least latency, so the stages cost that and what they would cost without latency;
    and likewise with the two changed round.
    """
    off = ~np.eye(len(cost), dtype=bool)
    weights = [stage.weight for stage in stages]
    by_cost = len(stages) * float(latency[off].min()) + _thresholds_bound(cost, stages, weights)
    by_latency = sum(weights) * float(cost[off].min()) + _thresholds_bound(latency, stages, [1.0] * len(stages))
    return max(by_cost, by_latency)


def _thresholds_bound(cost: Costs, stages: list[Stage], weights: list[float]) -> float:
    """A bound on sum over stages of weight * dearest.

    Sort the stages of a solution by their dearest exchange. The first i of them alone need that every host has, at no
    greater cost, as many partners as they ask for, and that they fall into groups of one size; so the i-th is at least
    the cost at which all that is there. Stages of one width may then be dealt the weights in the order that is
    cheapest; the place of a stage of another width (BCube's last) is tried.
    """
    size = len(cost)
    rows = np.sort(cost + np.diag(np.full(size, np.inf)), axis=1)
    widths, counts, kept, extra = [], [], [], 0.0
    for stage, weight in zip(stages, weights, strict=True):
        ranks, meetings = np.unique(np.array(stage.pairs), return_counts=True)
        if meetings.min() != meetings.max():
            extra += weight * float(rows[:, 0].min())  # between blocks: one rank meets several
        else:
            widths.append(int(meetings[0]))
            counts.append(len(ranks))
            kept.append(weight)
    everyone = min(counts) == size
    common, odd = widths[0], [at for at, width in enumerate(widths) if width != widths[0]]
    falling = sorted((weight for width, weight in zip(widths, kept, strict=True) if width == common), reverse=True)
    best = np.inf
    for place in range(len(falling) + 1 if odd else 1):
        sequence = [(common, weight) for weight in falling]
        sequence[place:place] = [(widths[at], kept[at]) for at in odd]
        total, partners, group = 0.0, 0, 1
        for width, weight in sequence:
            partners, group = partners + width, group * (width + 1)
            least = float(np.sort(rows[:, partners - 1])[min(counts) - 1])
            total += weight * (max(least, _grouped(cost, group)) if everyone else least)
        best = min(best, total)
    return extra + best


def _grouped(cost: Costs, group: int) -> float:
    """The cost at which the hosts that are joined, directly or by way of others, are everywhere multiples of `group`."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    sizes = [1] * len(cost)
    odd = len(cost)
    for left, right, height, _ in linkage(squareform(cost, checks=False), "single"):
        one, other = sizes[int(left)], sizes[int(right)]
        odd += ((one + other) % group > 0) - (one % group > 0) - (other % group > 0)
        if odd == 0:
            return float(height)
        sizes.append(one + other)
    return 0.0


def trees_bound(cost: Costs, latency: Costs, trees: Trees, seconds: float) -> float:
    """A bound on the dearest way from a root to a leaf.

    Args:
        cost: `[N, N]`, symmetric.
        latency: `[N, N]`, symmetric.
        trees: who hangs below whom.
        seconds: time for the walks; without them a weaker bound is given.

    A host k hops below root r costs at least the cheapest walk of k hops from r to it. Of the ranks at least k hops down
    there are a known number, and in the best case they are the hosts nearest by such walks. No root does better than
    its best case, and two trees have two roots.
    """
    hop = latency + trees.weight * cost
    depths = np.array(trees.depths())
    height, size = int(depths.max()), len(cost)
    least = order_walks(np.ascontiguousarray(hop), height, seconds)
    if not len(least):
        return height * float(hop[~np.eye(size, dtype=bool)].min())
    bound = np.zeros(size)
    walk = np.full((size, size), np.inf)
    for k in range(height, 0, -1):
        walk = np.minimum(walk, least[k])
        np.fill_diagonal(walk, np.inf)
        bound = np.maximum(bound, np.sort(walk, axis=1)[:, int((depths >= k).sum()) - 1])
    return float(np.sort(bound)[min(len(trees.parents), size) - 1])
