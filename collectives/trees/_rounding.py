"""Fractional capacities that pass through switches, rounded to whole ones that still do."""

from fractions import Fraction

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from trainkit.collectives._topology import Ints
from trainkit.collectives.trees._problem import Problem


def round_balanced(problem: Problem, target: list[Fraction], limit: Ints) -> Ints | None:
    """Whole capacities, each the target rounded down or up and within the limit, balanced at every relay.

    Args:
        problem: tells which vertices pass on what they take in.
        target: [links] capacities balanced at these vertices, none above its limit by a whole unit.
        limit: [links] whole capacities not to exceed.

    Returns:
        [links] capacities, or None where the limits leave no such rounding.
    """
    size, tail, head, _ = problem.graph
    low = np.array([int(t) for t in target], dtype=np.int64)
    room = np.minimum(np.array([int(-(-t // 1)) for t in target], dtype=np.int64), limit) - low
    # Rounded down, a vertex keeps some of what it takes in; links rounded up must carry that away. All other vertices
    # are one, which makes up for the rest.
    place = np.where(problem.relays.astype(bool), np.arange(size), size)
    surplus = np.zeros(size + 1, dtype=np.int64)
    np.add.at(surplus, place[head], low)
    np.subtract.at(surplus, place[tail], low)
    source, sink = size + 1, size + 2
    rows, columns, amounts = place[tail].tolist(), place[head].tolist(), room.tolist()
    for v, amount in enumerate(surplus.tolist()):
        rows.append(source if amount > 0 else v)
        columns.append(v if amount > 0 else sink)
        amounts.append(abs(amount))
    graph = csr_matrix((amounts, (rows, columns)), shape=(size + 3, size + 3), dtype=np.int32)
    result = maximum_flow(graph, source, sink)
    if result.flow_value < surplus[surplus > 0].sum():
        return None
    flow = result.flow.todok()
    for e in np.flatnonzero(room > 0).tolist():
        pair = (int(place[tail[e]]), int(place[head[e]]))
        used = min(int(room[e]), max(0, int(flow.get(pair, 0))))
        low[e] += used
        if used:
            flow[pair] -= used
    return low
