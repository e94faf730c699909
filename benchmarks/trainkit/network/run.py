"""Schedules executed over shaped links: ours, gloo's ring in two orders, recursive doubling, and the bound (root needed).

Every link's TCP goodput is measured first; the bound is that of the network with these rates. All methods run in turn
in the same processes, on the same buffers. `python benchmarks/trainkit/network/run.py E1 E3 --mib 16 --runs 5`
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise, permutations
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from _cases import CASES
from _lab import INTERFACE, Lab

from trainkit.collectives import Op, Runner, Schedule, Topology, allreduce_forest, forest, optimum
from trainkit.collectives.schedule import compose

BOTH = ("allgather", "allreduce")
LIMIT_S = 3000.0


def bounds(measured: Topology) -> dict[str, float]:
    """Seconds per byte below which no schedule (all-reduce: along trees) gets."""
    size, per_unit = len(measured.compute_nodes), 125_000.0  # Mbit/s to bytes/s
    return {
        "allgather": float(optimum(measured).inv_rate / size) / per_unit,
        "allreduce": float(allreduce_forest(measured).bound) / per_unit,
    }


def best_ring(lab: Lab) -> list[str]:
    """The order of the compute nodes whose ring loads the links least, by trying all."""
    nodes = lab.topology.compute_nodes
    capacity = {(u, v): float(rate) for u, v, rate in lab.topology.links}
    legs = {(u, v): list(pairwise(lab.routes.path(u, v))) for u in nodes for v in nodes if u != v}

    def busiest(order: Sequence[str]) -> float:
        load: dict[tuple[str, str], int] = {}
        for hop in zip(order, (*order[1:], order[0]), strict=True):
            for link in legs[hop]:
                load[link] = load.get(link, 0) + 1
        return max(count / capacity[link] for link, count in load.items())

    return list(min(((nodes[0], *rest) for rest in permutations(nodes[1:])), key=busiest))


def recursive_doubling(topology: Topology, collective: str) -> Schedule | None:
    """Recursive doubling (and, for the all-reduce, halving before it); None unless the ranks are a power of two."""
    names = tuple(topology.compute_nodes)
    size = len(names)
    if size & (size - 1):
        return None

    def half(reducing: bool) -> Schedule:
        ops: list[Op] = []
        strides = [1 << i for i in range(size.bit_length() - 1)]
        for step, stride in enumerate(reversed(strides) if reducing else strides):
            for rank in range(size):
                holder = rank ^ stride if reducing else rank
                first = holder & ~(stride - 1)
                piece = Fraction(first, size), Fraction(first + stride, size)
                kind = "reduce" if reducing else "send"
                path = (names[rank], names[rank ^ stride])
                ops.append(Op(len(ops), kind, rank, rank ^ stride, *piece, path, (), step))  # type: ignore[arg-type]
        shards = [(Fraction(r, size), Fraction(r + 1, size)) for r in range(size)]
        name = "reduce_scatter" if reducing else "allgather"
        return Schedule("recursive doubling", name, names, ops, "steps", shards)  # type: ignore[arg-type]

    return half(False) if collective == "allgather" else compose(half(True), half(False))


def worker(rank: int, lab: Lab, order: list[str], port: int, options: Any, pipe: Connection) -> None:
    """One rank: every method once a round, in turn."""
    os.nice(-10)  # what else runs here must not decide when a packet is answered
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    topology = lab.topology
    size, names = len(topology.compute_nodes), list(topology.compute_nodes)
    dist.init_process_group("gloo", f"tcp://{lab.address(names[0])}:{port}", rank=rank, world_size=size)
    ordered = dist.new_group([names.index(name) for name in order], sort_ranks=False)
    runner = Runner(interface=INTERFACE, timeout_s=120.0)
    plans: dict[str, Callable[[int], Schedule]] = {
        "allgather": forest(topology).schedule,
        "allreduce": allreduce_forest(topology).schedule,
    }
    for mib in options.mib:
        shard = (mib << 20) // 4 // size
        message = torch.empty(shard * size)
        mine = message[rank * shard : (rank + 1) * shard]
        contribution = torch.arange(shard, dtype=torch.float32).add_(rank)
        value = torch.randn(shard * size, generator=torch.Generator().manual_seed(rank))
        for collective in options.collectives:

            def run(
                schedule: Schedule, message: torch.Tensor = message, mine: torch.Tensor = mine, value: torch.Tensor = value,
                contribution: torch.Tensor = contribution, collective: str = collective,
            ) -> Callable[[], None]:  # fmt: skip
                schedule.verify()
                runner.prepare(schedule)

                def once() -> None:
                    runner.run(schedule, message)

                return once

            def gloo(
                group: Any, message: torch.Tensor = message, contribution: torch.Tensor = contribution,
                collective: str = collective,
            ) -> Callable[[], None]:  # fmt: skip
                if collective == "allreduce":
                    return lambda: dist.all_reduce(message, group=group)
                return lambda: dist.all_gather_into_tensor(message, contribution, group=group)

            methods = {"ours": run(plans[collective](options.chunks))}
            if not options.ours:
                methods["gloo, given order"] = gloo(None)
                if order != names:
                    methods["gloo, best order"] = gloo(ordered)
                doubling = recursive_doubling(topology, collective)
                if doubling is not None:
                    methods["recursive doubling"] = run(doubling)
            for round_ in range(options.runs):
                seen = {}
                for name, method in methods.items():
                    if name == "recursive doubling" and round_:
                        continue  # it takes longest by far: once says enough
                    if collective == "allreduce":
                        message.copy_(value)
                    else:
                        message.zero_()
                        mine.copy_(contribution)
                    dist.barrier()
                    start = time.monotonic()
                    method()
                    taken = torch.tensor([time.monotonic() - start], dtype=torch.float64)
                    dist.all_reduce(taken, dist.ReduceOp.MAX)
                    digest = torch.tensor([hash(message.numpy().tobytes())])
                    seen[name] = (float(taken), message.double().sum().item(), digest)
                    lowest, highest = digest.clone(), digest.clone()
                    dist.all_reduce(lowest, dist.ReduceOp.MIN)
                    dist.all_reduce(highest, dist.ReduceOp.MAX)
                    if name != "gloo, best order" and not torch.equal(lowest, highest):
                        raise RuntimeError(f"{name}: the ranks' {collective} results differ")
                if rank == 0:
                    pipe.send((mib, collective, round_, {name: row[:2] for name, row in seen.items()}))
    dist.barrier()
    runner.close()
    dist.destroy_process_group()


def measure(case: str, options: Any) -> dict[str, Any]:
    """All methods on one network; prints as it goes."""
    topology = CASES[case]()
    with Lab(topology) as lab:
        print(f"\n## {case}: {topology.name}\n{lab.routes}", flush=True)
        order = best_ring(lab)
        goodput = lab.goodput()
        rates = [(u, v, f"{goodput.get((u, v), float(rate)):.3f}") for u, v, rate in topology.links]
        measured = Topology("measured", topology.nodes, topology.compute_nodes, rates, unit="Mbit/s")
        parts = sorted(goodput[u, v] / float(rate) for u, v, rate in topology.links if (u, v) in goodput)
        print(f"goodput of the links: {parts[0]:.3f} to {parts[-1]:.3f} of their rates; best order: {' '.join(order)}")
        per_byte = bounds(measured)
        context = multiprocessing.get_context("fork")
        receive, send = context.Pipe(duplex=False)
        processes = []
        for rank, name in enumerate(topology.compute_nodes):
            process = context.Process(target=worker, args=(rank, lab, order, options.port, options, send))
            lab.inside(name, process.start)
            processes.append(process)
        send.close()
        seconds: dict[tuple[int, str, str], list[float]] = {}
        try:
            while receive.poll(LIMIT_S):
                mib, collective, round_, row = receive.recv()
                for method, (taken, _) in row.items():
                    seconds.setdefault((mib, collective, method), []).append(taken)
                told = ", ".join(f"{method} {taken:.2f}" for method, (taken, _) in row.items())
                print(f"{mib} MiB {collective} run {round_ + 1}: {told}", flush=True)
        except EOFError:
            pass
        finally:
            for process in processes:
                process.join(10)
                process.kill()
    rows = []
    for (mib, collective, method), taken in seconds.items():
        size = (mib << 20) // 4 // len(topology.compute_nodes) * len(topology.compute_nodes) * 4
        bound, middle = per_byte[collective] * size, statistics.median(taken)
        ours = statistics.median(seconds[mib, collective, "ours"])
        rows.append([case, mib, collective, method, len(taken), middle, bound, bound / middle, middle / ours])
    print("| case | MiB | collective | method | runs | median s | bound s | bound / median | times ours |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row) + " |", flush=True)
    return {"case": case, "order": order, "rows": rows}


def main() -> None:
    """Measure the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=["E1", "E2", "E3", "E7", "DC"])
    parser.add_argument("--mib", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=64, help="pieces that a tree's share is cut into")
    parser.add_argument("--collectives", nargs="+", default=list(BOTH), choices=BOTH)
    parser.add_argument("--ours", action="store_true", help="only our schedules")
    parser.add_argument("--port", type=int, default=29411)
    parser.add_argument("--json", help="write the rows there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(case, options) for case in options.cases]
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
