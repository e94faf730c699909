"""Base topologies by arithmetic: rings, circulants, tori, shuffles."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from math import isqrt, prod

import numpy as np

from trainkit.collectives.direct._digraph import Digraph
from trainkit.collectives.direct._family import Facts, Family, balanced


def _steps(nodes: int, steps: list[int]) -> Digraph:
    """Links x -> x + s (mod nodes) for every s."""
    tail = np.repeat(np.arange(nodes), len(steps))
    return Digraph.of_arrays(nodes, tail, (tail + np.tile(np.array(steps), nodes)) % nodes)


def uniring(degree: int, nodes: int) -> Digraph:
    """One-way ring of `degree` parallel links."""
    return _steps(nodes, [1] * degree)


def biring(degree: int, nodes: int) -> Digraph:
    """Two-way ring, degree / 2 parallel links each way."""
    if degree % 2:
        raise ValueError(f"a two-way ring has an even degree, got {degree}")
    return _steps(nodes, [1, -1] * (degree // 2))


def circulant(nodes: int, *offsets: int) -> Digraph:
    """Links x <-> x + o for every offset; an offset of nodes / 2 is two parallel links."""
    return _steps(nodes, [sign * offset for offset in offsets for sign in (1, -1)])


def dicirculant(nodes: int, *offsets: int) -> Digraph:
    """Links x -> x + o for every offset."""
    return _steps(nodes, list(offsets))


def _optimal_step(nodes: int) -> int:
    # the least m with 2 m^2 + 2 m + 1 >= nodes: that many points lie within m steps in the plane
    root = isqrt(max(0, 2 * nodes - 2))
    return next(m for m in range(max(1, root // 2 - 1), root + 2) if 2 * m * m + 2 * m + 1 >= nodes)


def optimal_circulant(nodes: int) -> Digraph:
    """The circulant of offsets m, m + 1 with the least diameter, m."""
    step = _optimal_step(nodes)
    return circulant(nodes, step, step + 1)


def diamond() -> Digraph:
    """8 hosts of degree 2 at 3 steps and no bandwidth lost: a circulant with the published Diamond graph's figures."""
    return dicirculant(8, 1, 3)


def kautz(degree: int, nodes: int) -> Digraph:
    """Generalised Kautz digraph (Imase, Itoh 1981): x -> -d x - a (mod nodes), a = 1 .. d; any number of hosts."""
    tail = np.repeat(np.arange(nodes, dtype=np.int64), degree)
    return Digraph.of_arrays(nodes, tail, (-degree * tail - np.tile(np.arange(1, degree + 1), nodes)) % nodes)


def de_bruijn(degree: int, length: int) -> Digraph:
    """De Bruijn digraph: words of `length` letters, shifted by one."""
    nodes = degree**length
    tail = np.repeat(np.arange(nodes, dtype=np.int64), degree)
    return Digraph.of_arrays(nodes, tail, (degree * tail + np.tile(np.arange(degree), nodes)) % nodes)


def torus(*sides: int) -> Digraph:
    """Torus; along a side of two the neighbour both ways is the same host, and one link goes there."""
    return _grid(sides, [(axis, sign, ()) for axis, side in enumerate(sides) for sign in (1, -1)[: side - 1]])


def twisted_torus(side: int) -> Digraph:
    """A side x side x 2 side torus whose short wraps also shift the long axis by `side` (as TPU v4's 4 x 4 x 8)."""
    twists: list[tuple[int, ...]] = [(0, 0, side), (0, 0, side), ()]
    moves = [(axis, sign, twist) for axis, twist in enumerate(twists) for sign in (1, -1)]
    return _grid((side, side, 2 * side), moves)


def _grid(sides: tuple[int, ...], moves: list[tuple[int, int, tuple[int, ...]]]) -> Digraph:
    """Every point by every move (axis, sign, what a wrap on this axis adds)."""
    number = {point: at for at, point in enumerate(product(*map(range, sides)))}

    def moved(point: tuple[int, ...], axis: int, sign: int, twist: tuple[int, ...]) -> int:
        target = list(point)
        target[axis] += sign
        if twist and not 0 <= target[axis] < sides[axis]:
            target = [x + sign * t for x, t in zip(target, twist, strict=True)]
        return number[tuple(x % side for x, side in zip(target, sides, strict=True))]

    return Digraph.of(len(number), ((at, moved(point, *move)) for point, at in number.items() for move in moves))


