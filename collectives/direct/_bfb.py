"""Breadth-first broadcast: exact cost and schedule of allgather on a direct-connect topology.

Every host broadcasts its shard along all shortest paths at once; host u gets the shards of the hosts at distance t in
step t. How step t is split over the in-links of u is a transportation problem of its own, whose optimum is Hall's
bound: the greatest, over sets S of in-links, of (shards that may only use S) / |S|.

Source: Efficient Direct-Connect Topologies for Collective Communications, arXiv 2202.03356 (the algorithm); the closed
form is linear-programming duality.
"""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trainkit.collectives._native import direct_loads, direct_unreached
from trainkit.collectives.direct._digraph import MOST_NODES, Digraph
from trainkit.collectives.direct._transfers import Chunking, Transfers, chunking
from trainkit.collectives.schedule import Schedule, compose

if TYPE_CHECKING:
    import networkx as nx

Phase = Literal["allgather", "reduce_scatter", "allreduce"]


@dataclass(frozen=True)
class BFB:
    """What breadth-first broadcast costs on a topology, and its schedules.

    Allgather on the topology takes `t_l * alpha + t_b * M / B` seconds; reduce-scatter is the allgather of the
    transposed topology run backwards and takes the `_reverse` values, which may be higher.
    """

    nodes: int
    """N."""
    degree: int
    """d, the greatest in- or out-degree; a link has B / d."""
    t_l: int
    """Steps of the allgather: the diameter."""
    t_b: Fraction
    """Bandwidth term of the allgather in units of M / B."""
    t_l_reverse: int
    """Steps of the reduce-scatter."""
    t_b_reverse: Fraction
    """Bandwidth term of the reduce-scatter in units of M / B."""
    steps: tuple[Fraction, ...]
    """Step -> load of the busiest link of the allgather, in shards."""
    steps_reverse: tuple[Fraction, ...]
    """The same of the reduce-scatter's transposed allgather (its last step first)."""
    digraph: Digraph = field(repr=False, compare=False)
    """The topology as arrays."""
    labels: tuple[Any, ...] = field(repr=False, compare=False)
    """Host number -> the graph's own node."""

    @property
    def graph(self) -> "nx.MultiDiGraph[Any]":
        """The topology."""
        return self.digraph.networkx(self.labels)

    @property
    def bandwidth_optimal(self) -> bool:
        """Whether both directions reach (N - 1) / N, below which no schedule gets."""
        return self.t_b == self.t_b_reverse == Fraction(self.nodes - 1, self.nodes)

    def seconds(self, nbytes: float, alpha: float, bandwidth: float) -> float:
        """Predicted seconds of an all-reduce.

        Args:
            nbytes: M, bytes.
            alpha: seconds a step.
            bandwidth: B, bytes/s of a host.
        """
        return (self.t_l + self.t_l_reverse) * alpha + float(self.t_b + self.t_b_reverse) * nbytes / bandwidth

    def chunking(self, max_chunks: int = 64, *, reverse: bool = False) -> Chunking:
        """How a shard is cut when at most `max_chunks` chunks are allowed, and the bandwidth lost by that."""
        return chunking(self.steps_reverse if reverse else self.steps, max_chunks)

    def transfers(self, max_chunks: int = 64, *, reverse: bool = False) -> Transfers:
        """The allgather as an array, of the transpose if `reverse`; far quicker than `schedule` on large networks."""
        graph = self.digraph.reverse() if reverse else self.digraph
        return Transfers.breadth_first(graph, self.chunking(max_chunks, reverse=reverse))

    def schedule(
        self,
        collective: Phase = "allgather",
        *,
        max_chunks: int = 64,
        bandwidth: int | Fraction | None = None,
        unit: str | None = None,
    ) -> Schedule:
        """The schedule as a `Schedule` in mode "steps"; ranks are called by `str` of the graph's nodes.

        Args:
            collective: "allgather", "reduce_scatter", or "allreduce" composed from both.
            max_chunks: most chunks a shard; `chunking(max_chunks).loss` says what a low bound costs.
            bandwidth: B of a host, in `unit`. None gives every link the capacity 1.
            unit: "B/s", "GB/s", "Gbit/s" or "Mbit/s".

        Raises:
            ValueError: an unknown collective, or two nodes of one name.
        """
        if collective == "allreduce":
            halves = [
                self.schedule(phase, max_chunks=max_chunks, bandwidth=bandwidth, unit=unit)
                for phase in ("reduce_scatter", "allgather")
            ]
            return compose(halves[0], halves[1], name=f"bfb allreduce, {self.nodes} hosts")
        if collective not in ("allgather", "reduce_scatter"):
            raise ValueError(f"collective must be allgather, reduce_scatter or allreduce, got {collective!r}")
        ranks = tuple(str(label) for label in self.labels)
        if len(set(ranks)) < len(ranks):
            raise ValueError("ranks are called by str() of the nodes, and two nodes read the same: relabel the graph")
        backwards = collective == "reduce_scatter"
        return self.transfers(max_chunks, reverse=backwards).schedule(
            f"bfb {collective}, {self.nodes} hosts",
            ranks,
            reduce_scatter=backwards,
            bandwidth=bandwidth,
            unit=unit,
        )


def bfb(graph: "nx.DiGraph[Any] | nx.MultiDiGraph[Any] | Digraph", *, vertex_transitive: bool = False) -> BFB:
    """Exact cost of breadth-first broadcast in both directions.

    Args:
        graph: directed; parallel edges are parallel links, self-loops are ports that carry nothing.
        vertex_transitive: the caller vouches that all hosts look alike (any Cayley graph): one host is then evaluated
            instead of all.

    Raises:
        ValueError: fewer than two hosts, or some host does not reach another.

    Example:
        >>> import networkx as nx
        >>> ring = bfb(nx.DiGraph([(0, 1), (1, 2), (2, 0)]))
        >>> ring.t_l, ring.t_b
        (2, Fraction(2, 3))
    """
    digraph = graph if isinstance(graph, Digraph) else Digraph.of_networkx(graph)
    labels = tuple(range(digraph.nodes)) if isinstance(graph, Digraph) else tuple(graph.nodes)
    if not 2 <= digraph.nodes <= MOST_NODES:
        raise ValueError(f"a topology has 2 to {MOST_NODES} hosts, got {digraph.nodes}")
    stuck = direct_unreached(digraph.nodes, digraph.tail, digraph.head)
    if stuck is not None:
        source, target = (labels[at] for at in stuck)
        raise ValueError(f"every host must reach every other, but {source!r} does not reach {target!r}: add links")
    forward = _loads(digraph, vertex_transitive)
    backward = forward if digraph.symmetric else _loads(digraph.reverse(), vertex_transitive)
    scale = Fraction(digraph.degree, digraph.nodes)
    return BFB(
        nodes=digraph.nodes,
        degree=digraph.degree,
        t_l=len(forward),
        t_b=scale * sum(forward),
        t_l_reverse=len(backward),
        t_b_reverse=scale * sum(backward),
        steps=forward,
        steps_reverse=backward,
        digraph=digraph,
        labels=labels,
    )


def _loads(graph: Digraph, vertex_transitive: bool) -> tuple[Fraction, ...]:
    receivers = np.arange(1 if vertex_transitive else graph.nodes, dtype=np.int32)
    loads = direct_loads(graph.nodes, graph.tail, graph.head, receivers)
    return tuple(Fraction(top, bottom) for top, bottom in loads)
