"""The hook under DistributedDataParallel against built-in all-reduce, two processes on CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainkit.switchml import SoftwareSwitch

_TRAIN = """
import copy, json, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from trainkit.switchml import SwitchMLState, switchml_hook
rank, switch, meet = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
torch.manual_seed(0)
conv = torch.nn.Conv2d
start = torch.nn.Sequential(conv(1, 8, 3), torch.nn.ReLU(), conv(8, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(),
                            torch.nn.Linear(8 * 16, 10))

def train(wire, steps=200, accumulate=1, **ddp):
    model = copy.deepcopy(start)
    wrapped = DDP(model, bucket_cap_mb=0.002, **ddp)
    state = None
    if wire:
        state = SwitchMLState(switch, session=wire, wire=wire, elements=64)
        wrapped.register_comm_hook(state, switchml_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    data = torch.Generator().manual_seed(rank)
    losses = []
    for step in range(steps):
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

plain, answer = train(None)
report = {"built-in": answer}
for name, arguments in json.loads(sys.argv[4]).items():
    flat, answer = train(**arguments)
    reference = train(None, **{k: v for k, v in arguments.items() if k != "wire"})[0] if len(arguments) > 1 else plain
    report[name] = {**answer, "difference": float((flat - reference).norm() / reference.norm())}
print(json.dumps(report), flush=True)
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ddp")
    script = folder / "train.py"
    script.write_text(_TRAIN)
    arms = {
        "int32": {"wire": "int32"},
        "int8": {"wire": "int8"},
        "views": {"wire": "int32", "gradient_as_bucket_view": True, "accumulate": 2, "steps": 30},
    }
    with SoftwareSwitch() as switch:
        arguments = [switch.address, str(folder / "meet"), json.dumps(arms)]
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script), str(r), *arguments], stdout=subprocess.PIPE, text=True, env=os.environ
            )
            for r in range(2)
        ]
        outs = [rank.communicate(timeout=240)[0] for rank in ranks]
    answer: dict[str, dict[str, Any]] = json.loads(outs[0].strip().splitlines()[-1])
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
