"""FSDP2 on two CPU processes: each rank snapshots its own shards, and restores them bit for bit."""

import math

import torch
from execute_ranks import processes
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainkit.autolrs import Forecast, Tuner
from trainkit.autolrs._ranks import from_every_rank, from_rank_zero
from trainkit.autolrs._snapshot import Snapshot


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


def _rank(rank, out):
    # what ranks tell each other crosses unchanged, without pickle
    said = (None, True, 3, 0.1 + 0.2, math.inf, Forecast(1 / 3, math.inf))
    assert tuple(from_rank_zero(value if rank == 0 else "else") for value in said) == said
    told = from_every_rank({"rank": rank, "long": "x" * rank, "state": torch.arange(3, dtype=torch.uint8) + rank})
    assert [t["rank"] for t in told] == [0, 1] and told[1]["long"] == "x"
    assert told[1]["state"].dtype == torch.uint8 and told[1]["state"].tolist() == [1, 2, 3]
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
    torch.save({**result, "shards": shards(model)}, out / f"end{rank}.pt")


def test_two_ranks_restore_their_own_shards_and_tune(tmp_path):
    processes(_rank, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"end{rank}.pt") for rank in range(2))
    for end in (first, second):
        undisturbed, wild = end["ends"]
        assert all(torch.equal(a, b) for a, b in zip(undisturbed, wild, strict=True))
        # parameters and two moments; the last layer has a single row, so the halves are uneven
        assert end["held"] < 0.75 * end["whole"]
        assert all(torch.isfinite(s).all() for s in end["shards"])
    assert first["rates"] == second["rates"] and max(first["rates"]) > 1e-5
    assert first["losses"][-1] < 0.5 * first["losses"][0]
