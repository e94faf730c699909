"""Larger topologies from smaller ones, and the schedules carried over.

The carried schedule is what the closed formula of each expansion counts. Breadth-first broadcast solved anew on the
expanded topology (`bfb`) is never longer, and on line graphs and degree expansions never more loaded: there the formula
is only an upper bound. On the power of a topology that does not load all links alike the carried schedule, which starts
every part of a shard along another axis, can be the less loaded one.

Source: Efficient Direct-Connect Topologies for Collective Communications, arXiv 2202.03356 (line graph, degree and
Cartesian power expansion).
"""

from fractions import Fraction
from itertools import product as pairs_of
from math import lcm

import numpy as np

from trainkit.collectives.direct._digraph import Digraph
from trainkit.collectives.direct._family import Facts
from trainkit.collectives.direct._transfers import FIRST, LAST, RECEIVER, SENDER, SOURCE, STEP, Transfers


def line(graph: Digraph, times: int = 1) -> Digraph:
    """Line graph: links become hosts, (u, v) -> (v, w). N grows d-fold, the degree stays."""
    for _ in range(times):
        out = _links_from(graph)
        graph = Digraph.of(len(graph.tail), ((e, f) for e, v in enumerate(graph.head.tolist()) for f in out[v]))
    return graph


def degree_expansion(graph: Digraph, copies: int) -> Digraph:
    """Every host becomes `copies` hosts, linked with all copies of its neighbours. N and d grow alike."""
    i, j = (x.reshape(-1) for x in np.mgrid[:copies, :copies])
    tail = (graph.tail[:, None] * copies + i).reshape(-1)
    return Digraph.of_arrays(graph.nodes * copies, tail, (graph.head[:, None] * copies + j).reshape(-1))


def product(*factors: Digraph) -> Digraph:
    """Cartesian product: a link moves along one factor. Degrees add up."""
    result = factors[0]
    for factor in factors[1:]:
        own, other = np.arange(factor.nodes), np.arange(result.nodes)
        ends = [
            np.concatenate(
                [
                    (left[:, None] * factor.nodes + own).reshape(-1),
                    (other[:, None] * factor.nodes + right).reshape(-1),
                ]
            )
            for left, right in ((result.tail, factor.tail), (result.head, factor.head))
        ]
        result = Digraph.of_arrays(result.nodes * factor.nodes, ends[0], ends[1])
    return result


def power(graph: Digraph, times: int) -> Digraph:
    """Cartesian power."""
    return product(*[graph] * times)


def line_facts(base: Facts, times: int = 1) -> Facts:
    """What the carried schedule costs on the line graph; bandwidth is an upper bound for `bfb`."""
    n, d, t_l, t_b, _ = base
    grown = sum((Fraction(1, n * d**at) for at in range(times)), Fraction(0))
    return Facts(n * d**times, d, t_l + times, t_b + grown, exact=False)


def degree_facts(base: Facts, copies: int) -> Facts:
    """What the carried schedule costs on the degree expansion of a topology without self-loops.

    Keeps the least bandwidth term.
    """
    n, d, t_l, t_b, _ = base
    return Facts(n * copies, d * copies, t_l + 1, t_b + Fraction(copies - 1, copies * n), exact=False)


def power_facts(base: Facts, times: int) -> Facts:
    """What the carried schedule costs on the Cartesian power; keeps the least bandwidth term."""
    n, d, t_l, t_b, _ = base
    scale = Fraction(n**times - 1, n**times) / Fraction(n - 1, n)
    return Facts(n**times, d * times, t_l * times, t_b * scale, exact=False)


