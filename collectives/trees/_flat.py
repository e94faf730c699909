"""Trees in flat arrays: a thousand trees of a thousand edges are no Python objects until somebody asks."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from trainkit.collectives._topology import Ints, Topology


class ForestError(ValueError):
    """Trees that are not what they claim to be."""


@dataclass(frozen=True)
class Flat:
    """Out-trees on vertex numbers.

    Tree t has edges `edge_start[t]` to `edge_start[t + 1]`, each after the edge that reached its tail; edge e runs over
    the vertices `path[path_start[e]:path_start[e + 1]]`.
    """

    root: Ints
    multiplicity: Ints
    edge_start: Ints
    edge_tail: Ints
    edge_head: Ints
    path_start: Ints
    path: Ints

    def __len__(self) -> int:
        return len(self.root)

    @cached_property
    def tree_of_edge(self) -> Ints:
        """[edges] number of the tree."""
        return np.repeat(np.arange(len(self)), np.diff(self.edge_start))

    @cached_property
    def parent_edge(self) -> Ints:
        """[edges] the edge that reaches this edge's tail, -1 at the root, -2 where the tail was never reached."""
        size = int(self.path.max(initial=0)) + 1
        reached = np.full(len(self) * size, -2, dtype=np.int64)
        reached[self.tree_of_edge * size + self.edge_head] = np.arange(len(self.edge_head))
        reached[np.arange(len(self)) * size + self.root] = -1
        parent: Ints = reached[self.tree_of_edge * size + self.edge_tail]
        return parent

    @cached_property
    def depth(self) -> Ints:
        """[edges] hops between compute nodes from the root to the edge's head."""
        parent = self.parent_edge
        depth = np.where(parent < 0, 1, 0)
        while (depth == 0).any():
            below = np.flatnonzero(depth == 0)
            known = below[depth[parent[below]] > 0]
            if len(known) == 0:
                raise ForestError("a tree runs in a circle")
            depth[known] = depth[parent[known]] + 1
        return depth

    @cached_property
    def height(self) -> int:
        """The most hops between compute nodes from a root."""
        return int(self.depth.max(initial=0))

    @cached_property
    def heights(self) -> Ints:
        """[trees] hops from the root to the farthest node."""
        return np.maximum.reduceat(self.depth, self.edge_start[:-1])


def check(flat: Flat, topology: Topology, members: Ints, multicast: Ints, quota: Ints, limit: Ints) -> Ints:
    """Verify trees on the physical network; independent of how they were made.

    Args:
        flat: out-trees in the direction of `topology`.
        topology: the physical network.
        members: vertices that each tree must span.
        multicast: switches that may send on more than they take in.
        quota: [vertices] how many trees each root must have.
        limit: [links] how many trees each link may carry.

    Returns:
        [links] how many trees each link carries.

    Raises:
        ForestError: naming the first tree, root or link that breaks a rule.
    """
    nodes = topology.nodes
    size, edges = len(nodes), len(flat.edge_head)
    tree = flat.tree_of_edge
    is_member = np.zeros(size, dtype=bool)
    is_member[members] = True

    def refuse(bad: Ints, what: str) -> None:
        if len(bad):
            e = int(bad[0])
            raise ForestError(f"tree {tree[e]}: edge {nodes[flat.edge_tail[e]]} -> {nodes[flat.edge_head[e]]} {what}")

    if not is_member[flat.root].all():
        raise ForestError("a tree is rooted at a vertex that takes no part")
    short = np.flatnonzero(np.diff(flat.edge_start) != len(members) - 1)
    if len(short):
        raise ForestError(
            f"tree {short[0]} does not span: it has {np.diff(flat.edge_start)[short[0]]} edges, not {len(members) - 1}"
        )
    refuse(np.flatnonzero(~is_member[flat.edge_head]), "reaches a vertex that takes no part")
    refuse(np.flatnonzero(flat.edge_head == flat.root[tree]), "comes back to the root")
    heads = tree * size + flat.edge_head
    if len(np.unique(heads)) < edges:
        raise ForestError("a tree reaches a vertex twice")
    refuse(
        np.flatnonzero((flat.parent_edge == -2) | (flat.parent_edge >= np.arange(edges))),
        "leaves a vertex not yet reached",
    )
    if (flat.multiplicity <= 0).any():
        raise ForestError(f"tree {int(np.argmin(flat.multiplicity))} has no multiplicity")
    have = np.zeros(size, dtype=np.int64)
    np.add.at(have, flat.root, flat.multiplicity)
    wrong = np.flatnonzero(have != quota)
    if len(wrong):
        raise ForestError(f"root {nodes[wrong[0]]} has {have[wrong[0]]} trees, not {quota[wrong[0]]}")

    first, last = flat.path_start[:-1], flat.path_start[1:] - 1
    refuse(
        np.flatnonzero((flat.path[first] != flat.edge_tail) | (flat.path[last] != flat.edge_head)),
        "has another path's ends",
    )
    inner = np.ones(len(flat.path), dtype=bool)
    inner[first] = inner[last] = False
    edge_of = np.repeat(np.arange(edges), np.diff(flat.path_start))
    refuse(edge_of[inner & is_member[flat.path]], "passes through a member")
    step = np.ones(len(flat.path), dtype=bool)
    step[last] = False
    at = np.flatnonzero(step)
    tail, head, _ = topology.arcs
    keys = tail * size + head
    order = np.argsort(keys)
    wanted = flat.path[at] * size + flat.path[at + 1]
    place = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
    link = order[place]
    refuse(edge_of[at[keys[link] != wanted]], "uses a link that does not exist")

    times = flat.multiplicity[tree[edge_of[at]]]
    if len(multicast):
        times = np.where(_copies(flat, edge_of, at, link, multicast, len(keys)), 0, times)
    load = np.zeros(len(keys), dtype=np.int64)
    np.add.at(load, link, times)
    over = np.flatnonzero(load > limit)
    if len(over):
        u, v, _ = topology.links[over[0]]
        raise ForestError(f"link {u} -> {v} carries {load[over[0]]} trees, its capacity is {limit[over[0]]}")
    return load


def _copies(flat: Flat, edge_of: Ints, at: Ints, link: Ints, multicast: Ints, links: int) -> Ints:
    """[crossings] whether a multicast-capable switch further down makes this crossing the same as an earlier one of its tree."""
    copies = np.isin(flat.path, multicast)
    copies[flat.path_start[:-1]] = False
    last_copy = np.full(len(flat.path_start) - 1, -1, dtype=np.int64)
    where = np.flatnonzero(copies)
    np.maximum.at(last_copy, edge_of[where], where)
    shared = at < last_copy[edge_of[at]]
    tree = flat.tree_of_edge[edge_of[at]]
    _, first = np.unique(tree * links + link, return_index=True)
    repeat = np.ones(len(at), dtype=bool)
    repeat[first] = False
    return np.asarray(shared & repeat)


def share_of(flat: Flat, quota: Ints, weight: Ints) -> list[Fraction]:
    """[trees] the part of the whole message that a tree carries."""
    total = int(weight.sum())
    return [
        Fraction(int(m), int(quota[r])) * Fraction(int(weight[r]), total)
        for r, m in zip(flat.root, flat.multiplicity, strict=True)
    ]
