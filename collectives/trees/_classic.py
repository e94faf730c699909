"""The ring and the double binary tree on the same network: what a forest is compared with.

Ranks are placed in the order of the network's compute nodes and a hop takes a shortest path, the widest of these.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np

from trainkit.collectives._topology import Ints, Topology, capacities
from trainkit.collectives.schedule import Schedule
from trainkit.collectives.trees._emit import Hop, assemble, check_chunks, tree_hops
from trainkit.collectives.trees._flat import Flat

_LAPS = {"allgather": 1, "reduce_scatter": 1, "allreduce": 2}


def ring_time(topology: Topology, collective: str, order: Sequence[str] | None = None) -> Fraction:
    """Time per unit of message and capacity of a ring: its busiest physical link."""
    members = list(order or topology.compute_nodes)
    share = Fraction(_LAPS[collective] * (len(members) - 1), len(members))
    hops = zip(members, members[1:] + members[:1], strict=True)
    return busiest_link(topology, ((u, v, share) for u, v in hops))[1]


def double_binary_tree_time(topology: Topology) -> Fraction:
    """Time per unit of message and capacity of an all-reduce on two complementary binary trees."""
    members, half = topology.compute_nodes, Fraction(1, 2)
    hops = []
    for tree in binary_trees(len(members)):
        for child, parent in enumerate(tree):
            if parent is not None:
                hops += [(members[child], members[parent], half), (members[parent], members[child], half)]
    return busiest_link(topology, hops)[1]


def binary_trees(size: int) -> tuple[list[int | None], list[int | None]]:
    """Rank -> parent in each of two binary trees in which (nearly) no rank is inside both.

    Sanders, Speck, Traeff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", 2009.
    """
    first: list[int | None] = [None] * size
    for rank in range(1, size):
        low = rank & -rank
        up = (rank - low) | 2 * low
        first[rank] = up if up < size else rank - low
    turned = [size - 1 - r if size % 2 == 0 else (r + 1) % size for r in range(size)]
    second: list[int | None] = [None] * size
    for rank, parent in enumerate(first):
        second[turned[rank]] = None if parent is None else turned[parent]
    return first, second


def ring_schedule(topology: Topology, collective: str = "allreduce", order: Sequence[str] | None = None) -> Schedule:
    """The ring as a schedule: each shard's trees are paths along it.

    Args:
        topology: the network.
        collective: "allgather", "reduce_scatter" or "allreduce".
        order: compute nodes round the ring; the network's own order if left out.

    Raises:
        ValueError: another collective, or an order that is not one of the compute nodes.
    """
    if collective not in _LAPS:
        raise ValueError(f"a ring runs {', '.join(_LAPS)}, got {collective!r}")
    members = list(order or topology.compute_nodes)
    if sorted(members) != sorted(topology.compute_nodes):
        raise ValueError("order must name every compute node once")
    size = len(members)
    place = {name: at for at, name in enumerate(members)}
    away, towards = _paths(topology, members), _paths(topology.transposed(), members[::-1])
    hops: list[Hop] = []
    for rank, name in enumerate(topology.compute_nodes):
        piece = (Fraction(rank, size), Fraction(rank + 1, size))
        arrived: tuple[int, ...] = ()
        if collective != "allgather":
            # The reduced shard ends at its owner: a path of the reversed ring away from it, run backwards.
            arrived = tree_hops(hops, towards, topology.nodes, size - 1 - place[name], piece, 0, True)
        if collective != "reduce_scatter":
            wave = 0 if collective == "allgather" else size - 1
            tree_hops(hops, away, topology.nodes, place[name], piece, wave, False, arrived)
    shards = [] if collective == "allreduce" else [(Fraction(r, size), Fraction(r + 1, size)) for r in range(size)]
    return assemble(f"ring on {topology.name}", collective, tuple(topology.compute_nodes), hops, topology, shards)


def double_binary_tree_schedule(topology: Topology, chunks: int = 1) -> Schedule:
    """All-reduce on two complementary binary trees; each carries half of the message, in `chunks` pieces.

    Raises:
        ValueError: chunks below 1.
    """
    check_chunks(chunks)
    members = topology.compute_nodes
    hops: list[Hop] = []
    for half, parents in enumerate(binary_trees(len(members))):
        edges = _from_the_root(parents)
        down = _tree(topology, edges, [route(topology, members[u], members[v]) for u, v in edges])
        up = _tree(topology, edges, [route(topology, members[v], members[u])[::-1] for u, v in edges])
        for chunk in range(chunks):
            first = half * chunks + chunk
            piece = (Fraction(first, 2 * chunks), Fraction(first + 1, 2 * chunks))
            arrived = tree_hops(hops, up, topology.nodes, 0, piece, chunk, True)
            tree_hops(hops, down, topology.nodes, 0, piece, chunk + up.height, False, arrived)
    return assemble(f"double binary tree on {topology.name}", "allreduce", tuple(members), hops, topology)


def _from_the_root(parents: Sequence[int | None]) -> list[tuple[int, int]]:
    """(parent, child) of every edge, each after the edge that reached its parent."""
    edges: list[tuple[int, int]] = []
    reached: list[int] = [parents.index(None)]
    for up in reached:
        below = [child for child, parent in enumerate(parents) if parent == up]
        edges += [(up, child) for child in below]
        reached += below
    return edges


def _tree(topology: Topology, edges: Sequence[tuple[int, int]], paths: Sequence[Sequence[str]]) -> Flat:
    """One tree over compute nodes by number, with the physical path of each edge."""
    compute = topology.compute
    flat = [topology.index[name] for path in paths for name in path]
    starts = [0, *accumulate(len(path) for path in paths)]
    tails, heads = ([int(compute[edge[end]]) for edge in edges] for end in (0, 1))
    return Flat(*map(_array, (tails[:1], [1], [0, len(edges)], tails, heads, starts, flat)))


def _paths(topology: Topology, members: list[str]) -> Flat:
    """One path tree per member, all the way round."""
    index, size = topology.index, len(members)
    legs = [route(topology, u, v) for u, v in zip(members, members[1:] + members[:1], strict=True)]
    edge_tail, edge_head, path, path_start = [], [], [], [0]
    for start in range(size):
        for step in range(size - 1):
            leg = [index[name] for name in legs[(start + step) % size]]
            edge_tail.append(leg[0])
            edge_head.append(leg[-1])
            path += leg
            path_start.append(len(path))
    roots = [index[name] for name in members]
    starts = range(0, size * (size - 1) + 1, size - 1)
    return Flat(*map(_array, (roots, [1] * size, starts, edge_tail, edge_head, path_start, path)))


def _array(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def route(topology: Topology, source: str, target: str) -> tuple[str, ...]:
    """A shortest path through switches, the one whose narrowest link is widest."""
    near: dict[str, list[tuple[str, Fraction]]] = defaultdict(list)
    for u, v, capacity in topology.links:
        near[u].append((v, capacity))
    compute = set(topology.compute_nodes)
    heap: list[tuple[int, Fraction, tuple[str, ...]]] = [(0, Fraction(0), (source,))]
    done: set[str] = set()
    through: list[tuple[int, Fraction, tuple[str, ...]]] = []
    while heap or through:
        if not heap:
            # No way through switches alone: other compute nodes pass on.
            heap, through = through, []
        hops, width, path = heapq.heappop(heap)
        here = path[-1]
        if here == target:
            return path
        if here in done:
            continue
        done.add(here)
        for v, capacity in near[here]:
            if v not in done:
                narrow = -capacity if len(path) == 1 else max(width, -capacity)
                entry = (hops + 1, narrow, (*path, v))
                heapq.heappush(through if v in compute and v != target else heap, entry)
    raise ValueError(f"there is no way from {source} to {target}")


def busiest_link(topology: Topology, hops: Iterable[tuple[str, str, Fraction]]) -> tuple[tuple[str, str], Fraction]:
    """The link that is busy longest when each hop (from, to, part of the message) takes its route, and how long.

    Returns:
        The link, and its time per unit of message and capacity.
    """
    load: dict[tuple[str, str], Fraction] = defaultdict(Fraction)
    for u, v, share in hops:
        for link in pairwise(route(topology, u, v)):
            load[link] += share
    capacity = capacities(topology)
    link = max(load, key=lambda link: load[link] / capacity[link])
    return link, load[link] / capacity[link]
