"""Snapshots: after wild trials the run goes on as if nothing had happened, bit for bit and at the same addresses."""

import copy
import random

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

from trainkit.autolrs import LRSchedule
from trainkit.autolrs._average import WeightAverage
from trainkit.autolrs._schedule import Piece, group_ratios, set_rate
from trainkit.autolrs._snapshot import Snapshot

torch.set_num_threads(1)  # tiny tensors: a second thread only waits for the first


class Net(nn.Module):
    """Batch normalisation, dropout, a buffer in no state dict, a metric, extra state."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.metric = torchmetrics.MeanMetric()
        self.extra = [0]

    def get_extra_state(self):
        return list(self.extra)

    def set_extra_state(self, state):
        self.extra = list(state)

    def forward(self, x):
        self.count = self.count + 1  # reassigned, not written in place
        self.extra[0] += 1
        return self.body(x)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "adamw tensor rate": lambda p: torch.optim.AdamW(p, torch.tensor(0.01)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


def build(kind):
    torch.manual_seed(0)
    net = Net()
    optimizer = OPTIMIZERS[kind](net.parameters())
    average = torch.optim.swa_utils.AveragedModel(net)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9)
    return net, optimizer, average, scheduler


def step(net, optimizer, average, scheduler, factor=1.0, poison=False):
    x, noise = torch.randn(16, 8), random.random() + float(np.random.rand())
    target = (x.sum(1) > noise - 1).long()

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), target) * (float("nan") if poison else factor)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    net.metric(loss.detach())
    average.update_parameters(net)
    scheduler.step()


def state(net, optimizer, average, scheduler):
    tensors = [*net.parameters(), *net.buffers(), *average.parameters(), *average.buffers(), torch.get_rng_state()]
    held = copy.deepcopy(optimizer.state_dict())
    return (
        tensors,
        held,
        net.metric.compute(),
        net.extra,
        scheduler.state_dict(),
        random.random(),
        float(np.random.rand()),
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or ((a.isnan() == b.isnan()).all() and torch.equal(a.nan_to_num(), b.nan_to_num()))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def seed():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)


@pytest.mark.parametrize("before", [0, 12], ids=["no state yet", "with state"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("where", ["device", "cpu", "disk"])
def test_wild_trials_leave_no_trace(kind, before, where):
    if where != "device" and kind not in ("adamw", "lbfgs"):
        pytest.skip("where it lies does not depend on the optimizer")
    runs = []
    for trials in (0, 5):
        parts = build(kind)
        seed()
        for _ in range(before):
            step(*parts)
        snapshot = Snapshot([parts[0], parts[2]], [parts[1]], companions=[parts[3]], where=where)
        snapshot.save()
        addresses = [t.data_ptr() for t in (*parts[0].parameters(), *parts[0].buffers())]
        for trial in range(trials):
            for i in range(4):
                step(*parts, factor=10.0**trial, poison=trial == 2 and i == 3)
            snapshot.restore()
            assert [t.data_ptr() for t in (*parts[0].parameters(), *parts[0].buffers())] == addresses
        for _ in range(50 if kind != "lbfgs" else 10):
            step(*parts)
        runs.append(state(*parts))
    assert same(*runs)


def test_optimizer_tensors_keep_their_addresses():
    parts = build("adamw fused")
    step(*parts)
    snapshot = Snapshot([parts[0]], [parts[1]])
    snapshot.save()
    held = [t.data_ptr() for s in parts[1].state.values() for t in s.values()]
    step(*parts)
    snapshot.restore()
    assert [t.data_ptr() for s in parts[1].state.values() for t in s.values()] == held


def test_gradients_in_the_midst_of_an_accumulation():
    net = nn.Linear(3, 1)
    net(torch.ones(2, 3)).sum().backward()
    snapshot, before = Snapshot([net]), net.weight.grad.clone()
    snapshot.save()
    net(torch.randn(2, 3)).sum().backward()
    net.bias.grad = None
    snapshot.restore()
    assert torch.equal(net.weight.grad, before) and net.bias.grad is not None


def test_grad_scaler():
    net = nn.Linear(3, 1)
    optimizer, scaler = torch.optim.SGD(net.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=64.0)

    def go(poison):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(2, 3)).sum() * poison).backward()
        scaler.step(optimizer)
        scaler.update()

    go(1.0)
    snapshot = Snapshot([net], [optimizer], companions=[scaler])
    snapshot.save()
    before = scaler.state_dict()
    go(float("inf"))
    assert scaler.get_scale() == 32.0
    snapshot.restore()
    assert scaler.state_dict() == before and scaler.get_scale() == 64.0


def test_misuse():
    with pytest.raises(ValueError, match=r"'device', 'cpu' or 'disk'.*'tape'"):
        Snapshot([nn.Linear(1, 1)], where="tape")
    with pytest.raises(RuntimeError, match=r"call save\(\) first"):
        Snapshot([nn.Linear(1, 1)]).restore()


def test_shared_parameters_are_taken_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    snapshot, before = Snapshot([net, net[0]]), net[0].weight.detach().clone()
    snapshot.save()
    with torch.no_grad():
        net[0].weight.add_(1.0)
    snapshot.restore()
    assert torch.equal(net[1].weight, before) and net[0].weight is net[1].weight


def test_weight_average_is_applied_and_undone():
    net = nn.Linear(2, 1, bias=False)
    average, seen = WeightAverage(net), []
    for value in (1.0, 2.0, 3.0, 4.0):
        with torch.no_grad():
            net.weight.fill_(value)
        average.update()
        with average.applied():
            seen.append(float(net.weight[0, 0]))
        assert float(net.weight[0, 0]) == value
    assert seen[0] == 1.0 and seen == sorted(set(seen)) and 3.0 < seen[-1] < 4.0
    average.reset()
    with average.applied():
        assert float(net.weight[0, 0]) == 4.0


def test_rates_keep_the_groups_ratios_and_tensors():
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(
        [{"params": a.parameters(), "lr": torch.tensor(1e-3)}, {"params": b.parameters(), "lr": 1e-4}]
    )
    held, ratios = optimizer.param_groups[0]["lr"], group_ratios(optimizer)
    set_rate(optimizer, 0.5, ratios)
    assert optimizer.param_groups[0]["lr"] is held and float(held) == 0.5
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.05)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert group_ratios(optimizer) == [1.0, 1.0]


def test_schedule_file_and_replay(tmp_path):
    schedule = LRSchedule([Piece(0, 10, 0.1, 0.1), Piece(10, 5, 0.1, 0.0)], warmup_steps=4, ratios=(1.0, 0.1))
    path = tmp_path / "deep" / "lr.json"
    schedule.save(path)
    assert [f.name for f in path.parent.iterdir()] == ["lr.json"]
    loaded = LRSchedule.load(path)
    assert loaded.rates == schedule.rates and len(loaded) == 15 and loaded.ratios == (1.0, 0.1)
    assert schedule.rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1]) and 0 < schedule.rates[-1] < 0.02
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 0.7)
    replay, seen = loaded.scheduler(optimizer), []
    for _ in range(15):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        replay.step()
    assert seen == schedule.rates
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"written by LRSchedule\.save"):
        LRSchedule.load(tmp_path / "bad.json")
    (tmp_path / "worse.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        LRSchedule.load(tmp_path / "worse.json")


def test_a_module_s_own_counters_lists_and_late_buffers_are_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.outputs = 0, [1.0]
            self.register_buffer("mean", None)

    module = Counting()
    snapshot = Snapshot([module])
    snapshot.save()
    module.calls, module.mean, module.extra = 5, torch.ones(2), "new"
    module.outputs.append(2.0)
    snapshot.restore()
    assert module.calls == 0 and module.outputs == [1.0] and module.mean is None and not hasattr(module, "extra")
