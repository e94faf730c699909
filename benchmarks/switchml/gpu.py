"""DDP on 2 GPUs through a software switch on loopback: equal to built-in all-reduce, and overlapped with the backward pass.

Prints one JSON line: relative difference of the parameters, whether the ranks are bit-equal, seconds a step of each
hook and setting, seconds of the same bytes from host memory with no GPU in the way, and the share of the copies' time
during which the GPU also computed, from a profiler trace.
"""

import copy
import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from trainkit.switchml import SoftwareSwitch, SwitchMLState, noop_hook, switchml_hook

_STEPS = 20
_SETTINGS: dict[str, dict[str, Any]] = {
    "8 channels, 64 slots": {"channels": 8, "slots": 64},
    "1 lane": {"channels": 1},
    "4 channels": {"channels": 4},
    "4 channels, 64 slots": {"channels": 4, "slots": 64},
    "8 channels": {"channels": 8},
    "12 channels, 64 slots": {"channels": 12, "slots": 64},
    "8 channels, 64 slots, int16": {"channels": 8, "slots": 64, "wire": "int16"},
    "8 channels, 64 slots, int8": {"channels": 8, "slots": 64, "wire": "int8"},
}
"""The first is the one that is compared and traced."""


def _covered(trace: str) -> float:
    """Share of the copies' time in which a kernel runs too."""
    with open(trace) as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    spans = {
        kind: sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == kind)
        for kind in ("gpu_memcpy", "kernel")
    }
    copies = [span for span in spans["gpu_memcpy"] if span[1] - span[0] > 20]
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in copies for b in spans["kernel"])
    return both / sum(end - start for start, end in copies)


def _train(
    model: torch.nn.Module, rank: int, hook: object, state: object, steps: int = _STEPS
) -> tuple[torch.Tensor, float]:
    model = copy.deepcopy(model)
    ddp = DistributedDataParallel(model, device_ids=[rank], bucket_cap_mb=8)
    if hook is not None:
        ddp.register_comm_hook(state, hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.02, momentum=0.9)
    numbers = torch.Generator(device="cuda").manual_seed(rank)
    began = 0.0
    for step in range(steps):
        if step == 2:
            torch.cuda.synchronize()
            began = time.perf_counter()
        inputs = torch.randn(4096, 1024, device="cuda", generator=numbers)
        (ddp(inputs) - inputs).square().sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / (steps - 2)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), seconds


def _from_host(state: SwitchMLState, steps: int = 10) -> float:
    """Seconds for as many bytes as a step's, in buckets of host memory."""
    buckets = [torch.full((2_100_000,), 1.0) for _ in range(6)]
    began = 0.0
    for step in range(steps):
        if step == 2:
            began = time.perf_counter()
        for future in [state.average(bucket, index=number) for number, bucket in enumerate(buckets)]:
            future.wait()
    return (time.perf_counter() - began) / (steps - 2)


def _rank(rank: int, switch: str, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29544")
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2)
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (torch.nn.Linear(1024, 1024), torch.nn.GELU())]
    model = torch.nn.Sequential(*layers).cuda()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    built_in, built_in_s = _train(model, rank, None, None)
    _, noop_s = _train(model, rank, noop_hook, None)
    seconds = {"all-reduce": built_in_s, "no communication": noop_s}
    host, traced = {}, None
    for name, options in _SETTINGS.items():
        state = SwitchMLState(switch, session=name, **options)
        parameters, seconds[name] = _train(model, rank, switchml_hook, state)
        if traced is None:
            traced, ours = state, parameters
        else:
            state.close()
        state = SwitchMLState(switch, session=f"{name}, host", **options)
        host[name] = _from_host(state)
        state.close()
        if rank == 0:
            print(
                f"{name}: {seconds[name]:.4f} s a step, {host[name]:.4f} s from host memory",
                file=sys.stderr,
                flush=True,
            )
    assert traced is not None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        _train(model, rank, switchml_hook, traced, steps=4)
    path = os.path.join(out, f"trace{rank}.json")
    trace.export_chrome_trace(path)
    bits = [torch.empty_like(ours) for _ in range(2)]
    dist.all_gather(bits, ours)
    if rank == 0:
        answer = {
            "trained": float((ours - start).norm() / start.norm()),
            "relative_difference": float((ours - built_in).norm() / built_in.norm()),
            "ranks_bit_equal": bool(torch.equal(bits[0], bits[1])),
            "seconds_a_step": seconds,
            "seconds_from_host": host,
            "copies_beside_kernels": _covered(path),
            "counters": traced.counters(),
            "gpu": torch.cuda.get_device_name(),
        }
        print(json.dumps(answer), flush=True)
    traced.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with SoftwareSwitch(threads=12) as running:
        mp.spawn(_rank, (running.address, sys.argv[1]), nprocs=2)
