"""The planner: what each all-reduce algorithm would cost on a measured network, and which to take.

A prediction is the sum over the model's gradient buckets of the time of one all-reduce: the busiest link's load over
its capacity, plus what starting, passing on and ending the messages costs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from trainkit.collectives import Forest, Schedule, Topology, allreduce_forest, forest, order_ranks
from trainkit.collectives._said import topology_of, topology_said
from trainkit.collectives.schedule import bytes_per_second, compose, from_dict, link_loads, to_dict
from trainkit.collectives.trees import busiest_link, double_binary_tree_schedule, route

if TYPE_CHECKING:
    from rich.table import Table

OVERHEAD_S = 1e-4
"""What a message between two processes costs beside its bytes and the links' latencies."""
NCCL_OVERHEAD_S = 1e-5
"""The same between two steps of NCCL's own kernels."""
NCCL_CALL_S = 1e-4
"""What carrying a bucket over NCCL costs in a hook beside its bytes: dividing it, queueing it, starting it."""
NCCL_GROUP_S = 1.5e-4
"""What a wave of a schedule over NCCL costs to queue and start: one group of messages (measured on two H200)."""
MARGIN = 1.05
"""A schedule of ours has to be this much faster than the process group's own ring."""
_CHUNKS = {"gloo": (4, 16, 64), "nccl": (1, 2, 4)}
_MOST_OPS = 40_000
_LEAST_PIECE = 8192
_SWITCHML_BYTES = 4
"""Bytes that a gradient is on its way to the switch and back, of whatever type it is itself: int32. The headers around a
full packet take what TCP's do, and the links' capacities are what TCP gets."""


@dataclass(frozen=True)
class Algorithm:
    """One algorithm that all-reduces the gradients."""

    name: str
    """"ring", "reordered ring", "tree", "forest", "native" or "switchml"."""
    seconds: tuple[float, ...]
    """Predicted for each bucket."""
    busiest: tuple[str, str]
    """The link that limits it."""
    order: tuple[str, ...] | None = None
    """Compute nodes round the ring, where that is not the network's own order."""
    schedule: Schedule | None = None
    """What the executor runs; None where the process group or a switch does it."""

    @property
    def step_s(self) -> float:
        """Predicted seconds of communication in a step."""
        return sum(self.seconds)


@dataclass(frozen=True)
class NetworkPlan:
    """Every algorithm that was considered, fastest first, and the one to take."""

    topology: Topology
    """The network planned for."""
    buckets: tuple[int, ...]
    """Bytes of each gradient bucket of a step."""
    bound_s: float
    """No all-reduce along trees is faster, latency apart."""
    algorithms: tuple[Algorithm, ...]
    """Fastest first."""
    chosen: Algorithm
    """The fastest, or the ring where nothing beats it by more than 5 %."""

    def table(self) -> "Table":
        """The comparison for people."""
        from rich.table import Table

        size = sum(self.buckets) / 2**20
        table = Table(title=f"{self.topology.name}: all-reduce of {size:.4g} MiB in {len(self.buckets)} buckets")
        for heading in ("algorithm", "s a step", "against ring", "over bound", "limited by"):
            table.add_column(heading, justify="left" if heading in ("algorithm", "limited by") else "right")
        ring = next(algorithm for algorithm in self.algorithms if algorithm.name == "ring")
        for algorithm in self.algorithms:
            table.add_row(
                f"[bold]{algorithm.name} (chosen)[/bold]" if algorithm is self.chosen else algorithm.name,
                f"{algorithm.step_s:.4g}",
                f"{ring.step_s / algorithm.step_s:.2f} x",
                f"{algorithm.step_s / self.bound_s:.2f}",
                " -> ".join(algorithm.busiest),
            )
        return table

    def as_dict(self) -> dict[str, Any]:
        """The comparison for machines."""
        algorithms = {
            algorithm.name: {
                "step_s": algorithm.step_s,
                "bucket_s": algorithm.seconds,
                "busiest": algorithm.busiest,
                "order": algorithm.order,
            }
            for algorithm in self.algorithms
        }
        return {
            "network": self.topology.name,
            "buckets": self.buckets,
            "bound_s": self.bound_s,
            "algorithms": algorithms,
            "chosen": self.chosen.name,
        }


