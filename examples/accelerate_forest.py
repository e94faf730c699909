"""A small network under Accelerate on CPUs, its gradients along the trees of a network.

torchrun --nproc-per-node 8 examples/accelerate_forest.py [--topology examples/forest_two_islands.json]
"""

import argparse

import torch
from accelerate import Accelerator

from trainkit.collectives import ForestState, Topology, forest_hook

parser = argparse.ArgumentParser()
parser.add_argument("--topology", default="examples/forest_two_islands.json")
arguments = parser.parse_args()

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.GELU(), torch.nn.Linear(256, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
data = torch.utils.data.DataLoader(torch.randn(6400, 32), batch_size=16)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
state = ForestState(topology=Topology.load(arguments.topology))
model.register_comm_hook(state, forest_hook)  # prepare() has wrapped the model in DistributedDataParallel

for step, inputs in enumerate(data):
    loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        accelerator.print(f"step {step}: loss {loss.item():.4f}")
accelerator.print(state.counters())
state.close()
del model  # before the group: see docs/troubleshooting.md
accelerator.end_training()  # destroys the group
