"""What the catalogue knows of a family of topologies: how to build a member, and its cost by formula."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from trainkit.collectives.direct._digraph import Digraph


class Facts(NamedTuple):
    """A member's figures without looking at its graph."""

    nodes: int
    """N."""
    degree: int
    """d."""
    t_l: int
    """Steps."""
    t_b: Fraction
    """Bandwidth term in units of M / B."""
    exact: bool = True
    """Whether t_l and t_b are exact; else they are upper bounds."""


@dataclass(frozen=True)
class Family:
    """One family of the catalogue."""

    name: str
    """As it is called in the name of a topology."""
    build: Callable[..., Digraph]
    """Parameters -> the topology."""
    facts: Callable[..., Facts]
    """Parameters -> its figures."""
    settings: Callable[[int, int], Iterable[tuple[int, ...]]]
    """(N, d) -> the parameters of the members of that size."""
    symmetric: bool = True
    """Whether links carry both ways."""


def balanced(nodes: int, degree: int, steps: int) -> Facts:
    """The figures where every step loads all links alike, so that the bandwidth term is the least possible."""
    return Facts(nodes, degree, steps, Fraction(nodes - 1, nodes))
