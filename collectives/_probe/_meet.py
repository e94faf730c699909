"""How the hosts of a probe find each other: over a process group, or at an address that all are told."""

import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from trainkit.collectives._address import (
    default_address,
    endpoint,
    family,
    identity,
    is_loopback,
    own_address,
    reachable_address,
)
from trainkit.collectives._exchange import Exchange, Placement, RankMissing
from trainkit.collectives._probe._agent import Agent
from trainkit.collectives._probe._coordinator import NAME, Coordinator, Progress
from trainkit.collectives._probe._devices import read_devices
from trainkit.collectives._probe._leader import lead
from trainkit.collectives._probe._prior import Prior
from trainkit.collectives._probe._result import HostFacts, one_host
from trainkit.collectives._probe._rounds import Plan
from trainkit.collectives._probe._wire import ProbeError
from trainkit.collectives._topology import Topology

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

WARM_S = 0.15
"""Seconds of a load round before it is measured."""
MEASURE_S = 0.35
"""Seconds that are measured."""
_MEETING_S = 600.0
"""Seconds that a rank may come later than the first."""


def probe(
    process_group: "ProcessGroup | None" = None,
    *,
    prior: Prior | None = None,
    warm_s: float = WARM_S,
    measure_s: float = MEASURE_S,
    streams: int = 1,
    hops: bool = True,
    timeout_s: float = 30.0,
    interface: str | None = None,
    progress: Progress | None = None,
) -> Topology:
    """Measure the network between the hosts of a process group. A collective call: every rank makes it.

    One rank of each host measures, over TCP connections of its own; the others wait. Compute nodes are the group's ranks,
    in their order.

    Args:
        process_group: the ranks; None is the default group.
        prior: a declared topology; rank 0's counts. It is believed where the measurement does not contradict it.
        warm_s: seconds that flows run before they are measured.
        measure_s: seconds that are measured.
        streams: TCP connections of one flow; several where one cannot fill the link.
        hops: whether counts of routers between hosts may show racks that rates do not.
        timeout_s: longest wait for a host beyond what its work takes.
        interface: network interface to measure; None: GLOO_SOCKET_IFNAME's, or the one that the routes between the hosts
            use.
        progress: told on rank 0 of every round.

    Returns:
        The network, with capacities in Mbit/s of TCP goodput, latencies and confidence; the same on every rank. Of one
        host alone it is what the driver says of its GPUs.

    Raises:
        ProbeError: a host failed, every rank names the same; or there is one rank, or all are on one host without GPUs.
        ValueError: a rank has no such interface, or there is no group.
    """
    placement = Placement.of(process_group, "probes")
    rank, size = placement.rank, placement.size
    if size < 2:
        raise ProbeError(f"a probe needs at least 2 ranks, got {size}: there is no network to measure")
    exchange = Exchange(placement.store, rank, size, _MEETING_S)
    everyone = placements(exchange, interface)
    hosts = list(dict.fromkeys(one["host"] for one in everyone))
    ranks = [[r for r in range(size) if everyone[r]["host"] == host] for host in hosts]
    first = [of_host[0] for of_host in ranks]
    own, plan = everyone[rank]["address"], Plan(max(len(hosts), 2), warm_s, measure_s)
    offer: Any = None
    listener: socket.socket | None = None
    if rank == 0 and len(hosts) > 1:
        try:
            listener = socket.create_server((own, 0), family=family(own), backlog=1024)
            offer = {"port": listener.getsockname()[1], "key": secrets.token_hex(32)}
        except OSError as error:
            offer = {"refused": f"rank 0 cannot listen at {own}, its address toward the other hosts: {error}"}
    outcome: Any = None
    try:
        offer = exchange.from_first(offer)
        if len(hosts) == 1:
            outcome = one_host(everyone[0]["name"], size, read_devices()).to_dict() if rank == 0 else None
        elif "refused" in offer:
            raise ProbeError(str(offer["refused"]))
        elif rank in first:
            about = {"name": everyone[rank]["name"], "rank": first.index(rank), "devices": read_devices()}
            run = _Run(plan, [len(of_host) for of_host in ranks], prior, progress, hops)
            at = (str(everyone[0]["address"]), int(offer["port"]))
            outcome = run.both(listener, at, bytes.fromhex(offer["key"]), about, timeout_s, streams, own).to_dict()
    except Exception as error:  # every rank still meets below
        outcome = {"failed": str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}"}
    finally:
        if listener is not None:
            listener.close()
    try:
        network = exchange.from_first(outcome, _MEETING_S + 2 * plan.seconds)
    except RankMissing as error:
        raise ProbeError(str(error)) from error
    if "failed" in network:
        raise ProbeError(str(network["failed"]))
    in_turn = [r for of_host in ranks for r in of_host]
    by_rank = dict(zip(in_turn, network["compute_nodes"], strict=True))
    network["compute_nodes"] = [by_rank[r] for r in range(size)]
    return Topology.from_dict(network)


