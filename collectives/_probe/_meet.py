"""How the hosts of a probe find each other: over a process group, or at an address that all are told."""

import fcntl
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.collectives._probe._agent import Agent
from trainkit.collectives._probe._conductor import NAME, Conductor, Progress
from trainkit.collectives._probe._devices import read_devices
from trainkit.collectives._probe._lead import lead
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
        process_group: of gloo, NCCL or anything with object collectives; None is the default group.
        prior: a declared topology; rank 0's counts. It is believed where the measurement does not contradict it.
        warm_s: seconds that flows run before they are measured.
        measure_s: seconds that are measured.
        streams: TCP connections of one flow; several where one cannot fill the link.
        hops: whether counts of routers between hosts may show racks that rates do not.
        timeout_s: longest wait for a host beyond what its work takes.
        interface: network interface to measure; None: the one that the routes between the hosts use.
        progress: told on rank 0 of every round.

    Returns:
        The network, with capacities in Mbit/s of TCP goodput, latencies and confidence; the same on every rank. Of one
        host alone it is what the driver says of its GPUs.

    Raises:
        ProbeError: a host failed, every rank names the same; or there is one rank, or all are on one host without GPUs.
        ValueError: a rank has no such interface, or there is no group.
    """
    import torch.distributed as dist

    group = process_group if process_group is not None else dist.group.WORLD
    if group is None:
        raise ValueError("probe needs a process group: call torch.distributed.init_process_group first, or pass one")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size < 2:
        raise ProbeError(f"a probe needs at least 2 ranks, got {size}: there is no network to measure")
    everyone = seats(group, interface)
    hosts = list(dict.fromkeys(one["host"] for one in everyone))
    first = [next(r for r in range(size) if everyone[r]["host"] == host) for host in hosts]
    ranks = [[r for r in range(size) if everyone[r]["host"] == host] for host in hosts]
    in_turn = [r for of_host in ranks for r in of_host]
    leads, measures = rank == first[0], rank in first
    offer: list[Any] = [None]
    listener: socket.socket | None = None
    if leads:
        address = _own(interface, toward=everyone[first[-1]]["address"] if len(hosts) > 1 else "127.0.0.1")
        try:
            listener = socket.create_server((address, 0), backlog=1024)
            offer = [(*listener.getsockname()[:2], secrets.token_hex(32))]
        except OSError as error:
            offer = [f"rank 0 cannot listen at {address}, its address toward the other hosts: {error}"]
    dist.broadcast_object_list(offer, dist.get_global_rank(group, 0), group)
    if isinstance(offer[0], str):
        raise ProbeError(offer[0])
    address, port, key = offer[0]
    outcome: list[Any] = [None]
    try:
        if len(hosts) == 1:
            outcome = [one_host(everyone[0]["name"], size, read_devices()).to_dict()] if leads else outcome
        elif measures:
            about = {"name": everyone[rank]["name"], "rank": first.index(rank), "devices": read_devices()}
            run = _Run(Plan(len(hosts), warm_s, measure_s), [len(of_host) for of_host in ranks], prior, progress, hops)
            at = (address, port)
            source = everyone[rank]["address"] if interface else ""
            outcome = [run.both(listener, at, bytes.fromhex(key), about, timeout_s, streams, source).to_dict()]
    except Exception as error:  # every rank still meets in the broadcast below
        outcome = [f"{type(error).__name__}: {error}" if not isinstance(error, ProbeError) else str(error)]
    if listener is not None:
        listener.close()
    dist.broadcast_object_list(outcome, dist.get_global_rank(group, 0), group)
    if isinstance(outcome[0], str):
        raise ProbeError(outcome[0])
    network = dict(outcome[0])
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
            listener = socket.create_server(rendezvous, backlog=1024)
        except OSError as error:
            if rank == 0:
                raise ProbeError(
                    f"rank 0 leads and cannot listen at {rendezvous[0]}:{rendezvous[1]}: {error}"
                ) from None
    about = {"name": name, "rank": rank, "devices": read_devices()}
    run = _Run(Plan(hosts, warm_s, measure_s), [1] * hosts, prior, progress, hops, join_s)
    source = _own(interface) if interface else ""
    return run.both(listener, rendezvous, key, about, timeout_s, streams, source)


def seats(group: "ProcessGroup", interface: str | None) -> list[dict[str, str]]:
    """What every rank says of itself: "host", equal for those that share one, "name" and "address".

    Raises:
        ValueError: a rank has no such interface; on every rank, so that none is left waiting.
    """
    import torch.distributed as dist

    everyone: list[Any] = [None] * dist.get_world_size(group)
    try:
        own = {"host": _identity(), "name": socket.gethostname(), "address": _own(interface)}
    except ValueError as error:
        own = {"refused": f"{socket.gethostname()}: {error}"}
    dist.all_gather_object(everyone, own, group)
    refused = next((one["refused"] for one in everyone if "refused" in one), None)
    if refused is not None:
        raise ValueError(refused)
    return everyone


class _Run:
    """A probe as one process sees it: an agent, and on the leading host the conductor too."""

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
        conductor = Conductor(listener, key, timeout_s, streams)
        own = threading.Thread(target=self._follow, args=(at, key, about, timeout_s, source), daemon=True)
        own.start()
        try:
            network = self._conduct(conductor)
            conductor.finish(network.to_dict())
        except BaseException as error:
            conductor.abort(str(error) or type(error).__name__)
            raise
        finally:
            own.join(2.0)
            conductor.close()
        return network

    def _follow(self, at: tuple[str, int], key: bytes, about: dict[str, Any], timeout_s: float, source: str) -> None:
        with suppress(ProbeError):  # the conductor, in this very process, says it better
            Agent(at, key, about, timeout_s, self._join_s, source).run()

    def _conduct(self, conductor: Conductor) -> Topology:
        conductor.collect(self._plan.hosts, self._join_s)
        hosts = [
            HostFacts(member.name, member.address, ranks, member.devices)
            for member, ranks in zip(conductor.members, self._ranks, strict=True)
        ]
        return lead(conductor, self._plan, hosts, self._prior, self._progress, self._hops)


def _identity() -> str:
    """The same for processes that share a network stack, and for no others."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        boot += os.readlink("/proc/self/ns/net")
    return f"{socket.gethostname()} {boot}"


def _own(interface: str | None, toward: str | None = None) -> str:
    """This host's address: of the interface, or of the route to another host."""
    if interface is not None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            try:
                request = struct.pack("256s", interface.encode()[:15])
                return socket.inet_ntoa(fcntl.ioctl(asker, 0x8915, request)[20:24])  # SIOCGIFADDR
            except OSError as error:
                raise ValueError(f"interface {interface!r} has no IPv4 address here: {error.strerror}") from None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker, suppress(OSError):
        asker.connect((toward or os.environ.get("MASTER_ADDR") or socket.gethostname(), 9))
        return str(asker.getsockname()[0])
    return "127.0.0.1"
