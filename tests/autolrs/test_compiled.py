"""Restoring in place: what was compiled or captured goes on with the same tensors."""

import pytest
import torch
from torch import nn

from trainkit.autolrs._schedule import set_rate
from trainkit.autolrs._snapshot import Snapshot

torch.set_num_threads(1)


def build(device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)


def batch(i, device="cpu"):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i)).to(device)
    return x, x.sum(1, keepdim=True)


def test_a_compiled_model_is_neither_recompiled_nor_disturbed():
    from torch._dynamo.testing import CompileCounterWithBackend

    ends, counter = [], CompileCounterWithBackend("aot_eager")
    for trials in (0, 3):
        torch._dynamo.reset()
        model = build()
        compiled = torch.compile(model, backend=counter)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        snapshot = Snapshot([model], [optimizer])

        def step(i, compiled=compiled, optimizer=optimizer):
            x, y = batch(i)
            optimizer.zero_grad()
            nn.functional.mse_loss(compiled(x), y).backward()
            optimizer.step()

        step(0)
        frames = counter.frame_count
        snapshot.save()
        held = [t.data_ptr() for t in model.parameters()]
        for trial in range(trials):
            set_rate(optimizer, 10.0**trial, [1.0])
            step(1)
            snapshot.restore()
        for i in range(1, 4):
            step(i)
        assert counter.frame_count == frames and [t.data_ptr() for t in model.parameters()] == held
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.gpu
def test_a_captured_step_goes_on_after_trials():
    """Forward, backward and a capturable optimizer in one CUDA graph; the rate is a tensor filled in place."""
    ends = []
    for trials in (0, 3):
        model = build("cuda")
        optimizer = torch.optim.AdamW(model.parameters(), torch.tensor(0.01, device="cuda"), capturable=True)
        x, y = (t.clone() for t in batch(0, "cuda"))

        def step(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        snapshot = Snapshot([model], [optimizer], grads=False)
        snapshot.save()
        for trial in range(trials):
            set_rate(optimizer, 10.0**trial, [1.0])
            graph.replay()
            snapshot.restore()
        for i in range(4):
            for held, new in zip((x, y), batch(i, "cuda"), strict=True):
                held.copy_(new)
            graph.replay()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
