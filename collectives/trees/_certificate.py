"""Proofs that no trees are faster, checked on the physical network alone.

Two kinds. A cut: every tree that starts inside a set of vertices and reaches a member outside crosses a link that leaves
it. Lengths: give each link a length y >= 0; trees that run for a time t load link e with at most t * b_e, so the lengths
of all trees together are at most t * sum(y * b), and no tree is shorter than the shortest one. By the duality of linear
programs some lengths prove the optimum itself (Frank, "Kernel systems of directed graphs", 1979, for the packing side).

Nothing here knows how a proof was found: the functions take the topology, its capacities and the multipliers, in
rational arithmetic, and share no code with the solver.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np
from scipy.sparse.csgraph import connected_components

from trainkit.collectives._topology import Topology


class CertificateError(ValueError):
    """A proof that does not hold."""


@dataclass(frozen=True)
class Cut:
    """A set of vertices that some member is not in."""

    inside: frozenset[str]


@dataclass(frozen=True)
class Lengths:
    """A length for every link, in the order of `Topology.links`."""

    lengths: tuple[Fraction, ...]


Certificate = Cut | Lengths


def proved_rate(
    topology: Topology, members: Sequence[str], weight: Mapping[str, int], certificate: Certificate
) -> Fraction:
    """What a certificate proves of trees that carry `weight[root]` shares out of each root to all members.

    Args:
        topology: the network in the trees' direction, transposed for reductions.
        members: compute nodes that every tree reaches.
        weight: member -> shares rooted there.
        certificate: the cut or the lengths.

    Returns:
        A lower bound on the time per share and unit of capacity: `Forest.inv_rate` is never below it.

    Raises:
        CertificateError: it proves nothing; the message says which rule it breaks.
    """
    if isinstance(certificate, Cut):
        inside = certificate.inside
        leaving = sum((b for u, v, b in topology.links if u in inside and v not in inside), Fraction(0))
        _check_cut(members, inside, leaving)
        return sum(weight[v] for v in members if v in inside) / leaving
    used = _used(topology, certificate.lengths)
    shortest = _shortest_trees(topology, members, certificate.lengths)
    return sum((weight[v] * shortest[v] for v in members), Fraction(0)) / used


def proved_time(topology: Topology, members: Sequence[str], certificate: Lengths) -> Fraction:
    """What lengths prove of an all-reduce: each share is reduced along a tree and broadcast along another.

    Returns:
        A lower bound on `AllreduceForest.time_per_byte`, whatever the shares of the roots.

    Raises:
        CertificateError: as `proved_rate`.
    """
    used = _used(topology, certificate.lengths)
    down = _shortest_trees(topology, members, certificate.lengths)
    up = _shortest_trees(topology.transposed(), members, certificate.lengths)
    return min(down[v] + up[v] for v in members) / used


def proves_unit(
    topology: Topology, members: Sequence[str], weight: Mapping[str, int], k: int, unit: Fraction, cut: Cut
) -> bool:
    """Whether a cut proves that no unit below `unit` has room for k whole trees per share.

    At any smaller unit a link of capacity b carries at most ceil(unit * b) - 1 trees.

    Raises:
        CertificateError: as `proved_rate`.
    """
    leaving = [b for u, v, b in topology.links if u in cut.inside and v not in cut.inside]
    _check_cut(members, cut.inside, sum(leaving, Fraction(0)))
    room = sum(-(-unit * b // 1) - 1 for b in leaving)
    return bool(room < k * sum(weight[v] for v in members if v in cut.inside))


def _check_cut(members: Sequence[str], inside: frozenset[str], leaving: Fraction) -> None:
    if inside.issuperset(members):
        raise CertificateError("the cut has all members inside: no tree needs to leave it")
    if not leaving:
        raise CertificateError("nothing leaves the cut: it is no cut of a connected network")


def _used(topology: Topology, lengths: Sequence[Fraction]) -> Fraction:
    """The length that all links together offer per unit of time."""
    if len(lengths) != len(topology.links):
        raise CertificateError(f"{len(lengths)} lengths were given for {len(topology.links)} links")
    for (u, v, _), length in zip(topology.links, lengths, strict=True):
        if not isinstance(length, Fraction | int) or length < 0:
            raise CertificateError(f"the length of {u} -> {v} must be an exact number >= 0, got {length!r}")
    used = sum((length * b for length, (_, _, b) in zip(lengths, topology.links, strict=True)), Fraction(0))
    if not used:
        raise CertificateError("all lengths are 0: they prove nothing")
    return used


def _shortest_trees(topology: Topology, members: Sequence[str], lengths: Sequence[Fraction]) -> dict[str, Fraction]:
    """A lower bound, for each member, on the length of every tree that grows from it and reaches all members.

    A tree is edges between members, each a path whose links all count; a multicast switch may take a message in once
    and send it on several times, so it may be a vertex of the tree as well. A set X of these vertices with a member in
    it is entered at least once by a tree that starts outside: charge the shortest edge into X to all edges that enter
    it, and go on with what is left of them. What a tree is charged in total is no more than its length. The sets are
    the strong components of edges with nothing left, and where such a component can be reached from elsewhere for
    nothing, the component with all that reach it. With members alone this is Edmonds' algorithm and the bound is met.
    """
    scale = lcm(*(Fraction(length).denominator for length in lengths))
    whole = [int(length * scale) for length in lengths]
    beyond = sum(whole) + 1  # longer than any path
    size, index = len(topology.nodes), topology.index
    near: Any = np.full((size, size), beyond, dtype=np.int64 if beyond * size < 2**60 else object)
    for (u, v, _), length in zip(topology.links, whole, strict=True):
        near[index[u], index[v]] = length
    at = [index[name] for name in (*members, *sorted(topology.multicast))]
    for w in set(range(size)).difference(at):  # what passes through w goes past it from here on
        into, out = np.flatnonzero(near[:, w] < beyond), np.flatnonzero(near[w] < beyond)
        past = np.ix_(into, out)
        near[past] = np.minimum(near[past], near[into, w, None] + near[w, out])
        near[:, w] = beyond
    near = near[np.ix_(at, at)]
    holds = np.arange(len(at)) < len(members)  # [components] whether a member is in it
    part = np.arange(len(at))  # [vertices] its component
    total, inside = 0, np.zeros(len(at), dtype=near.dtype)  # charged in all; [vertices] charged for sets it is in
    while True:
        count, merged = connected_components(near == 0, connection="strong")
        if count < len(near):
            near = np.array([near[merged == c].min(axis=0) for c in range(count)], dtype=near.dtype)
            near = np.array([near[:, merged == c].min(axis=1) for c in range(count)], dtype=near.dtype).T.copy()
            part, holds = merged[part], np.array([holds[merged == c].any() for c in range(count)])
        if holds.sum() == 1:
            return {v: Fraction(int(total - inside[i]), scale) for i, v in enumerate(members)}
        np.fill_diagonal(near, beyond)
        least = near.min(axis=0)
        sources = np.flatnonzero(holds & (least > 0))
        if len(sources):
            near[:, sources] -= least[sources]
            total += int(least[sources].sum())
            inside += np.where(np.isin(part, sources), least[part], 0)
        else:
            chosen = min((_reaching(near == 0, c) for c in np.flatnonzero(holds)), key=lambda x: int((x & holds).sum()))
            charge = near[np.ix_(~chosen, chosen)].min()
            near[np.ix_(~chosen, chosen)] -= charge
            total += int(charge)
            inside += np.where(chosen[part], charge, 0)


def _reaching(free: Any, component: int) -> Any:
    """[components] whether it reaches this one over free edges."""
    found = np.zeros(len(free), dtype=bool)
    found[component] = True
    while True:
        more = found | free[:, found].any(axis=1)
        if (more == found).all():
            return found
        found = more
