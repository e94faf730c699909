"""Claims of optimality against a linear program over all cuts, and proofs that are none."""

import random
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import networkx
import pytest
from tree_families import best_total, drawn

from trainkit.collectives import Topology, allreduce_forest, fabrics, forest, optimum
from trainkit.collectives.trees._certificate import (
    CertificateError,
    Cut,
    Lengths,
    proved_rate,
    proved_time,
    proves_unit,
)


def check(seed: int, most: int) -> None:
    """One network, one question: the value is the linear program's, and a claim of exactness is true."""
    rng = random.Random(seed)
    topology = drawn(rng, most)
    hosts = list(topology.compute_nodes)
    group = rng.sample(hosts, rng.randint(2, len(hosts))) if rng.random() < 0.3 else None
    members = hosts if group is None else group
    multicast = bool(topology.multicast or topology.aggregate)
    question = rng.choice(["allreduce", "allreduce", "allgather", "reduce_scatter", "broadcast"])
    if question == "allreduce":
        both = allreduce_forest(topology, group=group)
        truth, reached, exact = 1 / best_total(topology, members, None, ("down", "up")), both.time_per_byte, both.exact
        assert both.bound <= Fraction(truth) * (1 + Fraction(1, 10**7))
        assert not exact or _lengths_prove(topology, members, both.certificate, reached)
        anything = Lengths((Fraction(1), *(Fraction(rng.randint(0, 3)) for _ in topology.links[1:])))
        assert proved_time(topology, members, anything) <= Fraction(truth) * (1 + Fraction(1, 10**7))
        both.schedule().verify()
    else:
        root = rng.choice(members) if question == "broadcast" else None
        weights = {name: rng.randint(0, 3) for name in members} if rng.random() < 0.3 and root is None else None
        if weights is not None:
            weights[members[0]] += 1
        weight = weights or {name: int(root in (None, name)) for name in members}
        trees = forest(topology, question, group=group, weights=weights, root=root)  # type: ignore[arg-type]
        total = best_total(topology, members, weight, ("up",) if question == "reduce_scatter" else ("down",))
        truth, reached, exact = sum(weight.values()) / total, trees.inv_rate, trees.exact
        plain = optimum(topology, question, group=group, weights=weights, root=root)  # type: ignore[arg-type]
        assert plain.exact and (multicast or plain.achievable == reached)
        trees.schedule().verify()
    assert reached >= Fraction(truth) * (1 - Fraction(1, 10**7)), "faster than any trees: the check of loads is broken"
    slower = reached / Fraction(truth) - 1
    if exact:
        assert slower < Fraction(1, 10**7), f"a false certificate: {float(reached)} for {truth}"
    else:
        # Only mixtures of trees that use a multicast-capable switch and trees that pass it are beyond what is looked for.
        assert multicast


def _lengths_prove(topology: Topology, members: list[str], certificate: Lengths | None, time: Fraction) -> bool:
    return certificate is not None and proved_time(topology, members, certificate) == time


@pytest.mark.parametrize("part", range(20))
def test_claims_are_true(part: int) -> None:
    for seed in range(100 * part, 100 * part + 100):
        check(seed, most=7)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(500))
def test_claims_are_true_at_length(part: int) -> None:
    for seed in range(10**6 + 100 * part, 10**6 + 100 * part + 100):
        check(seed, most=6 + part % 5)


def mixed_star() -> Topology:
    return fabrics.star([10] * 4 + [40] * 4)


def test_the_networks_of_the_report() -> None:
    """Uplinks of hosts on a switch that cannot copy carry a tree once per child."""
    assert allreduce_forest(mixed_star()).time_per_byte == Fraction(1, 10)
    assert allreduce_forest(fabrics.star([25] * 7 + [200])).time_per_byte == Fraction(1, 25)
    names = ["h0", "h1", "h2"]
    rates = [(100, 4), (1, 4), (1, 4)]
    links = [
        link for name, (up, down) in zip(names, rates, strict=True) for link in ((name, "sw", up), ("sw", name, down))
    ]
    skewed = Topology("skewed", [*names, "sw"], names, links)
    assert (optimum(skewed).achievable, forest(skewed).inv_rate, forest(skewed).exact) == (1, 1, True)