def plan_said(plan: NetworkPlan) -> dict[str, Any]:
    """A plan as plain JSON values, for other ranks; of the schedules only the chosen one, the others can be megabytes."""
    rows = [
        [one.name, one.seconds, one.busiest, one.order, to_dict(one.schedule) if one.schedule and chosen else None]
        for one, chosen in ((one, one is plan.chosen) for one in plan.algorithms)
    ]
    chosen = next(at for at, one in enumerate(plan.algorithms) if one is plan.chosen)
    return {
        "topology": topology_said(plan.topology), "buckets": plan.buckets, "bound_s": plan.bound_s, "algorithms": rows,
        "chosen": chosen,
    }  # fmt: skip


def plan_of(said: Any) -> NetworkPlan:
    """The plan behind `plan_said`; its schedule is verified.

    Raises:
        ValueError: it makes no sense.
    """
    try:
        algorithms = tuple(
            Algorithm(
                str(name), tuple(map(float, seconds)), (str(busiest[0]), str(busiest[1])),
                None if order is None else tuple(map(str, order)), None if schedule is None else from_dict(schedule),
            )
            for name, seconds, busiest, order, schedule in said["algorithms"]
        )  # fmt: skip
        chosen = algorithms[int(said["chosen"])]
        if chosen.schedule is not None:
            chosen.schedule.verify()
        buckets = tuple(map(int, said["buckets"]))
        return NetworkPlan(topology_of(said["topology"]), buckets, float(said["bound_s"]), algorithms, chosen)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"rank 0's network plan makes no sense: {type(error).__name__}: {error}") from None


def plan_network(
    topology: Topology,
    buckets: Sequence[int],
    *,
    itemsizes: int | Sequence[int] = 4,
    switch: str | None = None,
    backend: Literal["gloo", "nccl"] = "gloo",
    overhead_s: float | None = None,
    order_seconds: float = 1.0,
) -> NetworkPlan:
    """Predict every algorithm's all-reduce of `buckets` on `topology`, and choose.

    Args:
        topology: the network, with a unit; its compute nodes in the order of the ranks.
        buckets: bytes of each gradient bucket of one training step.
        itemsizes: bytes of one gradient, in all buckets or in each: a switch is sent int32 for every one.
        switch: the node at which a SwitchML switch runs; None: there is none.
        backend: whose ring it is: gloo's all-reduce sends from rank r to r - 1, NCCL's to r + 1.
        overhead_s: seconds that a message between two processes costs beside its bytes and the links' latencies; None:
            0.1 ms with gloo, 10 us with NCCL.
        order_seconds: how long the search for a better rank order may take.

    Raises:
        ValueError: no buckets, one below a byte, sizes of gradients that do not fit them, a network without a unit, an
            unknown switch.
    """
    if not buckets or min(buckets) < 1:
        raise ValueError(f"buckets are the bytes of each gradient bucket, at least one of 1 or more, got {buckets!r}")
    widths = [itemsizes] * len(buckets) if isinstance(itemsizes, int) else list(itemsizes)
    if len(widths) != len(buckets) or min(widths) < 1:
        raise ValueError(
            f"itemsizes are the bytes of a gradient, 1 or more, one number or one for each of {len(buckets)} buckets, "
            f"got {itemsizes!r}"
        )
    if switch is not None and switch not in topology.nodes:
        raise ValueError(
            f"switch is a node of {topology.name}, got {switch!r}: name one of {', '.join(topology.nodes)}"
        )
    if overhead_s is None:
        overhead_s = OVERHEAD_S if backend == "gloo" else NCCL_OVERHEAD_S
    network = _with_overhead(topology, overhead_s)
    native = allreduce_forest(network)
    down, up = _fewest_trees(network, "allgather"), _fewest_trees(network, "reduce_scatter")
    flow = -1 if backend == "gloo" else 1
    algorithms = [
        _ring("ring", network, topology.compute_nodes, flow, buckets),
        *_reordered(network, flow, buckets, order_seconds),
        _scheduled("tree", lambda chunks: double_binary_tree_schedule(network, chunks), buckets, backend),
        _scheduled("forest", lambda chunks: compose(up.schedule(chunks), down.schedule(chunks)), buckets, backend),
        _scheduled("native", native.schedule, buckets, backend),
        *([_through_switch(network, switch, buckets, widths)] if switch is not None else []),
    ]
    if backend == "nccl":
        algorithms = [
            replace(algorithm, seconds=tuple(taken + NCCL_CALL_S for taken in algorithm.seconds))
            for algorithm in algorithms
        ]
    ring = algorithms[0]
    algorithms.sort(key=lambda algorithm: algorithm.step_s)
    chosen = algorithms[0] if ring.step_s >= MARGIN * algorithms[0].step_s else ring
    return NetworkPlan(topology, tuple(buckets), float(native.seconds(sum(buckets))), tuple(algorithms), chosen)


