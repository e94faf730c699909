"""A direct-connect topology as arrays: hosts 0 .. N-1 and one row a link."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]

# Distances and group elements are 16-bit in the native core.
MOST_NODES = 65_000


@dataclass(frozen=True, eq=False)
class Digraph:
    """N hosts and their directed links; parallel links and self-loops are links of their own."""

    nodes: int
    """N."""
    tail: Ints
    """Link -> the host it leaves."""
    head: Ints
    """Link -> the host it enters."""

    @classmethod
    def of(cls, nodes: int, links: Iterable[tuple[int, int]]) -> "Digraph":
        """From pairs (from, to)."""
        pairs = np.array(list(links), dtype=np.int32).reshape(-1, 2)
        return cls.of_arrays(nodes, pairs[:, 0], pairs[:, 1])

    @classmethod
    def of_arrays(cls, nodes: int, tail: NDArray[Any], head: NDArray[Any]) -> "Digraph":
        """From two integer arrays of one entry a link."""
        return cls(nodes, np.ascontiguousarray(tail, dtype=np.int32), np.ascontiguousarray(head, dtype=np.int32))

    @classmethod
    def of_networkx(cls, graph: "nx.DiGraph[Any] | nx.MultiDiGraph[Any]") -> "Digraph":
        """From networkx, hosts numbered in its node order.

        Raises:
            ValueError: the graph is undirected or has fewer than two nodes.
        """
        if not graph.is_directed():
            raise ValueError("links are directed: pass graph.to_directed() for links that carry both ways")
        number = {node: at for at, node in enumerate(graph.nodes)}
        return cls.of(len(number), ((number[u], number[v]) for u, v in graph.edges()))

    @cached_property
    def degree(self) -> int:
        """The greatest in- or out-degree: the ports that a host needs, those of self-loops included."""
        counts = [np.bincount(ends, minlength=self.nodes).max(initial=0) for ends in (self.tail, self.head)]
        return int(max(counts))

    @cached_property
    def symmetric(self) -> bool:
        """Whether every link has one the other way, so that a full-duplex cable serves both."""
        forward, backward = (a * np.int64(self.nodes) + b for a, b in ((self.tail, self.head), (self.head, self.tail)))
        return bool(np.array_equal(np.sort(forward), np.sort(backward)))

    def reverse(self) -> "Digraph":
        """The transpose."""
        return Digraph(self.nodes, self.head, self.tail)

    def pairs(self) -> list[tuple[int, int]]:
        """(from, to) of every link."""
        return list(zip(self.tail.tolist(), self.head.tolist(), strict=True))

    def networkx(self, labels: "Iterable[Any] | None" = None) -> "nx.MultiDiGraph[Any]":
        """As networkx, hosts called 0 .. N-1 or by `labels`."""
        names = list(range(self.nodes) if labels is None else labels)
        graph: nx.MultiDiGraph[Any] = nx.MultiDiGraph()
        graph.add_nodes_from(names)
        graph.add_edges_from((names[u], names[v]) for u, v in self.pairs())
        return graph