def test_lengths_measure_the_shortest_trees() -> None:
    """Edmonds' algorithm of networkx on the same distances, root by root."""
    for seed in range(30):
        rng = random.Random(seed)
        topology = replace(drawn(rng, 7), multicast=frozenset(), aggregate=frozenset())
        lengths = tuple(Fraction(rng.randint(0, 9), rng.randint(1, 5)) for _ in topology.links)
        if not any(lengths):
            continue
        graph = networkx.DiGraph()
        for (u, v, _), length in zip(topology.links, lengths, strict=True):
            graph.add_edge(u, v, length=length)
        away = dict(networkx.all_pairs_dijkstra_path_length(graph, weight="length"))
        members = topology.compute_nodes
        used = sum(length * capacity for length, (_, _, capacity) in zip(lengths, topology.links, strict=True))
        for root in members:
            # Nothing may enter the root.
            reach = networkx.DiGraph()
            reach.add_weighted_edges_from((u, v, away[u][v]) for u in members for v in members if u != v and v != root)
            tree = networkx.minimum_spanning_arborescence(reach)
            weight = {name: int(name == root) for name in members}
            assert proved_rate(topology, members, weight, Lengths(lengths)) == tree.size("weight") / used


def test_a_copying_switch_may_be_passed_or_used() -> None:
    # One way up for all: each of the three other hosts is 2 away by itself, 4 together through the multicast-capable switch.
    star = fabrics.star([1] * 4)
    lengths = Lengths((Fraction(1),) * len(star.links))
    alone = dict.fromkeys(star.compute_nodes, 0) | {star.compute_nodes[0]: 1}
    assert proved_rate(star, star.compute_nodes, alone, lengths) == Fraction(6, 8)
    multicast = replace(star, multicast=frozenset(star.switches))
    assert proved_rate(multicast, star.compute_nodes, alone, lengths) == Fraction(4, 8)
    # A detour over the switch is not forced on trees that do without.
    far = Lengths(tuple(Fraction(9 if "switch" in (u, v) else 1) for u, v, _ in star.links))
    pair = [(u, v, 1) for u, v in pairwise([*star.compute_nodes, star.compute_nodes[0]])]
    ring = replace(multicast, links=[*star.links, *pair])
    near = Lengths((*far.lengths, *[Fraction(1)] * len(pair)))
    assert proved_rate(ring, star.compute_nodes, alone, near) * sum(near.lengths) == 3


def test_planted_proofs_are_refused() -> None:
    """Twenty proofs of more than is true: refused, or found to prove less."""
    mesh = fabrics.mesh([3, 2]).with_links({("0_0", "0_1"): 3, ("1_0", "0_0"): 2})
    both = allreduce_forest(mesh)
    members, truth = mesh.compute_nodes, both.time_per_byte
    assert both.certificate is not None
    good = both.certificate.lengths
    every = dict.fromkeys(members, 1)
    refused: list[tuple[Fraction, ...]] = [
        good[:-1],
        (*good, Fraction(1)),
        (),
        (Fraction(0),) * len(good),
        (-good[0] - 1, *good[1:]),
        tuple(-length for length in good),
        (float(good[0]), *good[1:]),  # type: ignore[arg-type]
        (float("nan"), *good[1:]),  # type: ignore[arg-type]
        (None, *good[1:]),  # type: ignore[arg-type]
    ]
    for lengths in refused:
        with pytest.raises(CertificateError):
            proved_time(mesh, members, Lengths(lengths))
    weaker = [tuple(Fraction(int(i == at)) for i in range(len(good))) for at in (0, 5)] + [
        tuple(length * (i % 3) for i, length in enumerate(good)),
        tuple(length + Fraction(1, 100) for length in good),
        good[1:] + good[:1],
        (Fraction(1),) * len(good),
    ]
    for lengths in weaker:
        assert proved_time(mesh, members, Lengths(lengths)) < truth
    assert proved_time(mesh, members, Lengths(tuple(1000 * length for length in good))) == truth
    for inside in (frozenset(members), frozenset(members[:0]), frozenset({"nowhere"})):
        with pytest.raises(CertificateError):
            proved_rate(mesh, members, every, Cut(inside))
    best = optimum(mesh)
    assert proved_rate(mesh, members, every, Cut(frozenset(members[:1]))) < best.inv_rate
    assert proved_rate(mesh, members, every, Cut(best.bottleneck)) == best.inv_rate
    trees = forest(fabrics.dgx_a100(2), trees_per_root=1)
    weight = dict.fromkeys(trees.members, 1)
    assert isinstance(trees.certificate, Cut)
    assert proves_unit(trees.topology, trees.members, weight, 1, trees.unit, trees.certificate)
    assert not proves_unit(trees.topology, trees.members, weight, 1, trees.unit * Fraction(101, 100), trees.certificate)
