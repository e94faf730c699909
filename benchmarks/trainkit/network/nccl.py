"""Schedules over NCCL on the GPUs of this host: correct, and how much of NCCL's own send/recv goodput is left.

`python benchmarks/trainkit/network/nccl.py --mb 256`

With `--plan`: what AutoNetworkStrategy finds and chooses on this host instead.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import permutations
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from trainkit.collectives import ForestState, Runner, Topology, allreduce_forest, forest, forest_hook

_START = time.monotonic()


def say(words: str) -> None:
    """From rank 0, at once."""
    if dist.get_rank() == 0:
        print(words, flush=True)


def stage(words: str) -> None:
    """What is being done, with the time: the last of these names what hung."""
    say(f"[{time.monotonic() - _START:5.1f} s] {words}")


def seconds(call: Callable[[], object], repeats: int = 20) -> tuple[float, float]:
    """Mean time on the device after a warm-up, the greatest of all ranks; the same of the host to queue it."""
    for _ in range(3):
        call()
    dist.barrier()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    queued = (time.perf_counter() - begun) / repeats
    torch.cuda.synchronize()
    taken = torch.tensor([start.elapsed_time(end) / 1e3 / repeats, queued], device="cuda")
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken[0]), float(taken[1])


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


def check_ddp(topology: Topology) -> None:
    """The hook's gradients are those of DDP."""
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1000, 1000).cuda())
    plain = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1000, 1000).cuda())
    plain.load_state_dict(ddp.state_dict())
    state = ForestState(topology=topology)
    ddp.register_comm_hook(state, forest_hook)
    inputs = torch.randn(64, 1000, generator=torch.Generator().manual_seed(dist.get_rank())).cuda()
    for model in (ddp, plain):
        model(inputs).square().mean().backward()
    for ours, theirs in zip(ddp.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    state.close()


def worker(rank: int, size: int, port: int, options: argparse.Namespace) -> None:
    """One GPU."""
    torch.cuda.set_device(rank)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group(
        "nccl", rank=rank, world_size=size, device_id=torch.device("cuda", rank), timeout=timedelta(seconds=60)
    )
    nodes = [str(gpu) for gpu in range(size)]
    topology = Topology("clique", nodes, nodes, [(u, v, 1) for u, v in permutations(nodes, 2)])
    shown = {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
    stage(
        f"{torch.cuda.get_device_name()} x {size}, torch {torch.__version__}, NCCL {torch.cuda.nccl.version()} {shown}"
    )
    elements = options.mb * 1_000_000 // 4 // size * size
    value, other = torch.zeros(elements, device="cuda"), torch.zeros(elements, device="cuda")
    nbytes, half = elements * 4, elements // 2
    share = (size - 1) / size
    rates: dict[str, float] = {}
    times: dict[str, float] = {}

    def told(name: str, call: Callable[[], object], moved: float) -> None:
        runs = [seconds(call) for _ in range(3)]
        taken, queued = (median(column) for column in zip(*runs, strict=True))
        rate = moved / taken / 1e9
        reference = rates.setdefault("send and recv", rate)
        times[name] = taken
        ratio = f"{taken / times['NCCL all-reduce']:.3f}" if "NCCL all-reduce" in times else ""
        spread = f"{min(runs)[0] * 1e3:.3f}..{max(runs)[0] * 1e3:.3f}"
        say(
            f"| {name} | {taken * 1e3:.3f} | {spread} | {rate:.1f} | {rate / reference:.3f} | {ratio} | {queued * 1e6:.0f} |"
        )

    def exchange(here: torch.Tensor, there: torch.Tensor) -> None:
        ahead, behind = (rank + 1) % size, (rank - 1) % size
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, here, ahead), dist.P2POp(dist.irecv, there, behind)]
        ):
            work.wait()

    say(
        f"{options.mb} MB\n| what | ms | range | GB/s each way | of send and recv | over NCCL's all-reduce | host us |\n"
        "|---|---|---|---|---|---|---|"
    )
    told("NCCL send and recv, both ways", lambda: exchange(value, other), nbytes)
    told("NCCL all-reduce", lambda: dist.all_reduce(value), 2 * share * nbytes)
    told("half of it: send and recv", lambda: exchange(value[:half], other[half:]), nbytes / 2)
    told("half of it: sum", lambda: other[:half].add_(value[:half]), nbytes / 2)
    told("NCCL all-gather", lambda: dist.all_gather_into_tensor(other, value[: elements // size]), share * nbytes)
    both, gather = allreduce_forest(topology), forest(topology)

    runner = Runner()
    check(runner, topology)
    stage("results right")
    for chunks in options.chunks:
        call = partial(runner.run, both.schedule(chunks), value)
        told(f"our all-reduce, {chunks} chunks", call, 2 * share * nbytes)
    told("our all-gather, 1 chunk", partial(runner.run, gather.schedule(1), value), share * nbytes)
    beside(runner, both.schedule(1), value)
    runner.close()
    check_ddp(topology)
    stage("DDP with the hook equals DDP")
    dist.destroy_process_group()


def beside(runner: Runner, schedule: Any, value: torch.Tensor) -> None:
    """Whether the model's own kernels go on while gradients are on their way."""
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def compute() -> None:
        for _ in range(6):
            torch.mm(matrix, matrix)

    def ours() -> None:
        work = runner.start(schedule, value)
        compute()
        work.wait()

    def theirs() -> None:
        work = dist.all_reduce(value, async_op=True)
        compute()
        assert work is not None
        work.wait()

    alone, with_ours, with_theirs = (seconds(call)[0] * 1e3 for call in (compute, ours, theirs))
    say(f"six products alone {alone:.3f} ms, beside our all-reduce {with_ours:.3f}, beside NCCL's {with_theirs:.3f}")


def planned(rank: int, size: int, port: int, options: argparse.Namespace) -> None:
    """One GPU of a job with AutoNetworkStrategy."""
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import pytorch_lightning as pl
    from lightning_fabric.plugins.environments import LightningEnvironment

    from trainkit import AutoNetworkStrategy

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            width, layers = 2048, max(1, options.mb * 1_000_000 // 4 // 2048**2)
            self.net = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    pl.seed_everything(0, verbose=False)
    strategy = AutoNetworkStrategy(window=20)
    trainer = pl.Trainer(
        accelerator="gpu", devices=size, strategy=strategy, max_steps=70, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, plugins=[LightningEnvironment()],
    )  # fmt: skip
    net = Net()
    trainer.fit(net, torch.utils.data.DataLoader(torch.randn(70 * 8 * size, 2048), batch_size=8))
    state = strategy.network_state
    bits = torch.stack([p.detach().cuda().view(torch.int32).sum() for p in net.parameters()])
    every = [torch.empty_like(bits) for _ in range(size)]
    dist.all_gather(every, bits)
    assert all(torch.equal(one, bits) for one in every), "the ranks' parameters differ"
    if state.plan is None:
        say("NO PLAN: the probe found nothing to plan for")
    else:
        say(f"plan on {state.plan.topology.name}, {len(state.plan.buckets)} buckets, {sum(state.plan.buckets)} bytes:")
        for way in state.plan.algorithms:
            say(f"  {way.name}: {way.step_s * 1e3:.3f} ms{' (chosen)' if way is state.plan.chosen else ''}")
        for comparison in state.comparisons:
            say(str(comparison))
        say(f"the planner {'stays with NCCL' if state.plan.chosen.name == 'ring' else 'LEAVES NCCL'}; all bits equal")
    sys.stdout.flush()
    os._exit(0)  # Lightning keeps the DDP model, and a group must not be destroyed before it


def main() -> None:
    """One process a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds in all; what hangs is killed then")
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = torch.cuda.device_count()
    ranks = torch.multiprocessing.start_processes(
        planned if options.plan else worker, (size, port, options), size, join=False
    )
    until = time.monotonic() + options.deadline
    while not ranks.join(timeout=1):
        if time.monotonic() > until:
            for process in ranks.processes:
                process.kill()
            sys.exit(f"not done after {options.deadline:g} s: killed; the last line above says in what")


if __name__ == "__main__":
    main()
