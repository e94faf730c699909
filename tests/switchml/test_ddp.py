"""The hook under DistributedDataParallel against built-in all-reduce, two processes on CPU."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from execute_ranks import processes
from torch.nn.parallel import DistributedDataParallel

from trainkit.switchml import SoftwareSwitch, SwitchMLState, switchml_hook

ARMS: dict[str, dict[str, Any]] = {
    "int32": {"wire": "int32"},
    "int8": {"wire": "int8"},
    "views": {"wire": "int32", "gradient_as_bucket_view": True, "accumulate": 2, "steps": 30},
}


def _net() -> torch.nn.Module:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d
    return torch.nn.Sequential(
        conv(1, 8, 3), torch.nn.ReLU(), conv(8, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 10)
    )


def _train(
    rank: int, start: torch.nn.Module, switch: str, wire: str | None, steps: int = 200, accumulate: int = 1, **ddp: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """All parameters, and what was seen; without a wire, under the built-in all-reduce."""
    model = copy.deepcopy(start)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.002, **ddp)
    state = None
    if wire:
        state = SwitchMLState(switch, session=wire, wire=wire, elements=64)  # type: ignore[arg-type]
        wrapped.register_comm_hook(state, switchml_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    data = torch.Generator().manual_seed(rank)
    losses = []
    for _ in range(steps):
        for micro in range(accumulate):
            images = torch.randn(16, 1, 8, 8, generator=data)
            labels = (10 * torch.special.ndtr(images.mean((1, 2, 3)) * 8)).long().clamp(0, 9)
            with wrapped.no_sync() if micro < accumulate - 1 else torch.enable_grad():
                loss = torch.nn.functional.cross_entropy(wrapped(images), labels)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(float(loss))
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    calls = state.counters()["hook_calls"] if state else 0
    if state:
        state.close()
    return flat, {"equal": torch.equal(*both), "loss": sum(losses[-50:]) / 50, "calls": calls}


def _arms(rank: int, switch: str) -> dict[str, dict[str, Any]]:
    start = _net()
    plain, answer = _train(rank, start, switch, None)
    told = {"built-in": answer}
    for name, options in ARMS.items():
        flat, answer = _train(rank, start, switch, **options)
        alike = {key: value for key, value in options.items() if key != "wire"}
        reference = _train(rank, start, switch, None, **alike)[0] if alike else plain
        told[name] = {**answer, "difference": float((flat - reference).norm() / reference.norm())}
    return told


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, Any]]:
    with SoftwareSwitch() as switch:
        answer: dict[str, dict[str, Any]] = processes(_arms, 2, switch.address, deadline_s=240)[0]
    return answer


def test_200_steps_end_where_all_reduce_ends(report: dict[str, dict[str, Any]]) -> None:
    assert report["int32"]["difference"] <= 1e-5
    assert report["int32"]["equal"]


def test_buckets_are_rebuilt_after_the_first_step_and_all_go_through_the_hook(
    report: dict[str, dict[str, Any]],
) -> None:
    # one bucket of everything in the first step, then several
    assert report["int32"]["calls"] >= 1 + 2 * 199


def test_int8_wire_reaches_the_same_loss(report: dict[str, dict[str, Any]]) -> None:
    assert report["int8"]["equal"]
    assert report["int8"]["loss"] <= 1.01 * report["built-in"]["loss"]


def test_bucket_views_and_no_sync(report: dict[str, dict[str, Any]]) -> None:
    assert report["views"]["equal"]
    assert report["views"]["difference"] <= 1e-5
