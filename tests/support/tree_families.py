"""Networks that break bounds on trees, and the optimum by one linear program over all their cuts.

The program knows nothing of the package's own: it lists every set of vertices.
"""

import random
from collections.abc import Mapping, Sequence
from itertools import chain, combinations, pairwise

import numpy as np
from scipy.optimize import linprog

from trainkit.collectives import Topology, TopologyError

CAPACITIES = ([1, 4], [1, 10], [10, 40], [1, 2, 4, 8], [25, 100], [5, 7, 40], [1, 100], [1, 16, 64], [3])


def drawn(rng: random.Random, most: int) -> Topology:
    """Hosts with mixed adapters on one to three switches; links may differ both ways, some switches copy or add."""
    while True:
        switches = [f"s{i}" for i in range(rng.randint(1, 3))]
        hosts = [f"h{i}" for i in range(rng.randint(2, max(2, most - len(switches))))]
        capacities, skewed = rng.choice(CAPACITIES), rng.random() < 0.5
        links: list[tuple[str, str, int]] = []

        def join(
            u: str,
            v: str,
            links: list[tuple[str, str, int]] = links,
            capacities: list[int] = capacities,
            skewed: bool = skewed,
        ) -> None:
            there = rng.choice(capacities)
            links.extend([(u, v, there), (v, u, rng.choice(capacities) if skewed else there)])

        for host in hosts:
            for switch in rng.sample(switches, rng.choice([1, 1, 1, 2]) if len(switches) > 1 else 1):
                join(host, switch)
        for one, other in pairwise(switches):
            join(one, other)
        if rng.random() < 0.3:
            join(*rng.sample(hosts, 2))
        multicast, adding = (
            [s for s in switches if rng.random() < 0.4] if rng.random() < 0.4 else []
            for _ in ("multicast", "aggregate")
        )
        try:
            return Topology(
                "drawn", [*hosts, *switches], hosts, links, multicast=frozenset(multicast), aggregate=frozenset(adding)
            )
        except TopologyError:
            continue


def irregular(size: int, seed: int) -> Topology:
    """A random tree with twice as many one-way links again; a third of the nodes compute."""
    rng = random.Random(seed)
    nodes = [f"v{i}" for i in range(size)]
    links = []
    for i in range(1, size):
        u, v, capacity = nodes[i], nodes[rng.randrange(i)], rng.randint(1, 99)
        links += [(u, v, capacity), (v, u, capacity)]
    for _ in range(5 * size // 2):
        u, v = rng.sample(nodes, 2)
        links.append((u, v, rng.randint(1, 99)))
    return Topology("irregular", nodes, nodes[: size // 3], links)


def best_total(
    topology: Topology, members: Sequence[str], weight: Mapping[str, int] | None, ways: Sequence[str]
) -> float:
    """The most shares per unit of time that trees carry, by a linear program over every cut.

    Args:
        topology: the network, as built.
        members: compute nodes that take part.
        weight: shares per root, in proportion; None leaves them free.
        ways: "down" for trees away from the roots, "up" for trees towards them; both share the links.

    Trees may use a multicast (adding) switch as a vertex or only pass it, so each set of such switches is a kind of tree
    with capacities of its own.
    """
    nodes, links = topology.nodes, topology.links
    at = {name: i for i, name in enumerate(nodes)}
    inside = (np.arange(1 << len(nodes))[:, None] >> np.arange(len(nodes)) & 1).astype(bool)  # [cuts, vertices]
    root = [at[name] for name in members]
    kinds = [
        (way, [at[name] for name in used])
        for way in ways
        for used in _subsets(sorted(topology.multicast if way == "down" else topology.aggregate))
    ]
    width = len(links) + len(root)
    variables = 1 + len(root) + width * len(kinds)  # the total, a weight per root, and per kind capacities and weights
    upper, equal = [], []
    shared = np.zeros((len(links), variables))
    for kind, (way, used) in enumerate(kinds):
        first = 1 + len(root) + width * kind
        ends = [(at[u], at[v]) if way == "down" else (at[v], at[u]) for u, v, _ in links]
        tail, head = np.array(ends).T
        shared[np.arange(len(links)), first + np.arange(len(links))] = 1
        spanned = [*root, *used]
        cuts = inside[~inside[:, spanned].all(axis=1) & inside[:, root].any(axis=1)]
        rows = np.zeros((len(cuts), variables))
        rows[:, first : first + len(links)] = -(cuts[:, tail] & ~cuts[:, head]).astype(float)
        rows[:, first + len(links) : first + width] = cuts[:, root]
        upper.append(rows)
        for w in set(range(len(nodes))).difference(spanned):
            row = np.zeros(variables)
            row[first : first + len(links)] = (tail == w).astype(float) - (head == w)
            equal.append(row)
    for way in ways:
        for i in range(len(root)):
            row = np.zeros(variables)
            row[1 + i] = -1
            for kind, (other, _) in enumerate(kinds):
                row[1 + len(root) + width * kind + len(links) + i] = float(other == way)
            equal.append(row)
    total = np.zeros(variables)
    total[0] = -1
    total[1 : 1 + len(root)] = 1
    equal.append(total)
    if weight is not None:
        for i, name in enumerate(members):
            row = np.zeros(variables)
            row[1 + i], row[0] = 1, -weight[name] / sum(weight.values())
            equal.append(row)
    largest = max(float(capacity) for _, _, capacity in links)
    right = np.concatenate([np.array([float(c) for _, _, c in links]) / largest, np.zeros(sum(map(len, upper)))])
    objective = np.zeros(variables)
    objective[0] = -1
    found = linprog(
        objective,
        A_ub=np.vstack([shared, *upper]),
        b_ub=right,
        A_eq=np.array(equal),
        b_eq=np.zeros(len(equal)),
        method="highs",
    )
    assert found.status == 0, found.message
    return float(-found.fun * largest)


def _subsets(items: Sequence[str]) -> list[tuple[str, ...]]:
    return list(chain.from_iterable(combinations(items, size) for size in range(len(items) + 1)))
