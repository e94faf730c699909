"""`trainkit probe`: measure the network between the hosts of a job and write it down."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit._files import write_text_atomically
from trainkit.cli._picture import check_picture, save_picture
from trainkit.cli._quantities import bytes_per_second, size_text
from trainkit.cli._subcommand import Subcommand

if TYPE_CHECKING:
    from trainkit.collectives import Topology


@dataclass(frozen=True)
class Options:
    """Options of the probe."""

    out: Path = Path("network.json")
    """file that the network is written to, by rank 0 or the host that leads"""
    rendezvous: str | None = None
    """HOST:PORT of the host that leads; without it, start one process a host with torchrun"""
    hosts: int | None = None
    """number of hosts that take part"""
    rank: int | None = None
    """this host's place in the order of compute nodes; default: as they come"""
    name: str | None = None
    """name of this host; default: its host name"""
    token_file: Path | None = None
    """file with a secret that all hosts share; without it whoever reaches the port may take part"""
    topology: Path | None = None
    """declared topology: YAML tree {core: {rack: [hosts]}}, YAML {labels: {host: [zone, rack]}}, or Slurm's topology.conf"""
    ignore_hops: bool = False
    """do not count the routers between hosts, which can show racks that rates do not"""
    interface: str | None = None
    """network interface to measure; default: the one that the routes between the hosts use"""
    warm: float = 0.15
    """seconds of a load round before it is measured"""
    measure: float = 0.35
    """seconds that are measured"""
    streams: int = 1
    """TCP connections of one flow; several where one cannot fill the link"""
    timeout: float = 30.0
    """longest wait for a host beyond what its work takes, in seconds"""
    join: float = 120.0
    """longest wait for all hosts to come, in seconds"""
    rate: str = "10Gbps"
    """what --dry-run takes for the rate of a host"""
    dry_run: bool = False
    """print the rounds, the bytes and the time, and do nothing"""
    draw: Path | None = None
    """picture of the network: .svg, .png or .pdf"""
    json: bool = False
    """print the network as JSON on standard output"""


def run(options: Options) -> int:
    """Probe, or say what it would take; the network is written by the host that leads."""
    from trainkit.collectives._probe import Plan

    for what in ("warm", "measure", "timeout", "join"):
        if not 0 < getattr(options, what) <= 3600:
            raise ValueError(f"--{what} must be seconds above 0 and up to 3600, got {getattr(options, what)}")
    if options.streams < 1 or options.streams > 64:
        raise ValueError(f"--streams must be from 1 to 64, got {options.streams}")
    hosts = options.hosts if options.hosts is not None else int(os.environ.get("WORLD_SIZE", "0"))
    if hosts < 2:
        raise ValueError(f"a probe needs --hosts of at least 2, or torchrun around it, got {hosts}")
    if options.dry_run:
        _promise(Plan(hosts, options.warm, options.measure), options)
        return 0
    check_picture("--draw", options.draw)
    if options.out.is_dir() or not options.out.resolve().parent.is_dir():
        raise ValueError(f"--out must be a file in a folder that exists, got {options.out}")
    network, leads = _over_address(options, hosts) if options.rendezvous else _over_torchrun(options, hosts)
    if not leads:
        return 0
    write_text_atomically(options.out, json.dumps(network.to_dict(), indent=1) + "\n")
    if options.draw:
        save_picture(network.draw(), options.draw)
    if options.json:
        print(json.dumps(network.to_dict(), indent=1))
    else:
        _show(network, options)
    return 0


def _promise(plan: Any, options: Options) -> None:
    rate = 8 * bytes_per_second(options.rate)
    sent = plan.bytes_per_host(rate)
    facts = {
        "hosts": plan.hosts,
        "ping_rounds": plan.ping_rounds,
        "load_rounds": plan.load_rounds,
        "most_group_rounds": plan.group_rounds,
        "most_seconds": round(plan.seconds, 1),
        "most_bytes_per_host": sent,
    }
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        print(f"{plan.hosts} hosts: {plan}")
        print(f"at {options.rate} a host sends and receives at most {size_text(sent // 2**20 * 2**20)}")


