"""An all-reduce along trees and its proof, checked in plain Python with rationals and networkx: nothing of the package's own."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import networkx

from trainkit.collectives import AllreduceForest, Topology


def check_trees(both: AllreduceForest) -> None:
    """Every tree spans over links that exist, and all together keep the time that is claimed."""
    topology = both.topology
    capacity = {(u, v): b for u, v, b in topology.links}
    load: Counter[tuple[str, str]] = Counter()
    roots = []
    for half, inward in ((both.broadcast, False), (both.reduce, True)):
        trees: Counter[str] = Counter()
        for tree in half.trees:
            trees[tree.root] += tree.multiplicity
            grown = networkx.DiGraph([edge[::-1] if inward else edge for edge in tree.edges])
            assert networkx.is_arborescence(grown)
            assert grown.in_degree(tree.root) == 0 and set(grown) == set(half.members)
            for edge, path in zip(tree.edges, tree.paths, strict=True):
                assert (path[0], path[-1]) == edge and not set(path[1:-1]) & set(topology.compute_nodes)
                for link in pairwise(path):
                    load[link] += tree.multiplicity
        roots.append(trees)
    assert roots[0] == roots[1]
    busiest = max(Fraction(times) / capacity[link] for link, times in load.items())
    assert busiest <= both.time_per_byte * roots[0].total()


def proved(topology: Topology, lengths: tuple[Fraction, ...]) -> Fraction:
    """What lengths of the links prove, by shortest arborescences; no switch copies."""
    assert not topology.multicast and not topology.aggregate and all(length >= 0 for length in lengths)
    offered = sum(length * b for length, (_, _, b) in zip(lengths, topology.links, strict=True))
    totals: Counter[str] = Counter()
    for turned in (False, True):
        graph = networkx.DiGraph()
        for (u, v, _), length in zip(topology.links, lengths, strict=True):
            graph.add_edge(*((v, u) if turned else (u, v)), length=length)
        away = dict(networkx.all_pairs_dijkstra_path_length(graph, weight="length"))
        for root in topology.compute_nodes:
            reach = networkx.DiGraph()
            reach.add_weighted_edges_from(
                (u, v, away[u][v])
                for u in topology.compute_nodes
                for v in topology.compute_nodes
                if v not in (u, root) and v in away[u]
            )
            totals[root] += networkx.minimum_spanning_arborescence(reach).size("weight")  # type: ignore[assignment]
    return Fraction(min(totals.values())) / offered
