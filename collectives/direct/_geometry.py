"""Base topologies from finite geometry: distance-regular graphs, which load every link alike in every step."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import combinations, product
from typing import Any

import networkx as nx

from trainkit.collectives.direct._digraph import Digraph
from trainkit.collectives.direct._family import Facts, Family, balanced

Edges = Iterable[tuple[Hashable, Hashable]]


def _two_way(edges: Edges) -> Digraph:
    pairs = [(u, v) for u, v in edges]
    number = {node: at for at, node in enumerate(dict.fromkeys(node for pair in pairs for node in pair))}
    return Digraph.of(len(number), ((number[a], number[b]) for u, v in pairs for a, b in ((u, v), (v, u))))


def complete(nodes: int) -> Digraph:
    """Everybody linked with everybody."""
    return _two_way(combinations(range(nodes), 2))


def bipartite(degree: int) -> Digraph:
    """Complete bipartite graph of two halves of `degree` hosts."""
    return _two_way((("left", u), ("right", v)) for u, v in product(range(degree), repeat=2))


def crown(half: int) -> Digraph:
    """Complete bipartite graph less a perfect matching."""
    return _two_way((("left", u), ("right", v)) for u, v in product(range(half), repeat=2) if u != v)


def johnson(n: int, k: int) -> Digraph:
    """k-subsets of n things, linked where they differ in one."""
    sets = [frozenset(c) for c in combinations(range(n), k)]
    return _two_way((a, b) for a, b in combinations(sets, 2) if len(a & b) == k - 1)


def odd(degree: int) -> Digraph:
    """Subsets of degree - 1 out of 2 degree - 1 things, linked where disjoint: at degree 3 Petersen's graph."""
    sets = [frozenset(c) for c in combinations(range(2 * degree - 1), degree - 1)]
    return _two_way((a, b) for a, b in combinations(sets, 2) if not a & b)


def doubled_odd(degree: int) -> Digraph:
    """Doubled odd graph: subsets of degree - 1 and of degree things, linked by inclusion."""
    things = range(2 * degree - 1)
    small, large = ([frozenset(c) for c in combinations(things, size)] for size in (degree - 1, degree))
    return _two_way((a, b) for a, b in product(small, large) if a < b)


class _Field:
    """GF(q) for a prime q and for 4: elements 0 .. q - 1."""

    def __init__(self, q: int) -> None:
        if q != 4 and (q < 2 or any(q % p == 0 for p in range(2, q))):
            raise ValueError(f"the geometries here are over fields of a prime or of 4 elements, got {q}")
        self.q = q

    def add(self, a: int, b: int) -> int:
        return a ^ b if self.q == 4 else (a + b) % self.q

    def mul(self, a: int, b: int) -> int:
        if self.q != 4:
            return a * b % self.q
        return (a + b - 2) % 3 + 1 if a and b else 0  # 2 and 3 are the powers of the generator

    def dot(self, u: Iterable[int], v: Iterable[int]) -> int:
        total = 0
        for a, b in zip(u, v, strict=True):
            total = self.add(total, self.mul(a, b))
        return total

    def points(self, size: int) -> Iterator[tuple[int, ...]]:
        """Projective points: the vectors whose first nonzero entry is 1."""
        for v in product(range(self.q), repeat=size):
            if next((a for a in v if a), 0) == 1:
                yield v


def incidence(q: int) -> Digraph:
    """Points and lines of the projective plane of order q, linked where they meet; q = 2 is Heawood's."""
    field = _Field(q)
    points = list(field.points(3))
    return _two_way((("p", u), ("l", v)) for u, v in product(points, repeat=2) if field.dot(u, v) == 0)


def non_incidence(q: int) -> Digraph:
    """Points and lines of the projective plane, linked where they do not meet."""
    field = _Field(q)
    points = list(field.points(3))
    return _two_way((("p", u), ("l", v)) for u, v in product(points, repeat=2) if field.dot(u, v) != 0)


def affine(q: int) -> Digraph:
    """Points of the affine plane of order q and its lines y = a x + b, linked where they meet."""
    field = _Field(q)
    return _two_way(
        (("p", (x, field.add(field.mul(a, x), b))), ("l", (a, b))) for x, a, b in product(range(q), repeat=3)
    )


