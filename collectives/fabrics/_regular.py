"""Regular graphs: rings, stars, grids, cubes, Kautz digraphs, dragonflies."""

from collections.abc import Sequence
from itertools import pairwise, product

from trainkit.collectives._topology import Topology
from trainkit.collectives.fabrics._build import Links, Rate, at_least, both, build


def ring(size: int, rate: Rate = 1, *, both_ways: bool = True, unit: str | None = None) -> Topology:
    """Compute nodes 0 .. size-1 in a circle."""
    at_least(2, size=size)
    pairs = {(i, (i + 1) % size) for i in range(size)}
    if both_ways:
        pairs |= {(v, u) for u, v in pairs}
    links: Links = [(str(u), str(v), rate) for u, v in sorted(pairs)]
    return build(f"ring {size}", [str(i) for i in range(size)], links, unit)


def star(rates: Sequence[Rate], *, unit: str | None = None) -> Topology:
    """Hosts on one switch "switch", each at its own rate."""
    links = [link for i, rate in enumerate(rates) for link in both(str(i), "switch", rate)]
    return build(f"star {len(rates)}", [str(i) for i in range(len(rates))], links, unit)


def mesh(sides: Sequence[int], rate: Rate = 1, *, wrap: bool = False, unit: str | None = None) -> Topology:
    """A grid of compute nodes; `wrap` closes every side to a torus."""
    at_least(1, **{f"side_{i}": side for i, side in enumerate(sides)})
    names = {at: "_".join(map(str, at)) for at in product(*(range(side) for side in sides))}
    pairs = set()
    for at in names:
        for axis, side in enumerate(sides):
            if at[axis] + 1 < side or (wrap and side > 1):
                to = (*at[:axis], (at[axis] + 1) % side, *at[axis + 1 :])
                pairs |= {(at, to), (to, at)}
    links: Links = [(names[u], names[v], rate) for u, v in sorted(pairs)]
    kind = "torus" if wrap else "mesh"
    return build(f"{kind} {'x'.join(map(str, sides))}", list(names.values()), links, unit)


def torus(sides: Sequence[int], rate: Rate = 1, *, unit: str | None = None) -> Topology:
    """A grid closed in every direction."""
    return mesh(sides, rate, wrap=True, unit=unit)


def hypercube(dimension: int, rate: Rate = 1, *, unit: str | None = None) -> Topology:
    """2^dimension compute nodes, linked where their numbers differ in one bit."""
    at_least(1, dimension=dimension)
    size = 2**dimension
    links: Links = [(str(u), str(u ^ 1 << bit), rate) for u in range(size) for bit in range(dimension)]
    return build(f"hypercube {dimension}", [str(u) for u in range(size)], links, unit)


def kautz(degree: int, length: int, rate: Rate = 1, *, unit: str | None = None) -> Topology:
    """Kautz digraph: words of `length` + 1 letters out of `degree` + 1, no letter twice in a row; one-way links."""
    at_least(1, degree=degree, length=length)
    letters = range(degree + 1)
    words = [w for w in product(letters, repeat=length + 1) if all(a != b for a, b in pairwise(w))]
    links: Links = [
        ("".join(map(str, w)), "".join(map(str, (*w[1:], x))), rate) for w in words for x in letters if x != w[-1]
    ]
    return build(f"kautz {degree} {length}", ["".join(map(str, w)) for w in words], links, unit)


def dragonfly(groups: int, routers: int, hosts: int, *, host: Rate = 1, local: Rate = 1, across: Rate = 1) -> Topology:
    """Groups of fully meshed routers with hosts; one link between any two groups, dealt over the routers."""
    at_least(1, routers=routers, hosts=hosts)
    at_least(2, groups=groups)
    compute = [f"h{g}_{r}_{i}" for g in range(groups) for r in range(routers) for i in range(hosts)]
    links: Links = []
    for g in range(groups):
        for r in range(routers):
            for i in range(hosts):
                links += both(f"h{g}_{r}_{i}", f"r{g}_{r}", host)
            for other in range(r + 1, routers):
                links += both(f"r{g}_{r}", f"r{g}_{other}", local)
        for far in range(g + 1, groups):
            links += both(f"r{g}_{(far - g - 1) % routers}", f"r{far}_{(groups - 1 - far + g) % routers}", across)
    return build(f"dragonfly {groups}x{routers}x{hosts}", compute, links, None)