def carry_to_line(base: Transfers) -> Transfers:
    """The allgather on `line(graph)`: a link sends its shard to the links after it, then follows its head's schedule.

    Where x sends a part of v's shard to y, the host (x, y) sends the same part of the shard of every (u, v) to every
    (y, w).
    """
    graph = base.graph
    out = _links_from(graph)
    into: list[list[int]] = [[] for _ in range(graph.nodes)]
    link: dict[tuple[int, int], list[int]] = {}
    for e, (u, v) in enumerate(graph.pairs()):
        into[v].append(e)
        link.setdefault((u, v), []).append(e)
    c = base.chunks
    rows = [(0, e, f, e, 0, c) for e, v in enumerate(graph.head.tolist()) for f in out[v] if f != e]
    for step, x, y, v, first, last in base.rows.tolist():
        # parallel links x -> y share the transfer as evenly as whole chunks allow
        for sender, a, b in _shared(link[x, y], first, last):
            rows += [(step + 1, sender, f, e, a, b) for e, f in pairs_of(into[v], out[y]) if f != e]
    return Transfers.of_rows(line(graph), c, np.array(rows, dtype=np.int32))


def _shared(hosts: list[int], first: int, last: int) -> list[tuple[int, int, int]]:
    cuts = [first + (last - first) * at // len(hosts) for at in range(len(hosts) + 1)]
    return [(h, a, b) for h, a, b in zip(hosts, cuts, cuts[1:], strict=False) if a < b]


def carry_to_degree(base: Transfers, copies: int) -> Transfers:
    """The allgather on `degree_expansion(graph, copies)`.

    Copy i of a host broadcasts through the copies i only, which serve all copies of their neighbours; its own sisters
    get the shard from all its in-neighbours in one more step.
    """
    graph = degree_expansion(base.graph, copies)
    into: list[list[int]] = [[] for _ in range(base.graph.nodes)]
    for u, v in base.graph.pairs():
        if u != v:
            into[v].append(u)
    fine = lcm(*(len(hosts) * copies for hosts in into))
    rows = []
    for step, x, y, v, first, last in base.rows.tolist():
        for i, k in np.ndindex(copies, copies):
            rows.append((step, x * copies + i, y * copies + k, v * copies + i, first * fine, last * fine))
    whole, last_step = base.chunks * fine, base.steps
    for v, hosts in enumerate(into):
        senders = [x * copies + j for x in hosts for j in range(copies)]
        for i, k in np.ndindex(copies, copies):
            if i != k:
                rows += [
                    (last_step, sender, v * copies + k, v * copies + i, a, b)
                    for sender, a, b in _shared(senders, 0, whole)
                ]
    return Transfers.of_rows(graph, whole, np.array(rows, dtype=np.int32))


def carry_to_power(base: Transfers, times: int) -> Transfers:
    """The allgather on `power(graph, times)`: part j of a shard goes along axis j first, then j + 1, and so on round."""
    n, steps = base.graph.nodes, base.steps
    places = [n ** (times - 1 - axis) for axis in range(times)]
    points = np.arange(n**times)
    digits = [points // place % n for place in places]
    blocks = []
    for part in range(times):
        for phase in range(times):
            axis = (part + phase) % times
            done = [(part + earlier) % times for earlier in range(phase)]
            for step, x, y, v, first, last in base.rows.tolist():
                # hosts on the line's place x; sources that agree with them off the axes already travelled
                senders = points[digits[axis] == x]
                for shift in np.ndindex(*[n] * phase):
                    source = senders + (v - x) * places[axis]
                    for other, move in zip(done, shift, strict=True):
                        source = source + ((digits[other][source] + move) % n - digits[other][source]) * places[other]
                    block = np.empty((len(senders), 6), dtype=np.int32)
                    block[:, STEP], block[:, SENDER] = phase * steps + step, senders
                    block[:, RECEIVER], block[:, SOURCE] = senders + (y - x) * places[axis], source
                    block[:, FIRST], block[:, LAST] = part * base.chunks + first, part * base.chunks + last
                    blocks.append(block)
    return Transfers.of_rows(power(base.graph, times), base.chunks * times, np.concatenate(blocks))


def _links_from(graph: Digraph) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in range(graph.nodes)]
    for e, u in enumerate(graph.tail.tolist()):
        out[u].append(e)
    return out
