"""The probe on emulated networks, beside a prober that looks at idle round trips only: `sudo python probe.py [case ...]`.

Every host is a process of its own in a network namespace. The latency prober gets the round trips of the same run, takes the
least of 20 a pair, and is even told how many groups there are. Prints a table: groups exact or not, share of the pairs of
hosts that are rightly placed in one group or apart, errors of the capacities, seconds from the last host's arrival.
"""

import random
import socket
import subprocess
import sys
import time
from itertools import combinations

import numpy as np
from _cases import CASES, racks
from _lab import Lab
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from trainkit.collectives import Topology
from trainkit.collectives._probe._coordinator import Coordinator, RoundTrips
from trainkit.collectives._probe._leader import lead
from trainkit.collectives._probe._meet import MEASURE_S, WARM_S
from trainkit.collectives._probe._result import HostFacts
from trainkit.collectives._probe._rounds import Plan, tournament
from trainkit.collectives.fabrics import star

_PORT = 29400
_NETWORKS = {
    "two racks of four, uplinks a quarter": CASES["racks"],
    "racks of 4, 4, 8, one slow host, 3:1": CASES["16"],
    "one switch of 16": lambda: star(["12"] * 16, unit="Mbit/s"),
    "racks of 4, 4, 4, uplinks as wide as their hosts": lambda: racks((4, 4, 4), 12, (48, 48, 48)),
    "64 hosts, racks of 16, 4:1": lambda: racks((16,) * 4, 8, (32,) * 4),
}


def measure(topology: Topology, order: list[str], hops: bool) -> tuple[Topology, RoundTrips, float]:
    """Probe the network whose hosts have these ranks: the result, the idle round trips, the seconds that it took."""
    with Lab(topology) as lab:
        address = lab.address(order[0])
        listener = lab.inside(order[0], lambda: socket.create_server((address, _PORT), backlog=1024))
        words = [sys.executable, "-m", "trainkit", "probe", "--hosts", str(len(order)), "--join", "600"]
        words += ["--rendezvous", f"{address}:{_PORT}", "--name"]
        hosts = []
        for rank, node in enumerate(order):
            chosen = ["--rank", str(rank)] if rank else []  # rank 0 would lead: here this process does
            hosts.append(lab.popen(node, [*words, node, *chosen], stdout=subprocess.DEVNULL))
        coordinator = Coordinator(listener, b"", 60.0)
        try:
            coordinator.collect(len(order), 600.0)
            trips = RoundTrips()
            for pairs in tournament(len(order), random.Random(0)):
                coordinator.ping(pairs, trips)
            begin = time.monotonic()
            facts = [HostFacts(member.name) for member in coordinator.members]
            plan = Plan(len(order), WARM_S, MEASURE_S)
            network = lead(coordinator, plan, facts, None, lambda what, done, total: None, hops)
            seconds = time.monotonic() - begin
            coordinator.finish(network.to_dict())
            for host in hosts:
                host.wait(60)
        finally:
            coordinator.close()
    return network, trips, seconds


def by_latency(trips: RoundTrips, order: list[str], count: int) -> dict[str, str]:
    """Host -> group of the prober that clusters idle round trips, told the number of groups."""
    far = np.zeros((len(order), len(order)))
    for (u, v), seconds in trips.least_s.items():
        far[u, v] = far[v, u] = seconds
    label = fcluster(linkage(squareform(far), "average"), count, "maxclust")
    return dict(zip(order, map(str, label), strict=True))


def homes(topology: Topology) -> dict[str, str]:
    """Host -> the switch that it hangs on."""
    return {u: v for u, v, _ in topology.links if u in topology.compute_nodes}


def agreement(one: dict[str, str], other: dict[str, str]) -> float:
    """Share of the pairs of hosts that both put together or both apart."""
    pairs = list(combinations(one, 2))
    return sum((one[u] == one[v]) == (other[u] == other[v]) for u, v in pairs) / len(pairs)


def errors(network: Topology, topology: Topology) -> tuple[float, float]:
    """Greatest relative error of a host's and of an uplink's capacity, either direction, against the shaped rates."""
    true, found = ({(u, v): float(rate) for u, v, rate in one.links} for one in (topology, network))
    home, here = homes(topology), homes(network)
    hosts = [
        abs(found[link] / rate - 1)
        for host in home
        for link, rate in (
            ((host, here[host]), true[host, home[host]]),
            ((here[host], host), true[home[host], host]),
        )
    ]
    pairs = {(here[host], home[host]) for host in home}
    uplinks = [
        abs(found[ends] / true[real] - 1)
        for mine, rack in pairs
        for ends, real in (((mine, "core"), (rack, "core")), (("core", mine), ("core", rack)))
        if ends in found and real in true
    ]
    return max(hosts), max(uplinks, default=0.0)


def main() -> None:
    """Print the table."""
    chosen = sys.argv[1:] or list(_NETWORKS)
    print("| network | labelling | hops counted | groups | pairs right | latency prober: pairs right |", end="")
    print(" worst host | worst uplink | explained within | rounds | seconds |")
    print("|---" * 11 + "|")
    for name in (name for name in _NETWORKS if any(word in name for word in chosen)):
        topology = _NETWORKS[name]()
        true = homes(topology)
        many = len(true) >= 64
        for seed in range(1 if many else 3):
            for hops in (False, True) if seed == 0 and not many else (False,):
                order = random.Random(seed).sample(topology.compute_nodes, len(topology.compute_nodes))
                network, trips, seconds = measure(topology, order, hops)
                right = agreement(homes(network), true)
                groups = len(set(homes(network).values()))
                said = "exact" if right == 1 else f"{groups} of {len(set(true.values()))}"
                peer = agreement(by_latency(trips, order, len(set(true.values()))), true)
                host, uplink = errors(network, topology) if right == 1 else (float("nan"), float("nan"))
                known = network.confidence
                print(
                    f"| {name} | {seed} | {'yes' if hops else 'no'} | {said} | {right:.1%} | {peer:.1%} "
                    f"| {host:.1%} | {uplink:.1%} | {known['fit']:.1%} | {known['rounds']} | {seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
