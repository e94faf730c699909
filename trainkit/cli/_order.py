"""`trainkit order`: which host should get which rank, written for the job's launcher."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.cli._quantities import size_text, sizes, time_text
from trainkit.cli._subcommand import Subcommand

if TYPE_CHECKING:
    from trainkit.collectives import Ordering, Topology

_HINTS = {
    "torchrun": "torchrun --rdzv-backend trainkit --rdzv-conf plan={out} ...",
    "node-rank": "torchrun --node-rank \"$(awk -v h=$(hostname) '$1 == h {{print $2}}' {out})\" --master-addr {first} ...",
    "rankfile": "mpirun --rankfile {out} ...",
    "slurm": "SLURM_HOSTFILE={out} srun --distribution=arbitrary ...",
    "kubernetes": "kubectl apply -f {out}",
}


@dataclass(frozen=True)
class Options:
    """Options of the order."""

    source: Path = field(metadata={"positional": True})
    """network.json of `trainkit probe`, or a matrix of costs (.npy, .csv, .json): entry (i, j) is host i to host j"""
    algorithm: str = "ring"
    """ring, halving_doubling, double_binary_tree or bcube"""
    objective: str = "sum"
    """of a ring: sum of the hops, or the dearest one (bottleneck)"""
    bytes: str = "16MiB"
    """message that costs are taken for, where the source is a network"""
    base: int = 2
    """hosts in a group of BCube"""
    hosts: Path | None = None
    """file of host names, one a line, where the source is a bare matrix"""
    seconds: float = 10
    """most time for the search"""
    seed: int = 0
    """seed of the search"""
    least_gain: float = 0.02
    """share of today's cost below which nothing is changed"""
    write: str | None = None
    """torchrun, node-rank, rankfile, slurm or kubernetes: write the order for this launcher"""
    out: Path | None = None
    """file for --write; default: standard output"""
    slots: int = 1
    """processes a host, for rankfile and slurm"""
    json: bool = False
    """print JSON"""


@dataclass(frozen=True)
class _Job:
    """Hosts and what lies between them."""

    hosts: Sequence[str]
    cost: Any
    latency: Any = None
    racks: Mapping[str, str] = field(default_factory=dict)
    addresses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    network: "Topology | None" = None


def run(options: Options) -> int:
    """Search, print, write."""
    from trainkit._files import write_text_atomically
    from trainkit.collectives.order import RankPlan, launcher_text, order_ranks

    message = sizes(options.bytes)
    if len(message) > 1:
        raise ValueError(f"--bytes is one size, got {options.bytes!r}")
    if options.out is not None and options.write is None:
        raise ValueError("--out needs --write, which says for which launcher")
    job = _read(options, message[0])
    algorithm: Any = options.algorithm
    objective: Any = options.objective
    if options.write is not None:
        # refuse a launcher that is unknown before the search, not after
        launcher_text(RankPlan(job.hosts), options.write, options.slots)
    found = order_ranks(
        job.cost,
        algorithm,
        seconds=options.seconds,
        seed=options.seed,
        objective=objective,
        latency=job.latency,
        base=options.base,
        least_gain=options.least_gain,
    )
    facts = _facts(options, job, found, message[0])
    order = range(len(job.hosts)) if facts.get("kept") else found.order
    facts["order"] = [job.hosts[host] for host in order]
    about = {key: facts[key] for key in ("algorithm", "objective", "cost", "given_cost", "lower_bound") if key in facts}
    plan = RankPlan(facts["order"], job.racks, job.addresses, about | {"source": options.source.name})
    text = None if options.write is None else launcher_text(plan, options.write, options.slots)
    if text is not None and options.out is not None:
        write_text_atomically(options.out, text)
        facts["written"] = str(options.out)
    if options.json:
        print(json.dumps(facts, indent=1))
    elif text is not None and options.out is None:
        print(text, end="")
    else:
        _show(options, facts)
    return 0


