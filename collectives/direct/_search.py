"""Candidates for a size: the catalogue, expansions of smaller ones, and random Cayley digraphs."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product as combinations_of
from math import lcm
from typing import NamedTuple

import numpy as np

from trainkit.collectives._native import direct_search
from trainkit.collectives.direct._catalog import cayley_parts, members
from trainkit.collectives.direct._frontier import FoundTopology, Frontier, least_steps, named_topology
from trainkit.collectives.direct._groups import Metacyclic, groups, multiplicative_order, table

# A multiplication table takes 2 N^2 bytes; a candidate's Hall bound 2^d operations a step.
LARGEST_GROUP = 4096
LARGEST_DEGREE = 12
# A batch of random digraphs is a tenth of a second or two.
_TRIALS = 20_000
_OPERATIONS = 80_000_000
_OPEN = 2**62


class Pool:
    """The best topologies of one size so far, and the random search that goes on from them."""

    def __init__(self, nodes: int, degree: int, *, directed: bool, seed: int) -> None:
        """An empty pool; the search is a function of `seed` and of the number of batches run."""
        self.nodes, self.degree, self.directed, self.seed = nodes, degree, directed, seed
        self.batches = 0
        self.tried = 0
        self.frontier = Frontier([], nodes, degree, directed=directed, tried=0)
        self._unit = lcm(*range(1, min(degree, LARGEST_DEGREE) + 1))
        searchable = nodes <= LARGEST_GROUP and degree <= LARGEST_DEGREE
        self._groups = groups(nodes) if searchable else []

    @property
    def searchable(self) -> bool:
        """Whether random search covers this size."""
        return bool(self._groups)

    def add(self, name: str) -> bool:
        """Evaluate a topology in both directions; whether it was an improvement."""
        one = named_topology(name)
        if (one.bfb.nodes, one.bfb.degree) != (self.nodes, self.degree):
            raise ValueError(
                f"{name} has {one.bfb.nodes} hosts of degree {one.bfb.degree}, not {self.nodes} of {self.degree}"
            )
        kept = [*self.frontier, *self.frontier.balanced]
        fresh = Frontier([*kept, one], self.nodes, self.degree, directed=self.directed, tried=self.tried)
        better = one in fresh or one in fresh.balanced
        if better:
            self.frontier = fresh
        return better

    def useful(self, steps: int) -> bool:
        """Whether a topology of so many steps, and no bandwidth lost, would still be an improvement."""
        least = 2 * self.frontier.least_t_b
        return not any(one.t_l <= steps and one.t_b_sum == least for one in self.frontier.balanced)

    def search(self) -> bool:
        """One batch of random Cayley digraphs over one group; whether something better was among them.

        Every third batch changes a generator or two of the best so far instead of drawing afresh: near a good digraph
        there are often better ones.
        """
        random = np.random.default_rng([self.seed, self.nodes, self.degree, self.directed, self.batches])
        elite = [parts for parts in map(cayley_parts, sorted(self.names())) if parts]
        group, start = self._draw(random), list[int]()
        # links that carry both ways waste a port on the way back, but now and then they are the better choice
        symmetric = not self.directed or self.batches % 8 == 7
        if self.batches % 3 == 2 and elite:
            group, start = elite[int(random.integers(len(elite)))]
            symmetric = not self.directed
        trials = max(1, min(_TRIALS, _OPERATIONS // (self.degree * (self.nodes + 3 * 2**self.degree))))
        found = direct_search(
            table(group),
            self.degree,
            symmetric,
            self._unit,
            self._limits(lambda one: one.t_b),
            self._limits(lambda one: one.t_b_sum),
            trials,
            int(random.integers(2**63)),
            start,
        )
        self.batches += 1
        self.tried += trials
        # a later find is often better in all: then the earlier one is not kept
        better = [self.add(f"cayley({group}, {', '.join(map(str, one[3]))})") for one in reversed(found)]
        self.frontier.tried = self.tried
        return any(better)

    def _draw(self, random: np.random.Generator) -> Metacyclic:
        family = self._groups[int(random.integers(len(self._groups)))]
        if random.integers(2):
            # the farther a group is from commuting, the fewer words of generators coincide
            order = max(multiplicative_order(group.r, group.m) for group in family)
            family = [group for group in family if multiplicative_order(group.r, group.m) == order]
        return family[int(random.integers(len(family)))]

    def names(self) -> set[str]:
        """What is worth keeping."""
        return {one.name for one in (*self.frontier, *self.frontier.balanced)}

    def _limits(self, term: "Callable[[FoundTopology], Fraction]") -> list[int]:
        """Steps -> the least sum of loads reached within them, in 1 / unit shards."""
        limits = [_OPEN] * (self.nodes + 1)
        scale = Fraction(self.nodes * self._unit, self.degree)
        for one in (*self.frontier, *self.frontier.balanced):
            loads = int(term(one) * scale)
            limits[one.t_l :] = [min(loads, limit) for limit in limits[one.t_l :]]
        return limits


class Explorer:
    """Pools of all the sizes that a search needs: expansions start from the best of smaller ones."""

    def __init__(self, *, directed: bool, seed: int, late: Callable[[], bool]) -> None:
        """`late` tells when to give up."""
        self.directed, self.seed, self.late = directed, seed, late
        self._pools: dict[tuple[int, int], Pool] = {}

    def small(self, nodes: int, degree: int) -> Frontier:
        """The frontier of a part: catalogue, a short search, expansions."""
        if (nodes, degree) not in self._pools:
            pool = self._pools[nodes, degree] = Pool(nodes, degree, directed=self.directed, seed=self.seed)
            self.start(pool)
            while pool.searchable and pool.batches < 8 and not pool.frontier.proven and not self.late():
                pool.search()
            self.expand(pool)
        return self._pools[nodes, degree].frontier

    def start(self, pool: Pool) -> None:
        """Everything that the catalogue has, the promising first."""
        catalogue = sorted(members(pool.nodes, pool.degree, directed=self.directed), key=lambda m: (m[1].t_l, m[1].t_b))
        for name, facts in catalogue:
            if not pool.frontier or pool.useful(facts.t_l):
                pool.add(name)
        spread = spread_circulant(pool.nodes, pool.degree, directed=self.directed)
        if spread:
            pool.add(spread)

    def expand(self, pool: Pool) -> bool:
        """Every expansion that could still be an improvement; whether time sufficed."""
        for plan in sorted(_plans(pool.nodes, pool.degree, directed=self.directed), key=lambda plan: plan.least):
            if self.late():
                return False
            if not pool.useful(plan.least):
                continue
            for parts in combinations_of(*(self._best(*size) for size in plan.parts)):
                if pool.useful(sum(part.t_l for part in parts) + plan.further):
                    pool.add(plan.name.format(*(part.name for part in parts)))
        return not self.late()

    def _best(self, nodes: int, degree: int) -> list[FoundTopology]:
        if self.late() or not _possible(nodes, degree, directed=self.directed):
            return []
        return self.small(nodes, degree)


class _Plan(NamedTuple):
    """One way to make a size out of smaller ones."""

    least: int
    """No such expansion has fewer steps, by the Moore bounds of its parts."""
    name: str
    """Its name, with places for the parts."""
    parts: list[tuple[int, int]]
    """(N, d) of the parts."""
    further: int = 0
    """Steps on top of the parts'."""


