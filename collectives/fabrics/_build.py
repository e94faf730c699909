"""What the builders share."""

from collections.abc import Iterable, Sequence

from trainkit.collectives._topology import Topology

Rate = int | str
Links = list[tuple[str, str, Rate]]


def both(u: str, v: str, rate: Rate) -> Links:
    """A link in each direction."""
    return [(u, v, rate), (v, u, rate)]


def build(name: str, compute: Sequence[str], links: Iterable[tuple[str, str, Rate]], unit: str | None) -> Topology:
    """The network of the links; nodes in the order of their first appearance, compute nodes first."""
    rows = list(links)
    nodes = list(dict.fromkeys([*compute, *(end for u, v, _ in rows for end in (u, v))]))
    return Topology(name, nodes, compute, rows, unit=unit)


def at_least(least: int, **values: int) -> None:
    """Refuse numbers below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
