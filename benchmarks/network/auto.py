"""The planner's predictions against what happens, and training with AutoNetworkStrategy's hook, over shaped links (root needed).

Per network every way to all-reduce is predicted from the links' measured goodput, then run in turn in the same
processes. `--train` trains the demo's GPT on E1 with plain DDP and with the planned hook.

`python benchmarks/network/auto.py E1 E2 E3 E7 --mib 4 --runs 3` or `python benchmarks/network/auto.py --train --steps 50`
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

from trainkit._network import NetworkState, auto_network_hook
from trainkit._planner import plan_network
from trainkit.collectives import ForestState, Topology

LIMIT_S = 3000.0
Row = tuple[Any, ...]


def join(rank: int, lab: Lab, port: int) -> int:
    """Become one rank of the lab; the number of ranks."""
    os.nice(-10)  # what else runs here must not decide when a packet is answered
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    torch.set_num_threads(1)
    names = lab.topology.compute_nodes
    where = f"tcp://{lab.address(names[0])}:{port}"
    dist.init_process_group("gloo", where, rank=rank, world_size=len(names))
    return len(names)


def slowest(seconds: float) -> float:
    """The greatest over the ranks."""
    taken = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def compare(rank: int, lab: Lab, measured: Topology, options: Any, pipe: Connection) -> None:
    """One rank: every way in turn; rank 0 sends (MiB, way, predicted, seconds)."""
    join(rank, lab, options.port)
    for mib in options.mib:
        box: list[Any] = [plan_network(measured, [mib << 20]) if rank == 0 else None]
        dist.broadcast_object_list(box)
        message = torch.randn((mib << 20) // 4, generator=torch.Generator().manual_seed(rank))
        methods: dict[str, Callable[[], Any]] = {}
        for way in box[0].ways:
            if way.schedule is not None:
                state = ForestState(schedule=way.schedule, interface=INTERFACE, deadline_s=120.0)
                methods[way.name] = lambda state=state, message=message: state.all_reduce(message).wait()
            else:
                ranks = [measured.compute_nodes.index(name) for name in way.order]
                group = dist.new_group(ranks, sort_ranks=False)
                methods[way.name] = lambda group=group, message=message: dist.all_reduce(message, group=group)
        predicted = {way.name: way.step_s for way in box[0].ways}
        for round_ in range(options.runs + 1):
            for name, method in methods.items():
                dist.barrier()
                start = time.monotonic()
                method()
                taken = slowest(time.monotonic() - start)
                if rank == 0 and round_:  # the first round connects
                    pipe.send((mib, name, predicted[name], taken))
    dist.destroy_process_group()


def train(rank: int, lab: Lab, measured: Topology, options: Any, pipe: Connection) -> None:
    """One rank: the demo's GPT without communication, planned, and with plain DDP; rank 0 sends (arm, step, seconds)."""
    from torch.nn.parallel import DistributedDataParallel

    from trainkit.demo._config import SIZES
    from trainkit.demo._model import GPT
    from trainkit.switchml import noop_hook

    world = join(rank, lab, options.port)
    state = NetworkState(measured, interface=INTERFACE, window=options.steps - 3)
    for arm, steps in (("compute", 5), ("planned", options.steps + 1), ("plain DDP", options.plain)):
        torch.manual_seed(0)
        module = GPT(SIZES["small"], 256, rate=1e-3)
        model = DistributedDataParallel(_Loss(module))
        if arm == "compute":
            model.register_comm_hook(None, noop_hook)
        elif arm == "planned":
            model.register_comm_hook(state, auto_network_hook)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(rank)
        for step in range(steps):
            batch = torch.randint(0, 256, (1, 65), generator=generator)
            dist.barrier()
            start = time.monotonic()
            optimizer.zero_grad()
            model(batch).backward()
            optimizer.step()
            taken = slowest(time.monotonic() - start)
            if rank == 0:
                pipe.send((arm, step, taken))
    if rank == 0:
        assert state.plan is not None
        pipe.send(
            (
                "plan",
                world,
                [(way.name, way.step_s) for way in state.plan.ways],
                state.comparisons[0],
                state.plan.buckets,
            )
        )
    state.close()
    dist.destroy_process_group()


class _Loss(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.module.training_step(batch, 0)
        return loss


def run(lab: Lab, target: Callable[..., None], options: Any) -> list[Row]:
    """What rank 0 sends while all ranks run `target`."""
    measured = lab.measured()
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    processes = []
    for rank, name in enumerate(lab.topology.compute_nodes):
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
    parser.add_argument("--mib", type=int, nargs="+", default=[4])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--train", action="store_true", help="train the demo's small GPT on E1 instead")
    parser.add_argument("--steps", type=int, default=53, help="planned training steps, the first 3 before the plan")
    parser.add_argument("--plain", type=int, default=5, help="training steps with plain DDP")
    parser.add_argument("--port", type=int, default=29431)
    options = parser.parse_args()
    if options.train:
        with Lab(CASES["E1"]()) as lab:
            rows = run(lab, train, options)
        seconds = {arm: [row[2] for row in rows if row[0] == arm] for arm in ("compute", "planned", "plain DDP")}
        after = {"compute": 1, "planned": 4, "plain DDP": 1}
        middle = {arm: statistics.median(taken[after[arm] :]) for arm, taken in seconds.items()}
        _, _, ways, comparison, buckets = rows[-1]
        print(f"\nbuckets {buckets}, {comparison}")
        print("predicted: " + ", ".join(f"{name} {s:.3f}" for name, s in ways))
        for arm, s in middle.items():
            print(f"{arm:12}{s:8.3f} s a step")
        print(f"planned over plain DDP: {middle['plain DDP'] / middle['planned']:.2f} x")
        print(f"communication (step less compute) {middle['planned'] - middle['compute']:.3f} s")
        return
    print("| case | MiB | way | predicted s | median s | measured / predicted |\n|---|---|---|---|---|---|")
    for case in options.cases:
        with Lab(CASES[case]()) as lab:
            rows = run(lab, compare, options)
        for mib in options.mib:
            told = {name: predicted for m, name, predicted, _ in rows if m == mib}
            for name, predicted in told.items():
                middle_s = statistics.median(row[3] for row in rows if row[:2] == (mib, name))
                print(
                    f"| {case} | {mib} | {name} | {predicted:.3f} | {middle_s:.3f} | {middle_s / predicted:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
