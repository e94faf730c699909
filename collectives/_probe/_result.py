"""From the tree that was inferred to the Topology that is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from trainkit.collectives._probe._coordinator import RoundTrips
from trainkit.collectives._probe._devices import inside
from trainkit.collectives._probe._infer import Tree
from trainkit.collectives._probe._tree import Floats
from trainkit.collectives._probe._wire import ProbeError
from trainkit.collectives._topology import Topology

_ALIKE = 0.06
"""Rates this close, relative, are taken for one rate."""
_LEVELS = ("rack", "pod", "zone")


@dataclass(frozen=True)
class HostFacts:
    """What is known of a host beside its rates."""

    name: str
    """Its name."""
    address: str = ""
    """Its address in the probe."""
    ranks: int = 1
    """Processes of the job on it."""
    devices: Mapping[str, Any] = field(default_factory=dict)
    """See `read_devices`."""
    loopback: float | None = None
    """bits/s between two of its processes."""


def topology(tree: Tree, trips: RoundTrips, hosts: Sequence[HostFacts], rounds: int) -> Topology:
    """The network as a tree of hosts, rack switches and a core, rates in Mbit/s of TCP goodput.

    Args:
        tree: what was inferred.
        trips: idle round trips, for latencies.
        hosts: in rank order.
        rounds: load rounds behind it, for the record.
    """
    names = _names(tree, [host.name for host in hosts])
    root = _free("core" if len(tree.sets) > tree.hosts else "switch", names)
    links: list[tuple[str, str, Any]] = []
    latency: dict[tuple[str, str], float] = {}
    certain: dict[str, Any] = {}
    up, down = _together(tree.up, tree.down, tree.hosts)
    delay = _delays(tree, trips)
    for vertex, name in enumerate(names):
        parent = tree.parent(vertex)
        above = names[parent] if parent >= 0 else root
        for ends, rate in (((name, above), up[vertex]), ((above, name), down[vertex])):
            links.append((*ends, _written(rate)))
            latency[ends] = round(float(delay[vertex]), 9)
            certain["->".join(ends)] = {
                "spread": round(float(tree.spread[vertex]), 4),
                "limit": bool(tree.limiting[vertex]),
            }
    compute: list[str] = []
    for host in hosts:
        ranks, within = inside(host.name, host.ranks, host.devices, host.loopback)
        compute += ranks
        links += within
    ends_ = [end for link in links for end in link[:2]]
    groups = {names[v]: round(float(tree.contrast[v]), 4) for v in range(tree.hosts, len(names))}
    confidence = {
        "rates": "TCP goodput",
        "rounds": rounds,
        "fit": round(tree.fit, 4),
        "links": certain,
        "contrast": groups,
        "warnings": list(tree.warnings),
    }
    devices = {host.name: {"address": host.address, "ranks": host.ranks} for host in hosts}
    switches = [name for name in dict.fromkeys([*names, root, *ends_]) if name not in set(compute)]
    return Topology(
        f"probed: {len(hosts)} hosts",
        [*compute, *switches],
        compute,
        links,
        unit="Mbit/s",
        latency=latency,
        confidence=confidence,
        devices=devices,
    )


def placed(network: Topology, placements: Sequence[Mapping[str, str]]) -> Topology:
    """The network with its compute nodes in the order of these ranks, where it knows their hosts.

    A plan of ranks, or another launcher, gives a job an order that is not the probe's.

    Args:
        network: with the addresses of its hosts, as the probe writes it.
        placements: "address" and "name" of each rank's host.

    Raises:
        ValueError: a host has another number of ranks than in the network.
    """
    addresses = [str(about.get("address")) if isinstance(about, Mapping) else "" for about in network.devices.values()]
    known = {at: host for at, host in zip(addresses, network.devices, strict=True) if addresses.count(at) == 1}
    hosts = [known.get(at["address"], at["name"]) for at in placements]
    nodes: dict[str, list[str]] = {}
    for node in network.compute_nodes:
        nodes.setdefault(node if node in network.devices else node.rpartition(".")[0], []).append(node)
    if not set(hosts) <= set(nodes):
        return network
    for host, own in nodes.items():
        if hosts.count(host) != len(own):
            raise ValueError(
                f"{network.name}: host {host!r} has {len(own)} ranks there and {hosts.count(host)} in this job: "
                "probe with as many ranks a host as the job has"
            )
    return replace(network, compute_nodes=[nodes[host].pop(0) for host in hosts])


def one_host(name: str, ranks: int, devices: Mapping[str, Any]) -> Topology:
    """The GPUs of a single host, as its driver describes them.

    Raises:
        ProbeError: it has no GPUs: there is no network to measure.
    """
    if not devices.get("topology"):
        raise ProbeError(f"all {ranks} ranks are on host {name!r}, which has no GPUs: there is no network to measure")
    compute, links = inside(name, ranks, devices, None)
    nodes = dict.fromkeys([*compute, *(end for link in links for end in link[:2])])
    confidence = {"rates": "the driver's"}
    return Topology(f"{ranks} GPUs of {name}", list(nodes), compute, links, unit="Mbit/s", confidence=confidence)


def _names(tree: Tree, hosts: Sequence[str]) -> list[str]:
    names = list(hosts)
    counted = [0] * len(_LEVELS)
    level = [0] * len(tree.sets)
    for vertex in range(tree.hosts, len(tree.sets)):
        below = [v for v in range(vertex) if tree.parent(v) == vertex]
        level[vertex] = 1 + max(level[v] for v in below)
        kind = min(level[vertex], len(_LEVELS)) - 1
        names.append(_free(tree.names.get(vertex) or f"{_LEVELS[kind]}{counted[kind]}", names))
        counted[kind] += 1
    return names


def _free(name: str, taken: Sequence[str]) -> str:
    name = name.replace("->", "-")
    while name in taken:
        name += "_"
    return name


def _together(up: Floats, down: Floats, hosts: int) -> tuple[Floats, Floats]:
    """Rates that noise cannot tell apart are made one: hosts among hosts, uplinks among uplinks."""
    both = np.stack([up, down])
    for part in (both[:, :hosts], both[:, hosts:]):
        flat = part.reshape(-1)
        order = np.argsort(flat)
        start = 0
        for at in range(1, len(order) + 1):
            if at == len(order) or flat[order[at]] > flat[order[start]] * (1 + 2 * _ALIKE):
                flat[order[start:at]] = np.median(flat[order[start:at]])
                start = at
        part[:] = flat.reshape(part.shape)
    return both[0], both[1]


def _delays(tree: Tree, trips: RoundTrips) -> Floats:
    """Seconds one way of each vertex' link, that add up to half the shortest round trips as nearly as can be."""
    from scipy.optimize import nnls

    if not trips.least_s:
        return np.zeros(len(tree.sets))
    u, v = np.array(list(trips.least_s)).T
    passed = tree.sets[:, u] != tree.sets[:, v]
    half = np.array(list(trips.least_s.values())) / 2
    scale = float(half.max()) or 1.0
    return np.asarray(nnls(passed.T.astype(np.float64), half / scale)[0]) * scale


def _written(bits: float) -> Fraction:
    """Mbit/s to three digits."""
    return Fraction(f"{max(bits / 1e6, 1e-3):.3g}")
