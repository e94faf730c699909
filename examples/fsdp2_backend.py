"""A small network sharded by FSDP2, its all-gathers and reduce-scatters along the trees of a network.

torchrun --nproc-per-node 8 examples/fsdp2_backend.py [--topology examples/forest_two_islands.json]
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from trainkit.collectives import Topology, register_backend

parser = argparse.ArgumentParser()
parser.add_argument("--topology", default="examples/forest_two_islands.json")
parser.add_argument("--steps", type=int, default=100)
arguments = parser.parse_args()

register_backend(Topology.load(arguments.topology))  # the one line, with the next
dist.init_process_group("trainkit")
cuda = torch.cuda.is_available()
if cuda:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
device = "cuda" if cuda else "cpu"

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.GELU(), torch.nn.Linear(256, 1)).to(device)
for layer in (model[0], model[2], model):
    fully_shard(layer)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
numbers = torch.Generator().manual_seed(dist.get_rank())
for step in range(arguments.steps):
    inputs = torch.randn(64, 32, generator=numbers).to(device)
    loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0 and dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")
dist.destroy_process_group()
