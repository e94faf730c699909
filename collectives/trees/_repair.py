"""Trees of a regular network, fitted to the capacities of one whose symmetry is broken.

Growth under symmetry makes the trees of a thousand compute nodes in seconds, exact packing those of an irregular network
in hours. A network with a few slowed links lies between: grow the trees as if it were whole, then take from each link
what is too much for it. One step hangs the part of a tree that an overloaded link brings elsewhere: on another vertex of
the tree by a path with room, with the part turned round where it has to be entered at a child. Every step lowers the
load of the link in hand and lifts none above the limit, so steps cannot undo each other; how near the optimum they come
is for the bound to say.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from trainkit.collectives._topology import Ints
from trainkit.collectives.trees._clock import Clock
from trainkit.collectives.trees._flat import Flat
from trainkit.collectives.trees._problem import Problem

_ENOUGH = 1 << 62
_STEPS = 1000  # of load on the fullest link: what a single tree weighs at most
# Over the bound, one after the other: a limit that leaves no room for any step is followed by a wider one.
_LADDER = tuple(Fraction(over, 1000) for over in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500))


@dataclass
class _Tree:
    """One tree taken apart."""

    side: int
    root: int
    times: int
    path: dict[int, tuple[int, ...]]
    """Vertex -> the way to it from its parent, both included."""

    def below(self, top: int) -> set[int]:
        """The vertex and all that hang on it."""
        children = self.children()
        found, stack = {top}, [top]
        while stack:
            for v in children[stack.pop()]:
                found.add(v)
                stack.append(v)
        return found

    def children(self) -> dict[int, list[int]]:
        """Vertex -> the vertices that it brings."""
        children: dict[int, list[int]] = defaultdict(list)
        for v, path in self.path.items():
            children[path[0]].append(v)
        return children

    def order(self) -> Iterator[tuple[int, int]]:
        """(vertex, hops from the root), parents first."""
        children = self.children()
        layer, depth = [self.root], 0
        yield self.root, 0
        while layer:
            layer, depth = [v for u in layer for v in children[u]], depth + 1
            yield from ((v, depth) for v in layer)


class Repair:
    """Trees of one or two sides that share the links.

    Args:
        problems: one per side, on the same links numbered alike; no switch copies.
        trees: per side, out-trees in the direction of its problem.
        capacity: [links] what they may carry, relative to each other.
        target: trees per unit of capacity at which the fitting ends.
        clock: when it ends otherwise.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        trees: Sequence[Flat],
        capacity: Sequence[Fraction],
        target: Fraction,
        clock: Clock,
    ) -> None:
        self.problems, self.capacity, self.clock = problems, capacity, clock
        self.arc, self.into, self.member = [], [], []
        for problem in problems:
            _, tail, head, _ = problem.graph
            ends = list(zip(tail.tolist(), head.tolist(), strict=True))
            self.arc.append({pair: e for e, pair in enumerate(ends)})
            into: list[list[tuple[int, int]]] = [[] for _ in range(problem.size)]
            for e, (u, v) in enumerate(ends):
                into[v].append((e, u))
            self.into.append(into)
            self.member.append(set(problem.members.tolist()))
        self.flat = list(trees)
        self.most = 2 + 2 * max(flat.height for flat in trees)
        self.crossed = [self._crossings(side) for side in range(len(trees))]
        load = self._loads()
        fullest = max(range(len(load)), key=lambda e: load[e] / float(capacity[e]))
        self.factor = -(-_STEPS // int(load[fullest]))
        self.times = [flat.multiplicity * self.factor for flat in trees]
        self.load = [int(x) * self.factor for x in load]
        self.target = target * self.factor
        self.changed: list[_Tree] = []
        self.limit: list[int] = []

    def unit(self) -> Fraction:
        """Trees per unit of capacity on the fullest link."""
        return max(load / b for load, b in zip(self.load, self.capacity, strict=True))

    def run(self) -> None:
        """Step until no link is fuller than the target, or no step is left, or the time is over."""
        if not self.target:
            return  # nothing is proved to aim at
        for over in _LADDER:
            self.limit = [int(self.target * (1 + over) * b) for b in self.capacity]
            for e in sorted(range(len(self.load)), key=lambda e: self.limit[e] - self.load[e]):
                if self.load[e] > self.limit[e] and not self._relieve(e):
                    return
            if all(load <= limit for load, limit in zip(self.load, self.limit, strict=True)):
                return

    def trees(self, side: int) -> Flat:
        """The trees as they are now, `factor` times as many."""
        flat, kept = self.flat[side], np.flatnonzero(self.times[side])
        edge = np.isin(flat.tree_of_edge, kept)
        edge_tail, edge_head = flat.edge_tail[edge].tolist(), flat.edge_head[edge].tolist()
        counts = np.diff(flat.edge_start)[kept].tolist()
        lengths = np.diff(flat.path_start)[edge].tolist()
        path = flat.path[np.repeat(edge, np.diff(flat.path_start))].tolist()
        root, times = flat.root[kept].tolist(), self.times[side][kept].tolist()
        for tree in self.changed:
            if tree.side == side and tree.times:
                root.append(tree.root)
                times.append(tree.times)
                counts.append(len(tree.path))
                for v, depth in tree.order():
                    if not depth:
                        continue
                    edge_tail.append(tree.path[v][0])
                    edge_head.append(v)
                    lengths.append(len(tree.path[v]))
                    path += tree.path[v]
        starts = (np.cumsum([0, *sizes]) for sizes in (counts, lengths))
        edge_start, path_start = starts
        arrays = (root, times, edge_start, edge_tail, edge_head, path_start, path)
        return Flat(*(np.array(values, dtype=np.int64) for values in arrays))

    def _crossings(self, side: int) -> tuple[Ints, Ints]:
        """([crossings] link, [crossings] number of the edge)."""
        flat, problem = self.flat[side], self.problems[side]
        size, tail, head, _ = problem.graph
        step = np.ones(len(flat.path), dtype=bool)
        step[flat.path_start[1:] - 1] = False
        at = np.flatnonzero(step)
        keys = tail * size + head
        order = np.argsort(keys)
        link = order[np.searchsorted(keys[order], flat.path[at] * size + flat.path[at + 1])]
        edges = np.repeat(np.arange(len(flat.edge_head)), np.diff(flat.path_start))
        return link, edges[at]

    def _loads(self) -> Ints:
        load = np.zeros(len(self.capacity), dtype=np.int64)
        for flat, (link, edge) in zip(self.flat, self.crossed, strict=True):
            np.add.at(load, link, flat.multiplicity[flat.tree_of_edge[edge]])
        return load

    def _relieve(self, e: int) -> bool:
        """Take what is too much from a link, as far as there are steps; False when the time is over."""
        for side in range(len(self.problems)):
            link, edge = self.crossed[side]
            flat = self.flat[side]
            brought: dict[int, list[int]] = defaultdict(list)  # tree -> the vertices that the link brings
            for at in edge[link == e].tolist():
                brought[int(flat.tree_of_edge[at])].append(int(flat.edge_head[at]))
            # An untouched tree is known by its number, and taken apart when its turn comes.
            waiting: list[tuple[_Tree | None, int]] = [(None, number) for number in brought]
            waiting += [(tree, -1) for tree in self.changed if tree.side == side and tree.times]
            while waiting and self.load[e] > self.limit[e]:
                if self.clock.left() < 0:
                    return False
                made, number = waiting.pop()
                tree = self._apart(side, number) if made is None else made
                moved = self._step(tree, e, brought[number] if made is None else self._crossing(tree, e))
                if not moved:
                    continue
                if made is None:
                    self.times[side][number] -= moved
                waiting += [(made, number), (self.changed[-1], -1)]
        return True

    def _links(self, side: int, way: tuple[int, ...]) -> list[int]:
        """The links of a path; -1 where there is none."""
        arc = self.arc[side]
        return [arc.get(pair, -1) for pair in pairwise(way)]

    def _apart(self, side: int, number: int) -> _Tree:
        """A copy of an untouched tree; what is moved of it is taken from the original."""
        flat = self.flat[side]
        first, last = int(flat.edge_start[number]), int(flat.edge_start[number + 1])
        starts = flat.path_start[first : last + 1].tolist()
        way = flat.path[starts[0] : starts[-1]].tolist()
        path = {way[b - starts[0] - 1]: tuple(way[a - starts[0] : b - starts[0]]) for a, b in pairwise(starts)}
        return _Tree(side, int(flat.root[number]), int(self.times[side][number]), path)

    def _crossing(self, tree: _Tree, e: int) -> list[int]:
        return [y for y, way in tree.path.items() if e in self._links(tree.side, way)]

    def _step(self, tree: _Tree, e: int, brought: list[int]) -> int:
        """Move as many of these trees off the link as there is need and room for; the number."""
        if not tree.times:
            return 0
        side, hops = tree.side, dict(tree.order())
        for y in brought:
            part = tree.below(y)
            deep = max(hops[v] for v in part) - hops[y]
            for z in (y, *(v for v in part if tree.path[v][0] == y)):
                gone = Counter(link for v in {y, z} for link in self._links(side, tree.path[v]))
                near = {v: hop for v, hop in hops.items() if hop + 1 + deep + (z != y) <= self.most and v not in part}
                found = self._way_in(side, z, near, gone, e)
                if found is None:
                    continue
                changed = {z: found} if z == y else {z: found, y: tree.path[z][::-1]}
                come = Counter(link for way in changed.values() for link in self._links(side, way))
                more = come - gone
                if -1 in come or e in come:
                    continue
                amount = min([tree.times, self.load[e] - self.limit[e]] + [self._room(a) // n for a, n in more.items()])
                if amount < 1:
                    continue
                for a in {*gone, *come}:
                    self.load[a] += (come[a] - gone[a]) * amount
                tree.times -= amount
                self.changed.append(_Tree(side, tree.root, amount, tree.path | changed))
                return amount
        return 0

    def _room(self, e: int) -> int:
        return self.limit[e] - self.load[e]

    def _way_in(self, side: int, z: int, hops: dict[int, int], free: Counter[int], but: int) -> tuple[int, ...] | None:
        """A path with room to `z` from the rest of its tree: from near the root, then with the most room."""
        member, into = self.member[side], self.into[side]
        best: tuple[tuple[int, int], tuple[int, ...]] | None = None
        seen = {z}
        layer: list[tuple[tuple[int, ...], int]] = [((z,), _ENOUGH)]
        while layer and best is None:
            following: list[tuple[tuple[int, ...], int]] = []
            for way, room in layer:
                for e, u in into[way[0]]:
                    spare = _ENOUGH if e in free else self.limit[e] - self.load[e]
                    if spare < 1 or e == but or u in seen:
                        continue
                    spare = min(room, spare)
                    if u not in member:
                        seen.add(u)
                        following.append(((u, *way), spare))
                    elif u in hops:
                        key = (hops[u], -spare)
                        if best is None or key < best[0]:
                            best = key, (u, *way)
            layer = following
        return None if best is None else best[1]
