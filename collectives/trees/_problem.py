"""What the native core is asked: one out-tree problem on integers.

Every collective is one: trees that carry `weight[v]` shares out of each root v to all terminals. Reductions are the same
problem on the transposed network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

import trainkit.collectives._native as _native
from trainkit.collectives._topology import Ints, Topology, names
from trainkit.collectives.trees._certificate import Cut

Collective = Literal["allgather", "reduce_scatter", "broadcast", "reduce"]
COLLECTIVES = ("allgather", "reduce_scatter", "broadcast", "reduce")
Progress = Callable[[str, int, int], None] | None


@dataclass(frozen=True)
class Problem:
    """Trees from weighted roots to all terminals, within integer capacities."""

    topology: Topology
    """The network in the trees' direction: transposed for reductions."""
    members: Ints
    """Vertices that take part."""
    weight: Ints
    """[vertices] shares rooted at each."""
    spanned: Ints
    """Vertices that every tree must reach: the members, then the switches that copy."""
    cap: Ints
    """[links] capacities as integers, `topology.scale` times the network's own; may be fewer, see `within`."""
    progress: Progress = None

    @property
    def size(self) -> int:
        """Number of vertices."""
        return len(self.topology.nodes)

    @property
    def graph(self) -> tuple[int, Ints, Ints, Ints]:
        """What every native function starts with."""
        tail, head, _ = self.topology.arcs
        return self.size, tail, head, self.cap

    @property
    def relays(self) -> Ints:
        """[vertices] 1 where what comes in must go out: switches that do not copy, and relays."""
        mask = np.ones(self.size, dtype=np.int64)
        mask[self.spanned] = 0
        return mask

    @property
    def colour(self) -> Ints:
        """[vertices] what a symmetry must keep."""
        colour = self.weight * 4 + 1
        colour[self.topology.compute] += 1
        colour[self.spanned] += 2
        return colour

    def balanced(self) -> bool:
        """Whether every relay can give out all it takes in."""
        _, tail, head, cap = self.graph
        surplus = np.zeros(self.size, dtype=np.int64)
        np.add.at(surplus, head, cap)
        np.subtract.at(surplus, tail, cap)
        return not (surplus * self.relays).any()

    def within(self, cap: Ints) -> "Problem":
        """The same with other capacities."""
        return Problem(self.topology, self.members, self.weight, self.spanned, cap, self.progress)

    def spanning(self, multicast: Sequence[int]) -> "Problem":
        """The same with these switches spanned by every tree."""
        spanned = np.concatenate([self.members, np.array(multicast, dtype=np.int64)])
        return Problem(self.topology, self.members, self.weight, spanned, self.cap, self.progress)

    def cut(self, inside: Ints) -> Cut:
        """The named vertices of a cut."""
        return Cut(frozenset(names(self.topology, np.flatnonzero(inside).tolist())))

    def search(self) -> tuple[Fraction, Ints]:
        """(max over cuts of weight inside / capacity out, in integer capacities; [vertices] 1 inside that cut)."""
        p, q, cut, _ = _native.search(*self.graph, self.weight, self.spanned, self.progress)
        if q == 0:
            raise ValueError("a switch named in multicast or aggregate cannot be reached from any root: leave it out")
        return Fraction(p, q), cut


def problem(
    topology: Topology,
    collective: Collective = "allgather",
    *,
    root: str | None = None,
    weights: Mapping[str, int] | None = None,
    group: Sequence[str] | None = None,
    progress: Progress = None,
) -> Problem:
    """The out-tree problem of a collective.

    Raises:
        ValueError: an argument does not fit the collective or names an unknown node.
    """
    if collective not in COLLECTIVES:
        raise ValueError(
            f"collective must be one of {', '.join(COLLECTIVES)}, got {collective!r}"
            + (": use allreduce_forest" if str(collective) == "allreduce" else "")
        )
    rooted = collective in ("broadcast", "reduce")
    if rooted != (root is not None):
        raise ValueError(
            f"root belongs to broadcast and reduce: collective {collective!r}, root {root!r}"
            + (f": name one of {', '.join(topology.compute_nodes[:8])}, ..." if rooted else "")
        )
    if rooted and weights is not None:
        raise ValueError(f"weights are shard sizes: {collective} has no shards")
    if isinstance(group, str):
        raise ValueError(f"group is a list of compute nodes, got the text {group!r}")
    members = list(topology.compute_nodes) if group is None else list(group)
    for what, given in (("group", members), ("root", [root] if root is not None else []), ("weights", weights or ())):
        for name in given:
            if name not in topology.compute_nodes:
                raise ValueError(f"{what} must name compute nodes of {topology.name}, got {name!r}")
    if len(set(members)) < len(members) or len(members) < 2:
        raise ValueError(f"a group has at least 2 different compute nodes, got {members}")
    if root is not None and root not in members:
        raise ValueError(f"root {root!r} must be one of the group")
    share = {name: int(name == root) if rooted else 1 for name in members}
    for name, value in (weights or {}).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0 or name not in share:
            raise ValueError(f"weights are whole numbers >= 0 of members of the group, got {name!r}: {value!r}")
        share[name] = value
    if not any(share.values()):
        raise ValueError("weights must not all be 0")
    network = topology.transposed() if collective in ("reduce", "reduce_scatter") else topology
    vertices = np.array([network.index[name] for name in members], dtype=np.int64)
    weight = np.zeros(len(network.nodes), dtype=np.int64)
    weight[vertices] = [share[name] for name in members]
    return Problem(network, vertices, weight, vertices, network.arcs[2], progress)
