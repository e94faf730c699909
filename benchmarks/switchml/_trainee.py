"""One worker of the flooded job: trains under DDP until the file `stop` appears, then the same steps in peace."""

import hashlib
import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainkit.switchml import SwitchMLState, switchml_hook

plan = json.loads(sys.argv[1])
rank, world = int(sys.argv[2]), plan["workers"]
torch.set_num_threads(1)
os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
dist.init_process_group("gloo", init_method="tcp://10.77.0.1:29511", rank=rank, world_size=world)
state = SwitchMLState(plan["switch"], token_file=plan["token_file"], timeout_s=60)
member = state.connect().member


def train(most: int | None) -> tuple[list[str], float, int]:
    """Digest of the parameters after each step, seconds, and bytes of gradients a step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1000, 250)
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(state, switchml_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    numbers = torch.Generator().manual_seed(rank)
    digests: list[str] = []
    began = time.perf_counter()
    while most is None or len(digests) < most:
        inputs = torch.randn(4, 1000, generator=numbers)
        ddp(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        digests.append(hashlib.sha256(model.weight.detach().numpy().tobytes()).hexdigest())
        if most is None:
            ended = torch.tensor([int(os.path.exists(plan["stop"]))])
            dist.broadcast(ended, 0)
            if ended.item():
                break
    seconds = time.perf_counter() - began
    dist.barrier()
    return digests, seconds, 4 * sum(p.numel() for p in model.parameters())


if rank == 0:
    print(json.dumps({"slots": member.slots, "elements": member.elements}), flush=True)
flooded, flooded_s, nbytes = train(None)
during = state.counters()
calm, calm_s, _ = train(len(flooded))
digests: list[list[str]] = [[] for _ in range(world)]
dist.all_gather_object(digests, flooded)
if rank == 0:
    rate = 8e-6 * nbytes * len(calm)
    answer = {
        "steps": len(calm),
        "same_bits_as_in_peace": flooded == calm,
        "same_bits_on_all_ranks": all(other == flooded for other in digests),
        "goodput_mbit": {"flooded": rate / flooded_s, "in peace": rate / calm_s},
        "worker_counters_during": during,
    }
    print(json.dumps(answer), flush=True)
dist.barrier()
state.close()