def _facts(options: Options, job: _Job, found: "Ordering", message: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "hosts": len(job.hosts),
        "algorithm": found.algorithm,
        "objective": found.objective,
        "given_cost": found.given_cost,
        "cost": found.cost,
        "lower_bound": found.lower_bound,
        "gap": found.gap if found.lower_bound > 0 or found.gap == 0 else None,
        "optimal": found.optimal,
        "converged": found.converged,
        "changed": found.changed,
    }
    if job.network is not None and found.algorithm == "ring":
        from trainkit.collectives.order import ring_load
        from trainkit.collectives.schedule._units import bytes_per_second

        unit = message / bytes_per_second(job.network.unit)
        before, after = (ring_load(job.network, order) for order in (range(len(job.hosts)), found.order))
        if after > before:
            # cheaper hop by hop, but hops share a link that they did not share before
            facts |= {"changed": False, "kept": "the busiest link would carry more", "cost": found.given_cost}
            after = before
        facts |= {"bytes": message, "given_seconds": float(before * unit), "seconds": float(after * unit)}
    return facts


def _show(options: Options, facts: dict[str, Any]) -> None:
    what = "" if facts["algorithm"] != "ring" else f", {facts['objective']} of the hops"
    print(f"{facts['algorithm']} over {facts['hosts']} hosts{what}")
    print(f"  today's order       {facts['given_cost']:.6g}")
    gap = (
        "proved optimal"
        if facts["optimal"]
        else f"at most {facts['gap']:.1%} above the optimum"
        if facts["gap"]
        else ""
    )
    print(f"  this order          {facts['cost']:.6g}  {gap}")
    print(f"  no order is below   {facts['lower_bound']:.6g}")
    if "seconds" in facts:
        size = size_text(facts["bytes"])
        times = f"{time_text(facts['given_seconds'])} -> {time_text(facts['seconds'])}"
        print(f"  busiest link        {times} for an all-reduce of {size}, latency apart")
    if not facts["changed"]:
        print(f"  unchanged           {facts.get('kept', f'less than {options.least_gain:.0%} to be won')}")
    if not facts["converged"]:
        print("  the search was cut short: more --seconds may find more")
    print(f"  ranks               {' '.join(facts['order'])}")
    if options.write is not None and "written" in facts:
        use = _HINTS[options.write].format(out=facts["written"], first=facts["order"][0])
        print(f"  written             {facts['written']}\n  use                 {use}")


def _read(options: Options, message: int) -> _Job:
    import numpy as np

    from trainkit.collectives import Topology
    from trainkit.collectives.order import OrderError, hosts_of, network_costs, racks

    path = options.source
    names: Sequence[str] | None = None
    latency = None
    if path.suffix == ".npy":
        cost: Any = np.load(path, allow_pickle=False)
    elif path.suffix == ".csv":
        rows = [line.split(",") for line in path.read_text().splitlines() if line.strip()]
        if rows and len(rows) == len(rows[0]) + 1:
            names, rows = [name.strip() for name in rows[0]], rows[1:]
        cost = rows
    elif path.suffix == ".json":
        try:
            data = json.loads(path.read_text())
        except ValueError as error:
            raise OrderError(f"{path} is not JSON: {error}") from None
        if isinstance(data, dict) and "cost" not in data:
            network = Topology.load(path)
            hosts = hosts_of(network)
            # a hop of a ring carries an N-th of the message
            share = max(1, message // len(hosts)) if options.algorithm == "ring" else message
            costs, delays = network_costs(network, share)
            found = {host: network.devices.get(host) for host in hosts}
            addresses = {
                host: [facts["address"]]
                for host, facts in found.items()
                if isinstance(facts, dict) and isinstance(facts.get("address"), str) and facts["address"]
            }
            return _Job(list(hosts), costs, delays, racks(network), addresses, network)
        if isinstance(data, dict):
            unknown = set(data) - {"hosts", "cost", "latency"}
            if unknown:
                raise OrderError(
                    f"{path} has the unknown key {min(unknown)!r}: a matrix has cost, and may have hosts, latency"
                )
            cost, names, latency = data["cost"], data.get("hosts"), data.get("latency")
        else:
            cost = data
    else:
        raise OrderError(f"{path} must be .json (a network or a matrix), .npy or .csv")
    if options.hosts is not None:
        names = options.hosts.read_text().split()
    size = len(cost) if hasattr(cost, "__len__") else 0
    names = [f"host{at}" for at in range(size)] if names is None else names
    if not isinstance(names, list) or len(names) != size:
        raise OrderError(f"there must be a host name a row: the matrix has {size} rows, got {len(names)} names")
    return _Job([str(name) for name in names], cost, latency)


SUBCOMMAND = Subcommand(
    name="order",
    summary="Give ranks to hosts so that collectives cross the network's thin links least.",
    options=Options,
    run=run,
    example="trainkit order network.json --algorithm ring --write torchrun --out rank_order.json",
)