def symplectic(q: int) -> Digraph:
    """Points and lines of the symplectic generalised quadrangle W(q), linked where they meet."""
    field = _Field(q)
    if q == 4:
        raise ValueError("the symplectic quadrangle is here over fields of a prime number of elements, got 4")
    points = list(field.points(4))

    def form(u: tuple[int, ...], v: tuple[int, ...]) -> int:
        return (u[0] * v[1] - u[1] * v[0] + u[2] * v[3] - u[3] * v[2]) % q

    def on_line(u: tuple[int, ...], v: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        yield v
        for a in range(q):
            w = [(x + a * y) % q for x, y in zip(u, v, strict=True)]
            inverse = pow(next(x for x in w if x), -1, q)
            yield tuple(x * inverse % q for x in w)

    lines = {frozenset(on_line(u, v)) for u, v in combinations(points, 2) if form(u, v) == 0}
    return _two_way((("p", u), ("l", line)) for line in lines for u in line)


def flags(of: Digraph) -> Digraph:
    """The undirected line graph: cables become hosts, linked where they share an end."""
    cables = [(u, v) for u, v in of.pairs() if u < v]
    at: dict[int, list[int]] = {}
    for cable, ends in enumerate(cables):
        for end in ends:
            at.setdefault(end, []).append(cable)
    return _two_way(pair for cable in at.values() for pair in combinations(cable, 2))


def _named(maker: "Callable[[], nx.Graph[Any]]") -> Callable[[], Digraph]:
    return lambda: _two_way(maker().edges())


def _one(name: str, build: Callable[..., Digraph], nodes: int, degree: int, steps: int) -> Family:
    """A single graph."""
    return Family(
        name,
        build,
        lambda: balanced(nodes, degree, steps),
        lambda n, d: [()] if (n, d) == (nodes, degree) else [],
    )


def _by_degree(
    name: str, build: Callable[[int], Digraph], facts: Callable[[int], Facts], parameters: Iterable[int]
) -> Family:
    """One parameter, few values: the sizes are looked up."""
    known = {p: facts(p) for p in parameters}
    return Family(name, build, facts, lambda n, d: [(p,) for p, f in known.items() if (f.nodes, f.degree) == (n, d)])


def _binomial(n: int, k: int) -> int:
    return len(list(combinations(range(n), k)))


PLANES = (2, 3, 4, 5, 7, 11, 13)
GEOMETRY = (
    Family("complete", complete, lambda n: balanced(n, n - 1, 1), lambda n, d: [(n,)] if d == n - 1 else []),
    Family(
        "bipartite",
        bipartite,
        lambda d: balanced(2 * d, d, 2 if d > 1 else 1),
        lambda n, d: [(d,)] if n == 2 * d > 2 else [],
    ),
    Family("crown", crown, lambda h: balanced(2 * h, h - 1, 3), lambda n, d: [(d + 1,)] if n == 2 * d + 2 > 4 else []),
    Family(
        "johnson",
        johnson,
        lambda n, k: balanced(_binomial(n, k), k * (n - k), min(k, n - k)),
        lambda n, d: [(v, 2) for v in range(4, 12) if (v * (v - 1) // 2, 2 * (v - 2)) == (n, d)],
    ),
    _by_degree("odd", odd, lambda k: balanced(_binomial(2 * k - 1, k - 1), k, k - 1), range(2, 7)),
    _by_degree("doubled_odd", doubled_odd, lambda k: balanced(2 * _binomial(2 * k - 1, k), k, 2 * k - 1), range(2, 6)),
    _by_degree("incidence", incidence, lambda q: balanced(2 * (q * q + q + 1), q + 1, 3), PLANES),
    _by_degree("non_incidence", non_incidence, lambda q: balanced(2 * (q * q + q + 1), q * q, 3), PLANES),
    _by_degree("affine", affine, lambda q: balanced(2 * q * q, q, 4), PLANES),
    _by_degree("symplectic", symplectic, lambda q: balanced(2 * (q + 1) * (q * q + 1), q + 1, 4), (2, 3, 5)),
    _one("petersen", lambda: odd(3), 10, 3, 2),
    _one("petersen_flags", lambda: flags(odd(3)), 15, 4, 3),
    _one("heawood", lambda: incidence(2), 14, 3, 3),
    _one("heawood_flags", lambda: flags(incidence(2)), 21, 4, 3),
    _one("quadrangle_flags", lambda: flags(symplectic(2)), 45, 4, 4),
    _one("pappus", _named(nx.pappus_graph), 18, 3, 4),
    _one("desargues", _named(nx.desargues_graph), 20, 3, 5),
    _one("dodecahedron", _named(nx.dodecahedral_graph), 20, 3, 5),
    _one("hoffman_singleton", _named(nx.hoffman_singleton_graph), 50, 7, 2),
)