def _over_address(options: Options, hosts: int) -> "tuple[Topology, bool]":
    from trainkit.collectives._address import parse_endpoint
    from trainkit.collectives._probe import probe_hosts, read_prior

    address = parse_endpoint(options.rendezvous or "", "--rendezvous")
    key = options.token_file.read_bytes().strip() if options.token_file else b""
    if options.token_file and len(key) < 16:
        raise ValueError(f"--token-file must hold at least 16 bytes, {options.token_file} holds {len(key)}")
    led = False
    with _bar() as progress:

        def leading(what: str, done: int, total: int) -> None:
            nonlocal led
            led = True
            progress(what, done, total)

        network = probe_hosts(
            address,
            hosts,
            rank=options.rank,
            name=options.name,
            key=key,
            prior=read_prior(options.topology) if options.topology else None,
            warm_s=options.warm,
            measure_s=options.measure,
            streams=options.streams,
            hops=not options.ignore_hops,
            timeout_s=options.timeout,
            join_s=options.join,
            interface=options.interface,
            progress=leading,
        )
    return network, led


def _over_torchrun(options: Options, hosts: int) -> "tuple[Topology, bool]":
    from datetime import timedelta

    if "RANK" not in os.environ:
        raise ValueError(
            "start the probe with torchrun, one process a host, or give --rendezvous HOST:PORT and --hosts N"
        )
    import torch.distributed as dist

    from trainkit.collectives import probe
    from trainkit.collectives._probe import Plan, read_prior

    # ranks that do not measure wait in the group all the time that the others take
    longest = 2 * Plan(hosts, options.warm, options.measure).seconds
    dist.init_process_group("gloo", timeout=timedelta(seconds=max(600.0, options.join, longest)))
    try:
        with _bar() as progress:
            network = probe(
                prior=read_prior(options.topology) if options.topology else None,
                warm_s=options.warm,
                measure_s=options.measure,
                streams=options.streams,
                hops=not options.ignore_hops,
                timeout_s=options.timeout,
                interface=options.interface,
                progress=progress,
            )
        return network, dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, where that is a terminal; only the host that leads moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
                if not console.is_terminal:
                    print(f"{what}: {total} rounds", file=sys.stderr)
            bar.update(tasks[what], completed=done + 1, total=total)

        yield progress


def _show(network: "Topology", options: Options) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("from", "to", "Mbit/s up", "down", "latency", "spread", "limit", title=network.name)
    rate = {(u, v): float(capacity) for u, v, capacity in network.links}
    known = network.confidence.get("links", {})
    for (u, v), up in rate.items():
        said = known.get(f"{u}->{v}")
        if said is not None and (v, u) in rate and v in network.switches and f"{u}->{v}" == _upward(u, v, network):
            delay = f"{1e6 * network.latency.get((u, v), 0.0):.0f} us"
            table.add_row(
                u,
                v,
                f"{up:g}",
                f"{rate[v, u]:g}",
                delay,
                f"{said['spread']:.1%}",
                "yes" if said["limit"] else "not seen",
            )
    console = Console(soft_wrap=True)
    console.print(table)
    if "fit" in network.confidence:
        rounds, fit = network.confidence["rounds"], network.confidence["fit"]
        console.print(f"the tree explains the {rounds} load rounds within {fit:.1%} (median)")
    for warning in network.confidence.get("warnings", ()):
        console.print(f"note: {warning}")
    console.print(f"written: {options.out}" + (f", {options.draw}" if options.draw else ""))


def _upward(u: str, v: str, network: "Topology") -> str:
    """The link of a pair that the probe put first: towards the core."""
    pairs = [f"{a}->{b}" for a, b, _ in network.links]
    return min(f"{u}->{v}", f"{v}->{u}", key=pairs.index)


SUBCOMMAND = Subcommand(
    name="probe",
    summary="Measure the network between the job's hosts: racks, capacities, latencies.",
    options=Options,
    run=run,
    example="torchrun --nnodes 8 --rdzv-backend c10d --rdzv-endpoint host0:29400 --no-python trainkit probe --out network.json",
)
