"""The planner's predictions against what happens, over shaped links (root needed).

Per network and size every way to all-reduce is predicted from the links' measured goodput, then all are run in turn in
the same processes, `--others` times, and the one that the planner chose `--steps` times. All ranks must end with the same
bits. With `--per-host 2` and more every host has so many ranks, and they probe the network themselves.

`python benchmarks/trainkit/network/auto.py E1 E2 E3 E7 --mib 1 4 16 32 --steps 50 20 8 4 --others 3 2 1 1`
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from _cases import CASES
from _lab import INTERFACE, Lab

from trainkit._planner import plan_network
from trainkit.collectives import ForestState, Topology, probe

LIMIT_S = 3000.0
Row = tuple[Any, ...]


def join(rank: int, lab: Lab, port: int, per_host: int = 1) -> None:
    """Become one rank of the lab."""
    os.nice(-10)  # what else runs here must not decide when a packet is answered
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    torch.set_num_threads(1)
    names = lab.topology.compute_nodes
    where = f"tcp://{lab.address(names[0])}:{port}"
    dist.init_process_group("gloo", where, rank=rank, world_size=len(names) * per_host)


def greatest(value: float) -> float:
    """Over the ranks."""
    every = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(every, dist.ReduceOp.MAX)
    return float(every)


def compare(rank: int, lab: Lab, measured: Topology, options: Any, pipe: Connection) -> None:
    """One rank: every way in turn; rank 0 sends (MiB, way, predicted, seconds)."""
    join(rank, lab, options.port, options.per_host)
    if options.per_host > 1:
        measured = probe(interface=INTERFACE)
    for mib, steps, others in zip(options.mib, options.steps, options.others, strict=True):
        box: list[Any] = [plan_network(measured, [mib << 20]) if rank == 0 else None]
        dist.broadcast_object_list(box)
        value = torch.randn((mib << 20) // 4, generator=torch.Generator().manual_seed(rank))
        message = value.clone()
        methods: dict[str, Callable[[torch.Tensor], Any]] = {}
        states = []
        for way in box[0].algorithms:
            if way.schedule is not None:
                states.append(ForestState(schedule=way.schedule, interface=INTERFACE, timeout_s=120.0))
                methods[way.name] = lambda message, state=states[-1]: state.all_reduce(message).wait()
            else:
                ranks = [measured.compute_nodes.index(name) for name in way.order]
                group = dist.new_group(ranks, sort_ranks=False)
                methods[way.name] = lambda message, group=group: dist.all_reduce(message, group=group)
        chosen = box[0].chosen.name
        for method in methods.values():
            method(message[:1024])  # connects
        for round_ in range(max(steps, others)):
            for way in box[0].algorithms:
                if round_ >= (steps if way.name == chosen else others):
                    continue
                message.copy_(value)
                dist.barrier()
                start = time.monotonic()
                methods[way.name](message)
                taken = greatest(time.monotonic() - start)
                digest = float(hash(message.numpy().tobytes()) % 2**48)
                if greatest(digest) != -greatest(-digest):
                    raise RuntimeError(f"{way.name}: the ranks' results differ")
                if rank == 0:
                    pipe.send((mib, way.name + (" (chosen)" if way.name == chosen else ""), way.step_s, taken))
        for state in states:
            state.close()
    dist.destroy_process_group()


def run(lab: Lab, target: Callable[..., None], options: Any, per_host: int = 1) -> list[Row]:
    """What rank 0 sends while all ranks, `per_host` on each node, run `target`."""
    measured = lab.measured()
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    processes = []
    for rank, name in enumerate(name for name in lab.topology.compute_nodes for _ in range(per_host)):
        process = context.Process(target=target, args=(rank, lab, measured, options, send))
        lab.inside(name, process.start)
        processes.append(process)
    send.close()
    rows: list[Row] = []
    try:
        while receive.poll(LIMIT_S):
            rows.append(receive.recv())
            print("  ", *rows[-1], flush=True)
    except EOFError:
        pass
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    return rows


def main() -> None:
    """Measure the networks asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["E1", "E2", "E3", "E7"])
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[50, 50, 50, 50], help="runs of the chosen way, per size"
    )
    parser.add_argument("--others", type=int, nargs="+", default=[3, 3, 3, 3], help="runs of the other ways, per size")
    parser.add_argument("--per-host", type=int, default=1, help="ranks on each host")
    parser.add_argument("--port", type=int, default=29431)
    options = parser.parse_args()
    print("| case | MiB | way | predicted s | runs | median s | measured / predicted |\n|---|---|---|---|---|---|---|")
    for case in options.cases:
        with Lab(CASES[case]()) as lab:
            rows = run(lab, compare, options, options.per_host)
        for mib in options.mib:
            told = {name: predicted for m, name, predicted, _ in rows if m == mib}
            for name, predicted in told.items():
                seen = [row[3] for row in rows if row[:2] == (mib, name)]
                middle = statistics.median(seen)
                print(
                    f"| {case} | {mib} | {name} | {predicted:.3f} | {len(seen)} | {middle:.3f} | {middle / predicted:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
