"""A network as one rank says it to another."""

from fractions import Fraction
from typing import Any

from trainkit.collectives._topology import Topology


def topology_said(topology: Topology) -> dict[str, Any]:
    """All of it as plain JSON values; capacities as exact fractions, which its own file cannot hold."""
    return {
        "name": topology.name,
        "nodes": list(topology.nodes),
        "compute_nodes": list(topology.compute_nodes),
        "links": [[u, v, str(capacity)] for u, v, capacity in topology.links],
        "unit": topology.unit,
        "latency": [[u, v, delay] for (u, v), delay in topology.latency.items()],
        "multicast": sorted(topology.multicast),
        "aggregate": sorted(topology.aggregate),
        "confidence": dict(topology.confidence),
        "devices": dict(topology.devices),
    }


def topology_of(said: Any) -> Topology:
    """What another rank makes of it.

    Raises:
        ValueError: it breaks a rule.
        KeyError, TypeError: it makes no sense.
    """
    return Topology(
        said["name"], said["nodes"], said["compute_nodes"],
        [(u, v, Fraction(capacity)) for u, v, capacity in said["links"]], said["unit"],
        {(u, v): delay for u, v, delay in said["latency"]}, said["multicast"], said["aggregate"],
        said["confidence"], said["devices"],
    )  # fmt: skip
