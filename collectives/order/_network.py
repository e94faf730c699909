"""What a network's description says about pairs of hosts: latency, capacity, racks, the busiest link of a ring."""

import heapq
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from trainkit.collectives._topology import Topology
from trainkit.collectives.order._check import Costs, OrderError
from trainkit.collectives.schedule._units import bytes_per_second
from trainkit.collectives.trees._classic import ring_time


def hosts_of(topology: Topology) -> dict[str, list[str]]:
    """Host -> its compute nodes, in rank order.

    A compute node is a host, except where the topology's devices say {host: {"ranks": r}} with r > 1: then the compute
    nodes "host.0", "host.1", ... are one host, as `trainkit probe` writes them.
    """
    many = {name for name, facts in topology.devices.items() if isinstance(facts, dict) and facts.get("ranks", 1) > 1}
    hosts: dict[str, list[str]] = {}
    for node in topology.compute_nodes:
        ends = (at for at, letter in enumerate(node) if letter == ".")
        hosts.setdefault(next((node[:at] for at in ends if node[:at] in many), node), []).append(node)
    return hosts


def network_costs(topology: Topology, nbytes: int) -> tuple[Costs, Costs]:
    """Seconds that `nbytes` take between any two hosts alone, and the latency on top.

    The path is a shortest one, of these the widest, and goes through other compute nodes only where there is no way
    round them. Two flows over one link are not looked at here: `ring_load` does.

    Args:
        topology: with a unit.
        nbytes: size of the whole message.

    Returns:
        (cost, latency), each `[N, N]` in seconds, in the order of `hosts_of`.

    Raises:
        OrderError: the topology has no unit, or nbytes is below 1.
    """
    if topology.unit is None:
        raise OrderError(f"costs are seconds: {topology.name} needs a unit of capacity, such as Gbit/s")
    if nbytes < 1:
        raise OrderError(f"a message has at least 1 byte, got {nbytes}")
    rate = bytes_per_second(topology.unit)
    near: dict[str, list[tuple[str, float, float]]] = {name: [] for name in topology.nodes}
    for u, v, capacity in topology.links:
        near[u].append((v, float(capacity * rate), topology.latency.get((u, v), 0.0)))
    at = {nodes[0]: number for number, nodes in enumerate(hosts_of(topology).values())}
    compute = set(topology.compute_nodes)
    cost, latency = np.zeros((len(at), len(at))), np.zeros((len(at), len(at)))
    for source, row in at.items():
        # (compute nodes passed, hops, -width, latency): the least is the path
        heap = [(0, 0, -np.inf, 0.0, source)]
        done: set[str] = set()
        while heap:
            passed, hops, width, delay, here = heapq.heappop(heap)
            if here in done:
                continue
            done.add(here)
            if here in at and here != source:
                cost[row, at[here]] = nbytes / -width
                latency[row, at[here]] = delay
            passed += here in compute
            for there, capacity, further in near[here]:
                if there not in done:
                    heapq.heappush(heap, (passed, hops + 1, max(width, -capacity), delay + further, there))
    return cost, latency


def ring_load(topology: Topology, order: Sequence[int]) -> Fraction:
    """Time of a ring all-reduce per unit of message and capacity: that of its busiest link, which hops may share."""
    hosts = list(hosts_of(topology).values())
    return ring_time(topology, "allreduce", [node for host in order for node in hosts[host]])


def racks(topology: Topology) -> dict[str, str]:
    """Host -> the switch that it hangs on, the widest of them; hosts that hang on none are left out."""
    switches = set(topology.switches)
    best: dict[str, tuple[Fraction, str]] = {}
    for u, v, capacity in topology.links:
        if v in switches and (u not in best or capacity > best[u][0]):
            best[u] = (capacity, v)
    return {host: best[host][1] for host in hosts_of(topology) if host in best}


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key under which node9 comes before node10."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts)