def hypercube(dimension: int) -> Digraph:
    """Binary hypercube."""
    return hamming(dimension, 2)


def hamming(dimension: int, letters: int) -> Digraph:
    """Words of `dimension` letters, linked where they differ in one."""
    x = np.arange(letters**dimension)
    heads = []
    for axis in range(dimension):
        place = letters**axis
        digit = x // place % letters
        heads += [x + ((digit + shift) % letters - digit) * place for shift in range(1, letters)]
    return Digraph.of_arrays(len(x), np.repeat(x, len(heads)), np.stack(heads, axis=1).reshape(-1))


def _log(value: int, base: int) -> int | None:
    """The exact logarithm, if there is one."""
    power = 0
    while base > 1 and value > 1 and value % base == 0:
        value, power = value // base, power + 1
    return power if value == 1 and power else None


def _shuffle_facts(degree: int, nodes: int, steps: int) -> Facts:
    # every walk of t links through one in-link starts elsewhere: degree^(t - 1) of them in step t
    walks = sum(degree**t for t in range(steps))
    return Facts(nodes, degree, steps, Fraction(degree * walks, nodes))


def _kautz_facts(degree: int, nodes: int) -> Facts:
    length = _log(nodes, degree)
    if length is not None:
        return _shuffle_facts(degree, nodes, length)
    length = _log(nodes // (degree + 1), degree) if nodes % (degree + 1) == 0 else None
    if nodes == degree + 1:
        return balanced(nodes, degree, 1)
    if length is not None:  # the Kautz digraph: the line graph of the complete one, taken `length` times
        return _shuffle_facts(degree, nodes, length + 1)
    steps = next(t for t in range(1, nodes) if degree**t >= nodes)
    return _shuffle_facts(degree, nodes, steps)._replace(exact=False)


def _torus_facts(*sides: int) -> Facts:
    return balanced(prod(sides), sum(min(2, side - 1) for side in sides), sum(side // 2 for side in sides))


def _tori(nodes: int, degree: int) -> Iterator[tuple[int, ...]]:
    def sides(rest: int, ports: int, least: int) -> Iterator[tuple[int, ...]]:
        if ports == min(2, rest - 1):
            yield (rest,)
        for side in range(least, isqrt(rest) + 1):
            if rest % side == 0 and ports > min(2, side - 1):
                yield from ((side, *more) for more in sides(rest // side, ports - min(2, side - 1), side))

    yield from (found for found in sides(nodes, degree, 2) if len(found) > 1)


def _hammings(nodes: int, degree: int) -> Iterator[tuple[int, int]]:
    for dimension in range(2, nodes.bit_length()):
        letters = degree // dimension + 1
        if letters >= 2 and degree == dimension * (letters - 1) and letters**dimension == nodes:
            yield dimension, letters


RINGS = (
    Family("uniring", uniring, lambda d, n: balanced(n, d, n - 1), lambda n, d: [(d, n)], symmetric=False),
    Family("biring", biring, lambda d, n: balanced(n, d, n // 2), lambda n, d: [(d, n)] if d % 2 == 0 else []),
    Family(
        "optimal_circulant",
        optimal_circulant,
        lambda n: balanced(n, 4, _optimal_step(n)),
        lambda n, d: [(n,)] if d == 4 and n >= 7 else [],
    ),
    Family(
        "diamond",
        diamond,
        lambda: balanced(8, 2, 3),
        lambda n, d: [()] if (n, d) == (8, 2) else [],
        symmetric=False,
    ),
    Family("kautz", kautz, _kautz_facts, lambda n, d: [(d, n)] if 2 <= d < n else [], symmetric=False),
    Family(
        "de_bruijn",
        de_bruijn,
        lambda d, length: _shuffle_facts(d, d**length, length),
        lambda n, d: [(d, length) for length in [_log(n, d)] if length],
        symmetric=False,
    ),
    Family("torus", torus, _torus_facts, _tori),
    Family(
        "twisted_torus",
        twisted_torus,
        lambda side: balanced(2 * side**3, 6, 3 * side // 2),
        lambda n, d: [(side,) for side in range(2, 30) if n == 2 * side**3 and d == 6],
    ),
    Family(
        "hypercube",
        hypercube,
        lambda n: balanced(2**n, n, n),
        lambda n, d: [(d,)] if n == 2**d else [],
    ),
    Family("hamming", hamming, lambda n, q: balanced(q**n, n * (q - 1), n), _hammings),
)
