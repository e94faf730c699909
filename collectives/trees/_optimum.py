"""The cut bound of a network, and what limits it.

ForestColl (arXiv:2402.06787): no all-gather is faster than the worst cut, the set S of vertices for which
`|S & compute| / capacity out of S` is greatest. Found here by a discrete Newton iteration over integer max-flows: each
violated cut raises the bound to its own exact ratio, so there is no bisection, no float and no rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from trainkit.collectives._topology import Topology, names
from trainkit.collectives.schedule._units import bytes_per_second
from trainkit.collectives.trees._capacity import achievable
from trainkit.collectives.trees._certificate import Certificate, proved_rate
from trainkit.collectives.trees._problem import Collective, Progress, problem


@dataclass(frozen=True)
class Optimum:
    """The best rates of a network, exact, in its own unit of capacity."""

    inv_rate: Fraction
    """The cut bound 1/x*: a message M takes at least M / shares * inv_rate."""
    achievable: Fraction
    """The same for the best schedule that needs no switch to copy; equal unless switches are unbalanced."""
    bottleneck: frozenset[str]
    """Vertices S with `weight of S / capacity out of S == inv_rate`: what limits the network is what leaves S
    (for reductions: what enters it)."""
    shares: int
    """Sum of the root weights: the number of compute nodes, or 1 for broadcast and reduce."""
    unit: str | None = None
    """Unit of capacity."""
    exact: bool = True
    """Whether a checked certificate proves `achievable`."""

    def seconds(self, nbytes: int) -> Fraction:
        """Least time for a message of `nbytes`, without latency and without switch multicast.

        Raises:
            ValueError: the network has no unit.
        """
        return Fraction(nbytes) / self.shares * self.achievable / bytes_per_second(self.unit)

    def algorithmic_bandwidth(self) -> Fraction:
        """Message size over time, in units of capacity."""
        return self.shares / self.achievable


def optimum(
    topology: Topology,
    collective: Collective = "allgather",
    *,
    root: str | None = None,
    weights: Mapping[str, int] | None = None,
    group: Sequence[str] | None = None,
    progress: Progress = None,
) -> Optimum:
    """The exact best rate of a collective on a network.

    Args:
        topology: the network.
        collective: "allgather", "reduce_scatter", "broadcast" or "reduce".
        root: compute node that broadcasts or reduces.
        weights: compute node -> size of its shard in whole units; 1 where not named.
        group: the compute nodes that take part; the others pass data on.
        progress: called with (phase, done, total) now and then.

    Raises:
        ValueError: an argument names an unknown node or does not fit the collective.

    Example:
        >>> nodes = ["a", "b", "c"]
        >>> clique = Topology("clique", nodes, nodes, [(u, v, 2) for u in nodes for v in nodes if u != v])
        >>> optimum(clique).inv_rate
        Fraction(1, 2)
    """
    asked = problem(topology, collective, root=root, weights=weights, group=group, progress=progress)
    rate, cut = asked.search()
    scale = topology.scale
    inside = frozenset(names(topology, np.flatnonzero(cut).tolist()))
    reached = rate
    certificate: Certificate = asked.cut(cut)
    if not asked.balanced():
        reached, _, certificate = achievable(asked)
    weight = {name: int(asked.weight[topology.index[name]]) for name in names(topology, asked.members)}
    plain = replace(asked.topology, multicast=frozenset())
    exact = proved_rate(plain, list(weight), weight, certificate) == reached * scale
    return Optimum(rate * scale, reached * scale, inside, int(asked.weight.sum()), topology.unit, exact)
