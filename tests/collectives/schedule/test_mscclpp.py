"""MSCCL++ plans in an emulator of the executor's threads: several launches, many interleavings, planted mistakes."""

import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from tree_families import drawn

from trainkit.collectives import Schedule, allreduce_forest, fabrics, forest, ring_schedule
from trainkit.collectives.schedule import export
from trainkit.collectives.schedule.export import ExportError, run_mscclpp
from trainkit.collectives.schedule.export._mscclpp_emulator import MOST_REMOTE_BUFFERS, ORDERS

DEFAULTS: dict[str, Callable[[], Schedule]] = {
    "ring 4, all-gather": lambda: forest(fabrics.ring(4)).schedule(),
    "ring 4, classic all-reduce": lambda: ring_schedule(fabrics.ring(4)),
    "star 4, all-reduce": lambda: allreduce_forest(fabrics.star([1] * 4)).schedule(),
    "star 8, one slow, all-reduce": lambda: allreduce_forest(fabrics.star([25] + [100] * 7)).schedule(),
    "star 6, reduce-scatter": lambda: forest(fabrics.star([1] * 6), "reduce_scatter").schedule(2),
    "mesh 3x3, all-reduce": lambda: allreduce_forest(fabrics.mesh([3, 3])).schedule(),
    "hypercube 3, all-gather": lambda: forest(fabrics.hypercube(3)).schedule(),
    "DGX A100, all-reduce": lambda: allreduce_forest(fabrics.dgx_a100(1)).schedule(),
    "DGX H100, all-gather in 4 pieces": lambda: forest(fabrics.dgx_h100(1)).schedule(4),
    "two boxes of 4, all-reduce": lambda: allreduce_forest(fabrics.boxes(2, 4, inside=10, uplink=1)).schedule(),
    "MI250, all-gather": lambda: forest(fabrics.mi250(1), trees_per_root=1).schedule(),
    "two DGX A100, all-reduce": lambda: allreduce_forest(fabrics.dgx_a100(2), trees_per_root=1).schedule(),
}
LARGE = ("MI250, all-gather", "two DGX A100, all-reduce")


def interleaved(text: str, seeds: int) -> None:
    for order in ORDERS:
        for seed in range(seeds):
            run_mscclpp(text, launches=3, order=order, seed=seed)


