"""The order of a probe: round trips, tournaments under load, tests of the groups found, until they stay as they are."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trainkit.collectives._probe._coordinator import Coordinator, Progress, RoundTrips
from trainkit.collectives._probe._infer import Declared, Partition, Tree, infer
from trainkit.collectives._probe._prior import Prior
from trainkit.collectives._probe._result import HostFacts, topology
from trainkit.collectives._probe._rounds import Pair, Plan, both_ways, inward, outward, tournament
from trainkit.collectives._probe._tree import Flows
from trainkit.collectives._topology import Topology


def lead(
    coordinator: Coordinator,
    plan: Plan,
    hosts: Sequence[HostFacts],
    prior: Prior | None,
    progress: Progress,
    hops: bool,
) -> Topology:
    """Probe the hosts that the coordinator has collected.

    Args:
        coordinator: with its members.
        plan: how long the rounds are.
        hosts: what is known of each beside its rates.
        prior: a declared topology.
        progress: told of every round.
        hops: whether to count routers.

    Raises:
        ProbeError: a host failed.
    """
    rng = random.Random(0)
    count = len(hosts)
    claims = [] if prior is None else prior.levels([host.name for host in hosts])
    trips = RoundTrips()
    rounds = tournament(count, rng)
    for done, pairs in enumerate(rounds):
        progress("round trips", done, len(rounds))
        coordinator.ping(pairs, trips)
    measured: list[Flows] = []

    def load(what: str, waves: Sequence[Sequence[Pair]]) -> None:
        for done, flows in enumerate(waves):
            progress(what, done, len(waves))
            measured.append(coordinator.load(flows, plan.warm_s, plan.measure_s))

    load("all pairs under load", [both_ways(pairs) for _ in range(plan.repeats) for pairs in tournament(count, rng)])
    said = _claimed_by_hops(trips, count) if hops and not claims else None
    claims += [said] if said is not None else []
    tree = infer(measured, count, claims)
    for _ in range(2):
        load("groups under load", _tests(tree, rng))
        before, tree = tree, infer(measured, count, claims)
        if np.array_equal(before.sets, tree.sets):
            break
    hosts = [_with_loopback(coordinator, plan, number, host) for number, host in enumerate(hosts)]
    return topology(tree, trips, hosts, len(measured))


def _tests(tree: Tree, rng: random.Random) -> list[list[Pair]]:
    """Rounds that fill every uplink, alone and twice, and two that use none."""
    tops = [np.flatnonzero(tree.sets[v]).tolist() for v in range(len(tree.sets)) if tree.parent(v) < 0]
    waves: list[list[Pair]] = []
    for group in tree.groups:
        others: Partition = [rest for top in tops if (rest := [host for host in top if host not in group])]
        if others:
            waves += [outward(group, others, rng) for _ in range(2)]
    together = tops if tree.groups else [list(range(tree.hosts))]
    return waves + [inward(together, rng) for _ in range(2)]


def _claimed_by_hops(trips: RoundTrips, hosts: int) -> Declared | None:
    """Racks from counts of routers, if "fewest routers apart" is an equivalence and not all are equal."""
    if len(trips.hops) < hosts * (hosts - 1) // 2 or len(set(trips.hops.values())) < 2:
        return None
    near = np.eye(hosts, dtype=bool)
    for (u, v), count in trips.hops.items():
        near[u, v] = near[v, u] = count == min(trips.hops.values())
    if ((near.astype(int) @ near.astype(int) > 0) != near).any():
        return None
    return Declared([f"\0{int(np.argmax(row))}" for row in near], "the count of routers")


def _with_loopback(coordinator: Coordinator, plan: Plan, number: int, host: HostFacts) -> HostFacts:
    if host.ranks == 1 or host.devices.get("topology"):
        return host
    return replace(host, loopback=float(coordinator.load([(number, number)], plan.warm_s, plan.measure_s).rate[0]))
