"""DDP that finds out how to carry its gradients; run by `torchrun --nproc-per-node 2 examples/network_auto.py`.

On one host there is no network to measure and the process group's own all-reduce goes on; on several it is probed, every
way to all-reduce is predicted, and the best is taken after two steps.
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainkit import NetworkState, auto_network_hook


def main() -> None:
    """Train a small network for 20 steps."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
    )
    state = NetworkState()  # the one line, with the next
    model.register_comm_hook(state, auto_network_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(dist.get_rank())
    loss = torch.zeros(())
    for _ in range(20):
        batch = torch.randn(32, 64)
        optimizer.zero_grad()
        loss = (model(batch) - batch.mean(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
    if dist.get_rank() == 0:
        print(f"loss {loss.item():.4f}; way: {state.plan.chosen.name if state.plan else 'the process group'}")
    state.close()
    del model  # before the group: gloo's threads and a model that outlives its group can wait for each other
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
