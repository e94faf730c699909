"""The emulated network of benchmarks/network, for tests marked netns."""

import sys
import threading
from collections.abc import Sequence
from typing import Any

from paths import BENCHMARKS

from trainkit.collectives import Topology
from trainkit.collectives._probe import probe_hosts

sys.path.append(str(BENCHMARKS / "trainkit" / "network"))

from _cases import CASES as CASES
from _cases import racks as racks
from _lab import Lab as Lab
from _routes import Routes as Routes


def probed(topology: Topology, order: Sequence[str], **options: Any) -> Topology:
    """What the probe says of an emulated network whose hosts come in this order, as h0, h1, ..."""
    hosts: list[Any] = [None] * len(order)
    with Lab(topology) as lab:

        def host(rank: int) -> None:
            hosts[rank] = probe_hosts((lab.address(order[0]), 29400), len(order), rank=rank, name=f"h{rank}", **options)

        # A thread that was started in a namespace starts its own threads there too.
        threads = [threading.Thread(target=lab.inside, args=(node, host, rank)) for rank, node in enumerate(order)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found: Topology = hosts[0]
    if any(other != found for other in hosts):
        raise RuntimeError("the hosts of a probe have different results")
    return found


def groups(topology: Topology) -> list[list[str]]:
    """Compute nodes by the switch that they hang on."""
    found: dict[str, list[str]] = {}
    for u, v, _ in topology.links:
        if u in topology.compute_nodes:
            found.setdefault(v, []).append(u)
    return sorted(sorted(members) for members in found.values())
