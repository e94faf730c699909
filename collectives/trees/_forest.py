"""Forests: spanning trees over physical links that reach the cut bound together.

ForestColl (arXiv:2402.06787) and the bandwidth-optimal pipeline schedule (arXiv:2305.18461): scale the capacities to
whole trees, split the switches off, pack spanning out-trees, map them back to physical paths.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np

from trainkit.collectives._topology import Ints, Topology
from trainkit.collectives.schedule import Schedule
from trainkit.collectives.schedule._units import bytes_per_second
from trainkit.collectives.trees._capacity import Share, best_share, fixed_share
from trainkit.collectives.trees._certificate import (
    Certificate,
    CertificateError,
    Cut,
    proved_rate,
    proves_unit,
)
from trainkit.collectives.trees._flat import Flat, check, share_of
from trainkit.collectives.trees._multicast import choose_multicast, without_multicast_vertices
from trainkit.collectives.trees._pack import pack
from trainkit.collectives.trees._problem import Collective, Problem, Progress, problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Tree:
    """One spanning tree, standing for `multiplicity` equal ones."""

    root: str
    """The compute node whose shard it carries (or, reducing, collects)."""
    multiplicity: int
    """How many of the root's trees it stands for."""
    edges: tuple[tuple[str, str], ...]
    """(sender, receiver) in an order in which they can run."""
    paths: tuple[tuple[str, ...], ...]
    """The physical nodes of each edge, sender first."""


class Trees(Sequence[Tree]):
    """The trees of a forest, made when looked at."""

    def __init__(self, flat: Flat, nodes: Sequence[str], reverse: bool) -> None:
        self._flat, self._nodes, self._reverse = flat, nodes, reverse

    def __len__(self) -> int:
        return len(self._flat)

    @overload
    def __getitem__(self, at: int) -> Tree: ...
    @overload
    def __getitem__(self, at: slice) -> list[Tree]: ...
    def __getitem__(self, at: int | slice) -> Tree | list[Tree]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(f"there are {len(self)} trees, got index {at}")
        flat, at = self._flat, at % len(self)
        paths = []
        for e in range(int(flat.edge_start[at]), int(flat.edge_start[at + 1])):
            path = tuple(self._nodes[v] for v in flat.path[flat.path_start[e] : flat.path_start[e + 1]])
            paths.append(path[::-1] if self._reverse else path)
        if self._reverse:
            paths.reverse()
        edges = tuple((path[0], path[-1]) for path in paths)
        return Tree(self._nodes[flat.root[at]], int(flat.multiplicity[at]), edges, tuple(paths))

    def __iter__(self) -> Iterator[Tree]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class Forest:
    """Trees that carry a collective at a certified rate."""

    topology: Topology
    """The network."""
    collective: Collective
    """What the trees are for."""
    k: int
    """Trees per unit of root weight (per compute node where shards are equal)."""
    unit: Fraction
    """Trees per unit of capacity: link e carries at most floor(unit * capacity) trees."""
    exact: bool
    """Whether `certificate` proves that no forest (with this k, if k was given) is faster."""
    members: tuple[str, ...]
    """The compute nodes that take part, in rank order."""
    weight: Ints
    """[vertices] shares rooted at each."""
    flat: Flat
    """The trees, in flat form and growing away from their roots."""
    certificate: Certificate | None = None
    """The proof, on the network in the trees' direction, checked when the forest was made."""

    @property
    def inv_rate(self) -> Fraction:
        """A message M takes M / shares * inv_rate: what the trees prove."""
        return self.unit / self.k

    @property
    def reducing(self) -> bool:
        """Whether data runs towards the roots."""
        return self.collective in ("reduce_scatter", "reduce")

    @property
    def trees(self) -> Trees:
        """The trees, one object each."""
        return Trees(self.flat, self.topology.nodes, self.reducing)

    @property
    def height(self) -> int:
        """The most hops between compute nodes."""
        return self.flat.height

    @property
    def heights(self) -> list[int]:
        """Hops of each tree."""
        return [int(h) for h in self.flat.heights]

    @cached_property
    def _network(self) -> Topology:
        return self.topology.transposed() if self.reducing else self.topology

    @property
    def _limit(self) -> Ints:
        return np.array([int(self.unit * capacity) for _, _, capacity in self.topology.links], dtype=np.int64)

    def verify(self) -> None:
        """Check every tree on the physical links.

        Raises:
            ForestError: a tree does not span, a path does not exist, a root has too few trees or a link too many.
        """
        self._loads()

    def _loads(self) -> Ints:
        network = self._network
        members = np.array([network.index[name] for name in self.members], dtype=np.int64)
        multicast = np.array([network.index[name] for name in network.multicast], dtype=np.int64)
        return check(self.flat, network, members, multicast, self.weight * self.k, self._limit)

    def loads(self) -> dict[tuple[str, str], int]:
        """Physical link -> trees that cross it."""
        return {(u, v): int(load) for (u, v, _), load in zip(self.topology.links, self._loads(), strict=True)}

    def seconds(self, nbytes: int) -> Fraction:
        """Time for a message of `nbytes` without latency and with fine chunks.

        Raises:
            ValueError: the network has no unit.
        """
        return Fraction(nbytes) / int(self.weight.sum()) * self.inv_rate / bytes_per_second(self.topology.unit)

    def schedule(self, chunks: int = 1) -> Schedule:
        """The forest as a schedule: each tree's share is cut into `chunks` pieces that follow each other down the tree."""
        from trainkit.collectives.trees._emit import emit_forest

        return emit_forest(self, chunks)

    def shares(self) -> list[Fraction]:
        """[trees] the part of the message that each tree carries."""
        return share_of(self.flat, self.weight * self.k, self.weight)

    def draw(self, bottleneck: Collection[tuple[str, str]] = ()) -> "Figure":
        """One panel per tree, at most twelve; the links of a bottleneck are marked."""
        from trainkit.collectives.trees._draw import draw_forest

        return draw_forest(self, bottleneck)


