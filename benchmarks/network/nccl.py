"""Schedules over NCCL on the GPUs of this host: correct, and how much of NCCL's own send/recv goodput is left.

`python benchmarks/network/nccl.py --mb 256`
"""

import argparse
import os
import socket
from collections.abc import Callable
from itertools import permutations

import torch
import torch.distributed as dist
import torch.multiprocessing

from trainkit.collectives import ForestState, Runner, Topology, allreduce_forest, forest, forest_hook


def seconds(call: Callable[[], object], repeats: int = 30) -> float:
    """Mean time on the device after a warm-up, the greatest of all ranks."""
    for _ in range(5):
        call()
    dist.barrier()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    taken = torch.tensor([start.elapsed_time(end) / 1e3 / repeats], device="cuda")
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def check(runner: Runner, topology: Topology) -> None:
    """Integers exact, floats the same bits on all ranks and in two runs, awkward sizes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    both = allreduce_forest(topology)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        for elements in (0, 1, 3, 1001, (1 << 20) + 1):
            for chunks in (1, 2, 5):
                value = torch.randn(elements, generator=torch.Generator().manual_seed(rank)).mul_(100).to(dtype).cuda()
                schedule = both.schedule(chunks)
                runs = [runner.run(schedule, value.clone()) for _ in range(2)]
                theirs = value.clone()
                dist.all_reduce(theirs)
                assert torch.equal(*runs), "two runs differ"
                if dtype == torch.int64 or size == 2:  # a sum of two has no order
                    assert torch.equal(runs[0], theirs), f"{dtype} {elements} {chunks}: not NCCL's sum"
                else:
                    torch.testing.assert_close(runs[0], theirs)
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1000, 1000).cuda())
    plain = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1000, 1000).cuda())
    plain.load_state_dict(ddp.state_dict())
    state = ForestState(topology=topology)
    ddp.register_comm_hook(state, forest_hook)
    inputs = torch.randn(64, 1000, generator=torch.Generator().manual_seed(rank)).cuda()
    for model in (ddp, plain):
        model(inputs).square().mean().backward()
    for ours, theirs_ in zip(ddp.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs_.grad)
    state.close()


def worker(rank: int, size: int, port: int, mb: int) -> None:
    """One GPU."""
    torch.cuda.set_device(rank)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("nccl", rank=rank, world_size=size, device_id=torch.device("cuda", rank))
    nodes = [str(gpu) for gpu in range(size)]
    topology = Topology("clique", nodes, nodes, [(u, v, 1) for u, v in permutations(nodes, 2)])
    runner = Runner()
    check(runner, topology)
    if rank == 0:
        print(f"{torch.cuda.get_device_name()} x {size}, torch {torch.__version__}: results right", flush=True)
    elements = mb * 1_000_000 // 4 // size * size
    value, other = torch.zeros(elements, device="cuda"), torch.zeros(elements, device="cuda")
    nbytes = elements * 4

    def exchange() -> None:
        ahead, behind = (rank + 1) % size, (rank - 1) % size
        ops = [dist.P2POp(dist.isend, value, ahead), dist.P2POp(dist.irecv, other, behind)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    def told(name: str, call: Callable[[], object], moved: float) -> None:
        taken = seconds(call)
        if rank == 0:
            rate = moved / taken / 1e9
            reference = rates.setdefault("send and recv", rate)
            times[name] = taken
            ratio = f"{taken / times['NCCL all-reduce']:.3f}" if "NCCL all-reduce" in times else ""
            print(f"| {name} | {taken * 1e3:.3f} | {rate:.1f} | {rate / reference:.3f} | {ratio} |", flush=True)

    rates: dict[str, float] = {}
    times: dict[str, float] = {}
    if rank == 0:
        print(
            f"{mb} MB\n| what | ms | GB/s each way | of send and recv | time over NCCL's all-reduce |\n|---|---|---|---|---|"
        )
    share = (size - 1) / size
    told("NCCL send and recv, both ways", exchange, nbytes)
    told("NCCL all-reduce", lambda: dist.all_reduce(value), 2 * share * nbytes)
    both = allreduce_forest(topology)
    for chunks in (1, 2, 3, 4):
        schedule = both.schedule(chunks)
        told(
            f"our all-reduce, {chunks} chunks",
            lambda schedule=schedule: runner.run(schedule, value),
            2 * share * nbytes,
        )
    mine = value[rank * (elements // size) :][: elements // size]
    told("NCCL all-gather", lambda: dist.all_gather_into_tensor(other, mine), share * nbytes)
    for chunks in (1, 2, 4):
        schedule = forest(topology).schedule(chunks)
        told(f"our all-gather, {chunks} chunks", lambda schedule=schedule: runner.run(schedule, value), share * nbytes)
    runner.close()
    dist.destroy_process_group()


def main() -> None:
    """One process a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=256)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = torch.cuda.device_count()
    torch.multiprocessing.spawn(worker, (size, port, options.mb), size)


if __name__ == "__main__":
    main()
