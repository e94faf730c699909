"""A small network under DistributedDataParallel, its gradients summed along the trees of a network.

torchrun --nproc-per-node 8 examples/forest_ddp.py --topology examples/forest_two_islands.json
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainkit.collectives import ForestState, Topology, forest_hook

parser = argparse.ArgumentParser()
parser.add_argument("--topology", default="examples/forest_two_islands.json")
parser.add_argument("--steps", type=int, default=100)
arguments = parser.parse_args()

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else torch.device("cpu")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.GELU(), torch.nn.Linear(256, 1)).to(device)
ddp = DistributedDataParallel(model)
state = ForestState(topology=Topology.load(arguments.topology))
ddp.register_comm_hook(state, forest_hook)

optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
numbers = torch.Generator().manual_seed(dist.get_rank())
for step in range(arguments.steps):
    inputs = torch.randn(64, 32, generator=numbers).to(device)
    loss = (ddp(inputs) - inputs.sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0 and dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")
if dist.get_rank() == 0:
    print(state.counters())
state.close()
del ddp  # before the group: see docs/troubleshooting.md
dist.destroy_process_group()
