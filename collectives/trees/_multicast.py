"""Switches that copy (or, reducing, add) in the network: spanned by the trees like members, then folded into paths."""

import numpy as np

from trainkit.collectives._topology import Ints
from trainkit.collectives.trees._capacity import achievable
from trainkit.collectives.trees._flat import Flat
from trainkit.collectives.trees._problem import Problem


def choose_multicast(problem: Problem) -> Problem:
    """The problem with those multicast-capable switches spanned that cost no rate.

    A tree that spans a multicast-capable switch enters it once and leaves it as often as it likes. Spanning one that takes in too
    little would slow every tree down, so the switches in the way are left out, worst first.
    """
    _, _, head, _ = problem.graph
    multicast = [problem.topology.index[name] for name in sorted(problem.topology.multicast)]
    multicast = [w for w in multicast if (head == w).any()]
    while multicast:
        trial = problem.spanning(multicast)
        if achievable(trial)[0] <= achievable(problem)[0]:
            return trial
        _, cut = trial.search()
        starved = [w for w in multicast if not cut[w]]
        multicast = [w for w in multicast if w not in starved] if starved else multicast[:-1]
    return problem


def without_multicast_vertices(flat: Flat, members: Ints) -> Flat:
    """The same trees between members only: an edge's path runs through the multicast-capable switches above it."""
    member = set(members.tolist())
    edge_tail, edge_head, path, path_start, edge_start = [], [], [], [0], [0]
    for t in range(len(flat)):
        through: dict[int, list[int]] = {}  # multicast-capable switch -> path from the member above it
        for e in range(int(flat.edge_start[t]), int(flat.edge_start[t + 1])):
            tail, head = int(flat.edge_tail[e]), int(flat.edge_head[e])
            own = flat.path[flat.path_start[e] : flat.path_start[e + 1]].tolist()
            whole = through[tail] + own[1:] if tail in through else own
            if head not in member:
                through[head] = whole
                continue
            edge_tail.append(whole[0])
            edge_head.append(head)
            path.extend(whole)
            path_start.append(len(path))
        edge_start.append(len(edge_tail))
    arrays = (np.array(values, dtype=np.int64) for values in (edge_start, edge_tail, edge_head, path_start, path))
    return Flat(flat.root, flat.multiplicity, *arrays)