def _with_overhead(topology: Topology, overhead_s: float) -> Topology:
    """The overhead of a message as latency of the link that it arrives by."""
    compute = set(topology.compute_nodes)
    latency = {(u, v): topology.latency.get((u, v), 0.0) + overhead_s * (v in compute) for u, v, _ in topology.links}
    return replace(topology, latency=latency)


def _ring(name: str, network: Topology, order: Sequence[str], flow: int, buckets: Sequence[int]) -> Algorithm:
    size = len(order)
    legs = list(zip(order, [*order[flow:], *order[:flow]], strict=True))
    busiest, time = busiest_link(network, ((u, v, Fraction(2 * (size - 1), size)) for u, v in legs))
    paths = [route(network, u, v) for u, v in legs]
    slowest = max(sum(network.latency[link] for link in pairwise(path)) for path in paths)
    rate = float(bytes_per_second(network.unit) / time)
    seconds = tuple(nbytes / rate + 2 * (size - 1) * slowest for nbytes in buckets)
    return Algorithm(name, seconds, busiest, order=tuple(order))


def _reordered(network: Topology, flow: int, buckets: Sequence[int], order_seconds: float) -> list[Algorithm]:
    """The ring in the best order found; none where the given order is as good."""
    # What a hop takes from all links on its way together: hops that share a thin link are then avoided like slow ones.
    tail, head, capacity = network.arcs
    size = len(network.nodes)
    cost = dijkstra(csr_array((1.0 / capacity, (tail, head)), shape=(size, size)), indices=network.compute)
    cost = cost[:, network.compute]
    found = order_ranks(cost if flow > 0 else cost.T, "ring", seconds=order_seconds)
    order = [network.compute_nodes[number] for number in found.order]
    return [] if order == list(network.compute_nodes) else [_ring("reordered ring", network, order, flow, buckets)]


def _fewest_trees(network: Topology, collective: Literal["reduce_scatter", "allgather"]) -> Forest:
    """The best forest with few trees: measured capacities have no small common unit, the optimum may need thousands."""
    return min((forest(network, collective, trees_per_root=k) for k in (1, 2, 3, 4)), key=lambda made: made.inv_rate)


def _scheduled(
    name: str, make: Callable[[int], Schedule], buckets: Sequence[int], backend: Literal["gloo", "nccl"]
) -> Algorithm:
    """A schedule cut into as many pieces as are good for the largest bucket."""
    largest = max(buckets)
    first, *finer_chunks = _CHUNKS[backend]
    best, before = make(first), first
    best_s = _seconds(best, largest, backend)
    for chunks in finer_chunks:
        piece = max(op.stop - op.start for op in best.ops) * largest
        if len(best.ops) * chunks > _MOST_OPS * before or piece * before < _LEAST_PIECE * chunks:
            break
        finer = make(chunks)
        if (finer_s := _seconds(finer, largest, backend)) >= best_s:
            break
        best, best_s, before = finer, finer_s, chunks
    times = {largest: best_s} | {nbytes: _seconds(best, nbytes, backend) for nbytes in set(buckets) - {largest}}
    loads = link_loads(best)
    busiest = max(loads, key=lambda link: loads[link] / Fraction(best.links[link]))
    return Algorithm(name, tuple(times[nbytes] for nbytes in buckets), busiest, schedule=best)


def _seconds(schedule: Schedule, nbytes: int, backend: Literal["gloo", "nccl"]) -> float:
    from trainkit.collectives.execute import UNSENT, waves_of

    if backend == "gloo":
        return float(schedule.time(nbytes, held=UNSENT))
    return float(schedule.time(nbytes)) + NCCL_GROUP_S * len(set(waves_of(schedule)))


def _through_switch(network: Topology, switch: str, buckets: Sequence[int], widths: Sequence[int]) -> Algorithm:
    """Everybody sends its gradients to the switch and gets the sum back; both directions at once."""
    workers = [name for name in network.compute_nodes if name != switch]
    hops = [hop for name in workers for hop in ((name, switch, Fraction(1)), (switch, name, Fraction(1)))]
    busiest, time = busiest_link(network, hops)
    trips = [sum(network.latency[link] for link in pairwise(route(network, u, v))) for u, v, _ in hops]
    rate = float(bytes_per_second(network.unit) / time)
    sent = [nbytes / width * _SWITCHML_BYTES for nbytes, width in zip(buckets, widths, strict=True)]
    return Algorithm("switchml", tuple(nbytes / rate + 2 * max(trips) for nbytes in sent), busiest)