@pytest.mark.parametrize("machine", [4, 1])
@pytest.mark.parametrize("name", DEFAULTS)
def test_default_exports_run(name: str, machine: int) -> None:
    text = export.mscclpp_json(DEFAULTS[name](), ranks_per_machine=machine)
    interleaved(text, 1 if name in LARGE else 12 if machine == 4 else 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_exports_run_at_length(name: str) -> None:
    interleaved(export.mscclpp_json(DEFAULTS[name]()), 12)


@pytest.mark.parametrize("seed", range(30))
def test_random_exports_run(seed: int) -> None:
    rng = random.Random(seed)
    topology = drawn(rng, 7)
    machine = rng.choice([1, 2, 8])
    try:
        if rng.random() < 0.5:
            text = export.mscclpp_json(
                allreduce_forest(topology, trees_per_root=1).schedule(), ranks_per_machine=machine
            )
        else:
            collective: Any = rng.choice(["allgather", "reduce_scatter"])
            trees = forest(topology, collective, trees_per_root=1)
            text = export.mscclpp_json(
                trees.schedule(rng.randint(1, 2)), ranks_per_machine=machine, blocks=rng.randint(1, 4)
            )
    except ValueError as error:  # capacities too far apart for one tree a root
        assert "trees_per_root" in str(error)
        return
    interleaved(text, 12)


def plan(machine: int, name: str = "star 4, all-reduce") -> dict[str, Any]:
    made: dict[str, Any] = json.loads(export.mscclpp_json(DEFAULTS[name](), ranks_per_machine=machine))
    return made


def found(broken: dict[str, Any], words: str) -> None:
    """Some interleaving of three launches shows it."""
    with pytest.raises(ExportError, match=words):
        interleaved(json.dumps(broken), 60)


def test_a_missing_signal_is_found() -> None:
    for machine in (4, 1):
        blocks = plan(machine)["gpus"][0]["threadblocks"]
        for number, block in enumerate(blocks):
            for place, op in enumerate(block["ops"]):
                if op["name"] in ("signal", "wait"):
                    broken = plan(machine)
                    del broken["gpus"][0]["threadblocks"][number]["ops"][place]
                    found(broken, "waits for ever|wrong data|more often")


@pytest.mark.parametrize("name", ["star 4, all-reduce", "ring 4, classic all-reduce", "ring 4, all-gather"])
def test_a_missing_barrier_is_found(name: str) -> None:
    for number, block in enumerate(plan(4, name)["gpus"][0]["threadblocks"]):
        names = [op["name"] for op in block["ops"]]
        for place in [place for place, op in enumerate(names) if op == "nop"]:
            if "all-reduce" in name and set(names[:place]) == {"signal", "wait"} and names[place + 1] == "put":
                continue  # the receiver was heard of a launch ago, in these two: it sent what it added
            broken = plan(4, name)
            del broken["gpus"][0]["threadblocks"][number]["ops"][place]
            found(broken, "wrong data")


def test_a_17th_buffer_is_found() -> None:
    broken = plan(4)
    references = broken["gpus"][0]["threadblocks"][0]["remote_buffer_refs"][0]
    references["remote_buffer_ids"] += [references["remote_buffer_ids"][0]] * MOST_REMOTE_BUFFERS
    found(broken, r"MSCCL\+\+ allows 16 remote buffers of memory channels, rank 0, thread block 0 has")
    # Blocks that would need them are not written: 15 peers, into two buffers of each.
    schedule = allreduce_forest(fabrics.star([1] * 16)).schedule()
    wide = json.loads(export.mscclpp_json(schedule, ranks_per_machine=16, blocks=1))
    most = max(
        len(r["remote_buffer_ids"]) for g in wide["gpus"] for b in g["threadblocks"] for r in b["remote_buffer_refs"]
    )
    assert most <= MOST_REMOTE_BUFFERS


def test_a_launch_must_not_start_into_the_one_before() -> None:
    broken = plan(4, "ring 4, all-gather")
    for gpu in broken["gpus"]:
        for block in gpu["threadblocks"]:
            names = [op["name"] for op in block["ops"]]
            sends = "put" in names
            del block["ops"][names.index("signal" if "wait" in names[names.index("put") if sends else 0 :] else "wait")]
            names = [op["name"] for op in block["ops"]]
            if sends and "wait" in names[: names.index("put")]:
                del block["ops"][names.index("wait")]
    found(broken, "wrong data")


def test_a_proxy_reads_after_the_kernel_unless_flushed() -> None:
    broken = plan(1)
    for gpu in broken["gpus"]:
        for block in gpu["threadblocks"]:
            block["ops"] = [op for op in block["ops"] if op["name"] != "flush"]
    found(broken, "wrong data")
    # The kernel counts a flush's outputs: one that names only channels flushes nothing.
    empty = plan(1)
    for gpu in empty["gpus"]:
        for block in gpu["threadblocks"]:
            for op in block["ops"]:
                if op["name"] == "flush":
                    del op["dst_buff"]
    found(empty, "wrong data")


def test_names_do_not_signal() -> None:
    broken = plan(4)
    for block in broken["gpus"][0]["threadblocks"]:
        for op in block["ops"]:
            op["name"] = "pws" if op["name"] == "put" else op["name"]
        block["ops"] = [op for at, op in enumerate(block["ops"]) if at == 0 or op["name"] != "signal"]
    found(broken, "waits for ever")
    found(plan(4) | {"protocol": "LL"}, "protocol must be Simple")


def test_limits_of_a_block_and_of_the_gpu() -> None:
    schedule = allreduce_forest(fabrics.star([1] * 8)).schedule(16)
    few = json.loads(export.mscclpp_json(schedule))
    assert max(len(gpu["threadblocks"]) for gpu in few["gpus"]) <= 80
    with pytest.raises(ExportError, match="run together: there may be 8, one a multiprocessor, a rank would need"):
        export.mscclpp_json(schedule, multiprocessors=8)
    # 32-bit offsets: a message is small enough for the scratch memory that it needs.
    for gpu in few["gpus"]:
        chunks = max(gpu["scratch_chunks"], gpu["output_chunks"])
        assert Fraction(few["max_message_size"], gpu["output_chunks"]) * chunks < 2**32
    with pytest.raises(ExportError, match="channels to each other"):
        unpaired = plan(4)
        unpaired["gpus"][0]["channels"][0]["connected_to"].append(1)
        run_mscclpp(json.dumps(unpaired))


RUNTIME = """
import sys, torch, torch.distributed as dist
from mscclpp import CommGroup, DataType, Executor, ExecutionPlan
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.cuda.set_device(rank)
executor = Executor(CommGroup(torch_group=dist.group.WORLD).communicator)
plan = ExecutionPlan(sys.argv[1], rank)
data = torch.empty(size * 1024 * 64, device="cuda")
for launch in range(3):
    data.copy_(torch.arange(len(data), device="cuda") % 97 + rank + launch)
    nbytes = data.numel() * data.element_size()
    executor.execute(rank, data.data_ptr(), data.data_ptr(), nbytes, nbytes, DataType.float32, plan,
                     torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    want = (torch.arange(len(data), device="cuda") % 97) * size + sum(range(size)) + launch * size
    assert torch.equal(data, want.float()), (rank, launch)
dist.barrier()
"""


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("mscclpp") is None, reason="needs the MSCCL++ runtime (pip: mscclpp)")
def test_the_runtime_itself(tmp_path: Path) -> None:
    import torch

    size = torch.cuda.device_count()
    if size < 2:
        pytest.skip("needs two GPUs")
    (tmp_path / "plan.json").write_text(export.mscclpp_json(allreduce_forest(fabrics.star([1] * size)).schedule()))
    (tmp_path / "run.py").write_text(RUNTIME)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", "run.py", "plan.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
