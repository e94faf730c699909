"""What a search for topologies found: the Pareto frontier, its distance from the bounds, and the choice for a job."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import log
from typing import TYPE_CHECKING, Any

from trainkit.collectives.direct._bfb import BFB, bfb
from trainkit.collectives.direct._cabling import Cable, cables, cabling_csv
from trainkit.collectives.direct._catalog import build
from trainkit.collectives.direct._draw import draw

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.figure import Figure

    from trainkit.collectives.schedule import Schedule


@dataclass(frozen=True)
class FoundTopology:
    """One topology and what it costs; `t_l` in steps of alpha seconds, `t_b` in units of M / B, for one phase."""

    name: str
    """How to build it: `named_topology(name)`, `trainkit topology show NAME`."""
    bfb: BFB
    """The figures and schedules."""

    @property
    def graph(self) -> "nx.MultiDiGraph[Any]":
        """The topology, hosts called 0 .. N-1."""
        return self.bfb.graph

    @property
    def t_l(self) -> int:
        """Steps of the allgather."""
        return self.bfb.t_l

    @property
    def t_b(self) -> Fraction:
        """Bandwidth term of the allgather."""
        return self.bfb.t_b

    @property
    def t_l_reverse(self) -> int:
        """Steps of the reduce-scatter."""
        return self.bfb.t_l_reverse

    @property
    def t_b_reverse(self) -> Fraction:
        """Bandwidth term of the reduce-scatter."""
        return self.bfb.t_b_reverse

    @property
    def t_b_sum(self) -> Fraction:
        """Bandwidth term of an all-reduce."""
        return self.bfb.t_b + self.bfb.t_b_reverse

    def seconds(self, nbytes: float, alpha: float, bandwidth: float) -> float:
        """Predicted seconds of an all-reduce, see `BFB.seconds`."""
        return self.bfb.seconds(nbytes, alpha, bandwidth)

    def schedule(self, *args: Any, **kwargs: Any) -> "Schedule":
        """See `BFB.schedule`."""
        return self.bfb.schedule(*args, **kwargs)

    def cables(self) -> list[Cable]:
        """Which port of which host goes to which; `cabling_csv` writes it."""
        return cables(self.bfb.digraph)

    def cabling_csv(self, hosts: Sequence[str] | None = None) -> str:
        """The cabling list as CSV, hosts called by number or by `hosts`."""
        return cabling_csv(self.bfb.digraph, hosts)

    def draw(self) -> "Figure":
        """Hosts on a circle, links as chords."""
        return draw(self.bfb.digraph, f"{self.name}\n{self.bfb.nodes} hosts, degree {self.bfb.degree}")


def named_topology(name: str) -> FoundTopology:
    """The topology of a name of the catalogue, such as `torus(4, 8)` or `line(kautz(4, 20))`.

    Raises:
        ValueError: there is no such topology, or some host does not reach another.

    Example:
        >>> named_topology("hypercube(4)").t_b
        Fraction(15, 16)
    """
    # all hosts of a Cayley digraph look alike, by construction
    return FoundTopology(name, bfb(build(name), vertex_transitive=name.startswith("cayley(")))


def least_steps(nodes: int, degree: int, *, directed: bool = True) -> int:
    """The Moore bound: fewer steps cannot reach N hosts over d links each."""
    reached, layer, steps = 1, 1, 0
    while reached < nodes:
        # over two-way links one of a host's links leads back where the shard came from
        layer *= degree if directed or steps == 0 else degree - 1
        reached, steps = reached + max(1, layer), steps + 1
    return steps


def pareto(found: Iterable[FoundTopology], *, both: bool = False) -> list[FoundTopology]:
    """The topologies that no other beats in steps and bandwidth term, by steps.

    Args:
        found: any topologies.
        both: compare the bandwidth terms of both directions together rather than the allgather's.
    """

    def key(one: FoundTopology) -> tuple[int, Fraction, Fraction, bool, int, str]:
        ways = (one.t_b_sum, one.t_b) if both else (one.t_b, one.t_b_sum)
        # of equals the one that people know
        return one.t_l, *ways, one.name.startswith("cayley"), len(one.name), one.name

    kept: list[FoundTopology] = []
    for one in sorted(found, key=key):
        if not kept or key(one)[1] < key(kept[-1])[1]:
            kept.append(one)
    return kept


class Frontier(list[FoundTopology]):
    """The Pareto frontier by (t_l, t_b), fewest steps first."""

    def __init__(self, found: Iterable[FoundTopology], nodes: int, degree: int, *, directed: bool, tried: int) -> None:
        """From anything found; dominated topologies are dropped."""
        found = list(found)
        super().__init__(pareto(found))
        self.nodes = nodes
        self.degree = degree
        self.directed = directed
        self.tried = tried
        """Cayley digraphs tried."""
        self.balanced = pareto(found, both=True)
        """The frontier of all-reduce, by (t_l, t_b + t_b_reverse)."""
        self.least_t_l = least_steps(nodes, degree, directed=directed)
        """No topology of this size has fewer steps (Moore)."""
        self.least_t_b = Fraction(nodes - 1, nodes)
        """No schedule has a smaller bandwidth term: every host must receive all other shards."""

    @property
    def proven(self) -> bool:
        """Whether one topology meets both bounds in both directions, so that there is nothing left to find."""
        return any(one.t_l == self.least_t_l and one.t_b_sum == 2 * self.least_t_b for one in self.balanced)

    def best(self, nbytes: float | Sequence[float], *, alpha: float, bandwidth: float) -> FoundTopology:
        """The topology with the quickest all-reduce.

        Args:
            nbytes: message size in bytes, or several: then the one of the least geometric mean time.
            alpha: seconds a step.
            bandwidth: bytes/s of a host, all ports together.

        Raises:
            ValueError: a figure is not positive.
        """
        sizes = list(nbytes) if isinstance(nbytes, Sequence) else [nbytes]
        if not sizes or min(sizes) <= 0 or alpha < 0 or bandwidth <= 0:
            raise ValueError(
                f"sizes and bandwidth must be positive and alpha not negative, got {sizes}, {bandwidth}, {alpha}"
            )
        return min(self.balanced, key=lambda one: sum(log(one.seconds(size, alpha, bandwidth)) for size in sizes))