def _plans(nodes: int, degree: int, *, directed: bool) -> Iterator[_Plan]:
    def bound(*parts: tuple[int, int]) -> int:
        return sum(least_steps(n, d, directed=directed) for n, d in parts)

    for n in (n for n in range(2, nodes) if nodes % n == 0):
        copies = nodes // n
        if directed and degree == copies and degree > 1:
            yield _Plan(bound((n, degree)) + 1, "line({})", [(n, degree)], 1)
        if degree % copies == 0:
            part = (n, degree // copies)
            yield _Plan(bound(part), f"degree_expansion({{}}, {copies})", [part])
        if n <= copies:
            for d in range(1, degree):
                parts = [(n, d), (copies, degree - d)]
                yield _Plan(bound(*parts), "product({}, {})", parts)


def _possible(nodes: int, degree: int, *, directed: bool) -> bool:
    return directed or nodes == 2 or (degree > 1 and nodes * degree % 2 == 0)


def check_size(nodes: int, degree: int, *, directed: bool) -> None:
    """Refuse sizes that no topology has.

    Raises:
        ValueError: naming the rule.
    """
    if nodes < 2:
        raise ValueError(f"a topology has at least 2 hosts, got nodes={nodes}")
    if degree < 1:
        raise ValueError(f"a host has at least 1 port, got degree={degree}")
    if _possible(nodes, degree, directed=directed):
        return
    if degree == 1:
        raise ValueError(
            f"one two-way port a host connects only pairs, not {nodes} hosts: degree >= 2 or one-way links"
        )
    raise ValueError(
        f"two-way links join ports in pairs, but {nodes} hosts of degree {degree} have an odd number of ports: "
        f"change one of the two by 1, or allow one-way links"
    )


def spread_circulant(nodes: int, degree: int, *, directed: bool) -> str | None:
    """A circulant whose offsets grow geometrically: a fair topology of any size; None where a ring is as good."""
    if degree < 2:
        return None
    axes = degree if directed else degree // 2
    most = nodes - 1 if directed else max(1, (nodes - 1) // 2)
    offsets: list[int] = []
    for axis in range(axes):
        offset = min(most, max(round(nodes ** (axis / axes)), offsets[-1] + 1 if offsets else 1))
        # more offsets than there are hosts: begin again with parallel links
        offsets.append(offset if offset not in offsets else axis % most + 1)
    if not directed:
        offsets = [sign for offset in offsets for sign in (offset, nodes - offset)]
        offsets += [nodes // 2] * (degree % 2)
    return f"cayley(metacyclic({nodes}, 1, 1), {', '.join(map(str, offsets))})"
