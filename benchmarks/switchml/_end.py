"""One worker of the star: alternates gloo's all-reduce and ours on equal buffers and prints its seconds."""

import json
import os
import sys
import time

import torch
import torch.distributed as dist

from trainkit.switchml import SwitchMLState

plan = json.loads(sys.argv[1])
rank, world = int(sys.argv[2]), plan["workers"]
torch.set_num_threads(1)
os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
dist.init_process_group("gloo", init_method=f"tcp://10.77.0.1:{plan['port']}", rank=rank, world_size=world)
state = SwitchMLState(
    plan["switch"],
    rank=rank,
    world_size=world,
    session=plan.get("session", "default"),
    token_file=plan.get("token_file"),
    slots=plan.get("slots"),
    elements=plan.get("elements"),
    profile=plan.get("profile", "full"),
    timeout_s=60,
)
member = state.connect().member
values = torch.randn(plan["bytes"] // 4, generator=torch.Generator().manual_seed(rank))
wanted = values.clone()
dist.all_reduce(wanted)
wanted /= world


def timed(what: str) -> float:
    buffer = values.clone()
    dist.barrier()
    began = time.perf_counter()
    if what == "gloo":
        dist.all_reduce(buffer)
        buffer /= world
    else:
        state.average(buffer, index=0).wait()
    seconds = time.perf_counter() - began
    torch.testing.assert_close(buffer, wanted, rtol=1e-5, atol=1e-6)
    slowest = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


timed("ours")
times: dict[str, list[float]] = {"gloo": [], "ours": []}
for _ in range(plan["pairs"]):
    for what in plan.get("what", ["gloo", "ours"]):
        times[what].append(timed(what))
if rank == 0:
    agreed = {"elements": member.elements, "slots": member.slots}
    print(json.dumps({**times, **agreed, "counters": state.counters()}), flush=True)
dist.barrier()
state.close()
