"""IP routes over a network: the widest of the shortest paths, ties broken for the ring in rank order."""

from collections.abc import Iterator, Sequence
from itertools import pairwise, product

from trainkit.collectives import Topology

_MOST_COMBINATIONS = 20_000


class Routes:
    """What every node does with a packet for every other: a next hop.

    Among the paths with the fewest hops the one with the greatest least capacity is taken. Where several are equal, the
    flows of the ring in rank order (each compute node to the next) are dealt over them so that the greatest load
    of a link, in flows over capacity, is least; other destinations take the hop that the fewest have taken.
    """

    def __init__(self, topology: Topology) -> None:
        """Choose them.

        Args:
            topology: any; a one-way link carries packets one way.
        """
        self.topology = topology
        self._capacity = {(u, v): float(capacity) for u, v, capacity in topology.links}
        options = {target: self._options(target) for target in topology.nodes}
        ring = list(zip(topology.compute_nodes, (*topology.compute_nodes[1:], topology.compute_nodes[0]), strict=True))
        fixed = {pair[1]: path for pair, path in zip(ring, self._balanced(ring, options), strict=True)}
        taken = dict.fromkeys(self._capacity, 0)
        self._next: dict[str, dict[str, str]] = {}
        for target in topology.nodes:
            hops = dict(pairwise(fixed.get(target, ())))
            for node, choices in options[target].items():
                hop = hops.setdefault(node, min(choices, key=lambda choice: taken[node, choice]))
                taken[node, hop] += 1
            self._next[target] = hops

    def _options(self, target: str) -> dict[str, list[str]]:
        """Node -> next hops of its widest shortest paths to `target`."""
        before: dict[str, list[str]] = {}
        for u, v in self._capacity:
            before.setdefault(v, []).append(u)
        width, choices = {target: float("inf")}, {}
        layer = [target]
        while layer:
            reached: dict[str, list[str]] = {}
            for v in layer:
                for u in before.get(v, ()):
                    if u not in width:
                        reached.setdefault(u, []).append(v)
            for u, hops in reached.items():
                widths = [min(self._capacity[u, v], width[v]) for v in hops]
                choices[u] = [v for v, w in zip(hops, widths, strict=True) if w == max(widths)]
            width |= {u: max(min(self._capacity[u, v], width[v]) for v in hops) for u, hops in reached.items()}
            layer = list(reached)
        return choices

    def _balanced(
        self, ring: Sequence[tuple[str, str]], options: dict[str, dict[str, list[str]]]
    ) -> list[tuple[str, ...]]:
        paths = [list(_paths(source, target, options[target])) for source, target in ring]
        combinations = 1
        for choices in paths:
            combinations *= len(choices)
        if combinations <= _MOST_COMBINATIONS:
            return list(min(product(*paths), key=self._loads))
        chosen = [choices[0] for choices in paths]
        better = True
        while better:
            better = False
            for number, choices in enumerate(paths):
                tries = [[*chosen[:number], path, *chosen[number + 1 :]] for path in choices]
                best = min(tries, key=self._loads)
                if self._loads(best) < self._loads(chosen):
                    chosen, better = best, True
        return chosen

    def _loads(self, paths: Sequence[tuple[str, ...]]) -> list[float]:
        """Flows over capacity of the used links, the greatest first."""
        load: dict[tuple[str, str], float] = {}
        for path in paths:
            for link in pairwise(path):
                load[link] = load.get(link, 0.0) + 1 / self._capacity[link]
        return sorted(load.values(), reverse=True)

    def hops(self, node: str) -> dict[str, str]:
        """Destination -> next hop, at `node`."""
        return {target: hops[node] for target, hops in self._next.items() if node in hops}

    def path(self, source: str, target: str) -> tuple[str, ...]:
        """The nodes that a packet passes, both ends included."""
        path = [source]
        while path[-1] != target:
            path.append(self._next[target][path[-1]])
        return tuple(path)

    def ring_seconds_per_unit(self, order: Sequence[str] | None = None) -> float:
        """Greatest load of a link under the ring through `order`, in flows over capacity; None is rank order.

        A ring all-gather of M bytes moves (N - 1) / N * M over each hop, so it takes that times this number, capacity in
        bytes a second.
        """
        names = self.topology.compute_nodes if order is None else order
        return self._loads([self.path(u, v) for u, v in zip(names, (*names[1:], names[0]), strict=True)])[0]

    def __str__(self) -> str:
        names = self.topology.compute_nodes
        return "\n".join(" > ".join(self.path(u, v)) for u in names for v in names if u != v)


def _paths(source: str, target: str, options: dict[str, list[str]]) -> Iterator[tuple[str, ...]]:
    if source == target:
        yield (target,)
        return
    for hop in options[source]:
        for rest in _paths(hop, target, options):
            yield (source, *rest)
