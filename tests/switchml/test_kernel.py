"""The switch inside the kernel: the packet vectors of profile `core`, and workers that train through it."""

import contextlib
import ctypes.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import BENCHMARKS, DATA, ROOT

SCENE = ROOT / "tests" / "support" / "switchml_kernel_scene.py"
_GRO = BENCHMARKS / "switchml" / "_gro.py"
VECTORS = json.loads((DATA / "switchml_vectors.json").read_text())

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(
        not (shutil.which("clang") and ctypes.util.find_library("bpf")), reason="needs clang and libbpf"
    ),
]

_WORKER = """
import sys
import torch
from trainkit.switchml import SwitchMLState
rank, switch, token = int(sys.argv[1]), sys.argv[2], sys.argv[3]
own = [torch.randn(20_001, generator=torch.Generator().manual_seed(r)) for r in range(3)]
exact = torch.stack(own).double().mean(0)
states = [
    SwitchMLState(switch, rank=rank, world_size=3, session=f"of {elements}", profile="core", elements=elements,
                  token_file=token, timeout_s=30)
    for elements in (256, 352)
]
for step in range(3):
    for future in [state.average(own[rank].clone(), index=0) for state in states]:
        assert float((future.wait().double() - exact).abs().max()) < 1e-6
print(*(state.connect().member.elements for state in states), flush=True)
for state in states:
    state.close()
"""


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


@pytest.fixture
def hub() -> Iterator[str]:
    """Namespaces PREFIX0 to PREFIX2 behind a bridge in namespace PREFIXs; yields PREFIX."""
    prefix = f"tx{os.getpid() % 10000}"
    names = [f"{prefix}s", *(f"{prefix}{rank}" for rank in range(3))]
    try:
        for name in names:
            _ip(f"netns add {name}")
            _ip(f"-n {name} link set lo up")
        _ip(f"-n {prefix}s link add br0 type bridge")
        for rank, name in enumerate(names[1:]):
            _ip(f"link add p{rank} netns {prefix}s type veth peer name eth0 netns {name}")
            _ip(f"-n {prefix}s link set p{rank} master br0 up")
            _ip(f"-n {name} link set eth0 up")
            _ip(f"-n {name} addr add 10.77.0.{rank + 1}/24 dev eth0")
            # a veth takes redirected frames where its receiver polls
            subprocess.run(["ip", "netns", "exec", name, sys.executable, str(_GRO), "eth0"], check=True)
        _ip(f"-n {prefix}s link set br0 up")
        _ip(f"-n {prefix}s addr add 10.77.0.254/24 dev br0")
        yield prefix
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _inside(namespace: str, *arguments: str) -> "subprocess.Popen[str]":
    command = ["ip", "netns", "exec", namespace, sys.executable, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_kernel_answers_as_the_vectors_say(hub: str) -> None:
    core = [scenario for scenario in VECTORS if scenario["member"]["profile"] == "core"]
    namespaces, interfaces = (",".join(f"{prefix}{rank}" for rank in range(3)) for prefix in (hub, "p"))
    scene = _inside(
        f"{hub}s",
        str(SCENE),
        json.dumps(core),
        namespaces,
        interfaces,
    )
    out, error = scene.communicate(timeout=120)
    assert scene.returncode == 0, error
    answer = json.loads(out)
    assert answer["steps"] == sum(len(scenario["steps"]) for scenario in core)
    assert min(answer["counters"][name] for name in ("chunks", "retransmissions", "stale", "malformed")) > 0


def test_workers_join_and_average_in_two_sessions_through_the_kernel(hub: str, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    listen = ["--listen", "10.77.0.254:0", "--xdp", "p0,p1,p2", "--token-file", str(token), "--json"]
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(_inside(f"{hub}s", "-m", "trainkit", "switch", *listen))
        stack.callback(switch.terminate)
        assert switch.stdout is not None and switch.stderr is not None
        line = switch.stdout.readline()
        assert line, switch.stderr.read()
        address = json.loads(line)["address"]
        workers = [_inside(f"{hub}{rank}", "-c", _WORKER, str(rank), address, str(token)) for rank in range(3)]
        for worker in workers:
            out, error = worker.communicate(timeout=200)
            assert worker.returncode == 0, error
            assert out.split() == ["256", "352"]
        switch.terminate()
        counters = json.loads(switch.stdout.read().splitlines()[-1])["counters"]
        # every sum of 20001 values by 3 workers was made in the kernel
        assert counters["chunks"] >= 3 * sum(-(-20_001 // elements) for elements in (256, 352))