def forest(
    topology: Topology,
    collective: Collective = "allgather",
    *,
    trees_per_root: int | None = None,
    root: str | None = None,
    weights: Mapping[str, int] | None = None,
    group: Sequence[str] | None = None,
    max_height: int | None = None,
    progress: Progress = None,
) -> Forest:
    """The best forest of a network, verified on its physical links.

    Args:
        topology: the network; its "multicast" switches (or "aggregate" ones, for reductions) may copy.
        collective: "allgather", "reduce_scatter", "broadcast" or "reduce".
        trees_per_root: k; None takes the least k that reaches the optimum. A given k is exact where every switch link
            has equal capacities both ways; elsewhere capacities are rounded to balanced ones and `exact` says whether
            that cost anything.
        root: compute node that broadcasts or reduces.
        weights: compute node -> size of its shard in whole units; 1 where not named.
        group: the compute nodes that take part; the others pass data on.
        max_height: the most hops between compute nodes that a tree may have.
        progress: called with (phase, done, total) now and then.

    Raises:
        ValueError: an argument names an unknown node or does not fit the collective, or `max_height` was not reached;
            the message then says the least height that was.
        MemoryError: the network is large and irregular, and the packing would not fit this machine.

    Example:
        >>> nodes = ["a", "b", "c", "d"]
        >>> clique = Topology("clique", nodes, nodes, [(u, v, 2) for u in nodes for v in nodes if u != v])
        >>> trees = forest(clique)
        >>> trees.inv_rate, trees.k, trees.height
        (Fraction(1, 2), 1, 1)
    """
    check_counts(trees_per_root=trees_per_root, max_height=max_height)
    plain = problem(topology, collective, root=root, weights=weights, group=group, progress=progress)
    asked = choose_multicast(plain)
    share = best_share(asked) if trees_per_root is None else fixed_share(asked, trees_per_root)
    grown = build(share, max_height)
    members = tuple(topology.compute_nodes if group is None else group)
    unit = share.unit * topology.scale
    proof = _proof(share, plain, members, unit, trees_per_root is not None)
    result = Forest(
        topology, collective, share.k, unit, proof is not None, members, asked.weight, grown, certificate=proof
    )
    result.verify()
    return result


def _proof(share: Share, plain: Problem, members: Sequence[str], unit: Fraction, fixed: bool) -> Certificate | None:
    """The first certificate that proves the trees' rate, or that no smaller unit has room for this k."""
    network = plain.topology
    weight = {name: int(plain.weight[network.index[name]]) for name in members}
    candidates = [*share.certificates]
    if len(share.problem.spanned) > len(members):
        # A cut that only a switch is outside of proves nothing: no tree has to reach a switch.
        candidates.append(plain.cut(plain.search()[1]))
    for candidate in candidates:
        with suppress(CertificateError):
            if proved_rate(network, members, weight, candidate) >= unit / share.k:
                return candidate
            if fixed and isinstance(candidate, Cut) and proves_unit(network, members, weight, share.k, unit, candidate):
                return candidate
    return None


def check_counts(**counts: int | None) -> None:
    """Refuse counts that are neither None nor whole numbers of at least 1."""
    for what, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{what} must be a whole number >= 1, got {value!r}")


def build(share: Share, max_height: int | None) -> Flat:
    """Trees between members: packed over the spanned vertices, then multicast-capable switches folded into the paths."""
    asked = share.problem
    packed = pack(asked, asked.weight * share.k, max_height)
    return packed if len(asked.spanned) == len(asked.members) else without_multicast_vertices(packed, asked.members)