def probe_hosts(
    rendezvous: tuple[str, int],
    hosts: int,
    *,
    rank: int | None = None,
    name: str | None = None,
    key: bytes = b"",
    prior: Prior | None = None,
    warm_s: float = WARM_S,
    measure_s: float = MEASURE_S,
    streams: int = 1,
    hops: bool = True,
    timeout_s: float = 30.0,
    join_s: float = 120.0,
    interface: str | None = None,
    progress: Progress | None = None,
) -> Topology:
    """Measure the network between hosts that each make this call.

    Args:
        rendezvous: address of the host that leads, and a port that is free there.
        hosts: how many take part.
        rank: place of this host in the order of compute nodes; None: as they come. Rank 0 leads if it is given,
            otherwise the host that has the address.
        name: of this host; None is its host name.
        key: a secret that all share; without one, whoever reaches the port may take part.
        prior: a declared topology, as the leader knows it.
        warm_s: seconds that flows run before they are measured.
        measure_s: seconds that are measured.
        streams: TCP connections of one flow.
        hops: whether counts of routers between hosts may show racks that rates do not.
        timeout_s: longest wait for a host beyond what its work takes.
        join_s: longest wait for all hosts to come.
        interface: network interface to measure.
        progress: told on the leading host of every round.

    Returns:
        The network; the same on every host.

    Raises:
        ProbeError: a host failed, or did not come.
    """
    if hosts < 2:
        raise ValueError(f"a probe needs at least 2 hosts, got {hosts}")
    if rank is not None and not 0 <= rank < hosts:
        raise ValueError(f"rank must be from 0 to {hosts - 1}, got {rank}")
    name = name or socket.gethostname()
    if not NAME.fullmatch(name):
        raise ValueError(f"a host's name is letters, digits and . : - _, at most 200 of them, got {name!r}")
    listener: socket.socket | None = None
    if rank in (None, 0):
        try:
            listener = _listen(rendezvous, interface)
        except OSError as error:
            if rank == 0:
                raise ProbeError(f"rank 0 leads and cannot listen at {endpoint(*rendezvous)}: {error}") from None
    about = {"name": name, "rank": rank, "devices": read_devices()}
    run = _Run(Plan(hosts, warm_s, measure_s), [1] * hosts, prior, progress, hops, join_s)
    source = own_address(interface) if interface else ""
    return run.both(listener, rendezvous, key, about, timeout_s, streams, source)


def placements(exchange: Exchange, interface: str | None) -> list[dict[str, str]]:
    """What every rank says of itself: "host", equal for those that share one, "name" and "address".

    Raises:
        ValueError: a rank has no such interface, or no address for the others; on every rank, so that none is left
            waiting.
        ProbeError: a rank did not come.
    """
    try:
        try:
            own = {"host": identity(), "name": socket.gethostname(), "address": reachable_address(exchange, interface)}
        except ValueError as error:
            own = {"refused": f"{socket.gethostname()}: {error}"}
        everyone = exchange.gather(own)
    except RankMissing as error:
        raise ProbeError(str(error)) from error
    refused = next((one["refused"] for one in everyone if "refused" in one), None)
    if refused is not None:
        raise ValueError(refused)
    return everyone


def _listen(rendezvous: tuple[str, int], interface: str | None) -> socket.socket:
    """At the address that the others are told; where a host's own name is loopback to itself, at its true address."""
    host, port = rendezvous
    address = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    if is_loopback(address) and host != "localhost" and not is_loopback(host):
        address = default_address(interface)
    return socket.create_server((address, port), family=family(address), backlog=1024)


class _Run:
    """A probe as one process sees it: an agent, and on the leading host the coordinator too."""

    def __init__(
        self,
        plan: Plan,
        ranks: Sequence[int],
        prior: Prior | None,
        progress: Progress | None,
        hops: bool,
        join_s: float = 120.0,
    ) -> None:
        self._plan, self._ranks, self._prior, self._hops, self._join_s = plan, ranks, prior, hops, join_s
        self._progress: Callable[[str, int, int], None] = progress or (lambda what, done, total: None)

    def both(
        self,
        listener: socket.socket | None,
        at: tuple[str, int],
        key: bytes,
        about: dict[str, Any],
        timeout_s: float,
        streams: int,
        source: str,
    ) -> Topology:
        if listener is None:
            return Topology.from_dict(Agent(at, key, about, timeout_s, self._join_s, source).run())
        coordinator = Coordinator(listener, key, timeout_s, streams)
        here: tuple[str, int] = listener.getsockname()[:2]
        own = threading.Thread(target=self._follow, args=(here, key, about, timeout_s, source), daemon=True)
        own.start()
        try:
            network = self._coordinate(coordinator)
            coordinator.finish(network.to_dict())
        except BaseException as error:
            coordinator.abort(str(error) or type(error).__name__)
            raise
        finally:
            own.join(2.0)
            coordinator.close()
        return network

    def _follow(self, at: tuple[str, int], key: bytes, about: dict[str, Any], timeout_s: float, source: str) -> None:
        with suppress(ProbeError):  # the coordinator, in this very process, says it better
            Agent(at, key, about, timeout_s, self._join_s, source).run()

    def _coordinate(self, coordinator: Coordinator) -> Topology:
        coordinator.collect(self._plan.hosts, self._join_s)
        hosts = [
            HostFacts(member.name, member.address, ranks, member.devices)
            for member, ranks in zip(coordinator.members, self._ranks, strict=True)
        ]
        return lead(coordinator, self._plan, hosts, self._prior, self._progress, self._hops)
