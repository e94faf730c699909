"""A first order: hosts that are near each other side by side, at every scale."""

import numpy as np

from trainkit.collectives.order._check import Costs, slower_way


def clustered(cost: Costs) -> list[int]:
    """Leaves of an average-linkage clustering, of two clusters the larger first.

    Larger first, because then clusters whose sizes are powers of two begin at multiples of their size, where
    halving-doubling wants them.
    """
    size = len(cost)
    if size < 3:
        return list(range(size))
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    merged: list[list[int]] = [[host] for host in range(size)]
    for left, right, *_ in linkage(squareform(slower_way(cost), checks=False), "average"):
        pair = sorted((merged[int(left)], merged[int(right)]), key=lambda members: (-len(members), members[0]))
        merged.append(pair[0] + pair[1])
    return [int(host) for host in np.asarray(merged[-1])]
