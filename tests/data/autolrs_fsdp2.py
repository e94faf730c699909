"""One rank of a two-process FSDP2 run on CPU, started by tests/test_autolrs_sharded.py: RANK PORT OUT."""

import os
import sys

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainkit.autolrs import Snapshot, Tuner


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    fully_shard(model[2])
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), 1e-9)


def loss_of(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def batches(rank, count=40):
    for i in range(count):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(100 * i + rank))
        yield x, x.sum(1, keepdim=True)


def shards(model):
    return [p.to_local().detach().clone() for p in model.parameters()]


def stepper(model, optimizer):
    def step(batch):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        return loss

    return step


def main(rank, port, out):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.distributed.init_process_group("gloo")
    ends = []
    for wild in (False, True):
        model, optimizer = build()
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        step, data = stepper(model, optimizer), list(batches(rank))
        snapshot = Snapshot([model], [optimizer])
        for i, batch in enumerate(data[:12]):
            if wild and i in (0, 5):  # without optimizer state, and with
                snapshot.save()
                for factor in (1.0, 1e3):
                    optimizer.param_groups[0]["lr"] = factor
                    step(batch)
                    with torch.no_grad():
                        loss_of(model, batch)  # leaves the root gathered
                    snapshot.restore()
            step(batch)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        ends.append(shards(model))
    held = sum(t.numel() for t in snapshot._store._copies)
    whole = 3 * sum(p.numel() for p in model.parameters())

    model, optimizer = build()
    tuner = Tuner(model, optimizer, stepper(model, optimizer), 100, loss=loss_of, count="all")
    losses = [float(kept.loss) for kept in tuner.run(list(batches(rank)))]
    result = {"ends": ends, "held": held, "whole": whole, "losses": losses, "rates": tuner.schedule.rates}
    torch.save({**result, "shards": shards(model)}, f"{out}/end{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
