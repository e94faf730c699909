"""One process of one check. Run as `python -m trainkit.check._work JOB`."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from trainkit._processes import die_with_parent, free_port

_MEETING_S = 60.0
_STAR = {
    "name": "star",
    "nodes": ["a", "b", "c", "d", "s"],
    "compute_nodes": ["a", "b", "c", "d"],
    "links": [[u, v, 10] for x in "abcd" for u, v in ((x, "s"), ("s", x))],
}


class CheckFailed(RuntimeError):
    """A part ran and its result is not what it must be."""


def _switch() -> None:
    from trainkit.switchml import SoftwareSwitch

    with SoftwareSwitch("127.0.0.1:0") as switch, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        before = switch.counters()
        host, _, port = switch.address.rpartition(":")
        while switch.counters() == before:  # the time limit ends it
            stranger.sendto(b"not a packet of SwitchML's", (host, int(port)))
            time.sleep(0.02)


def _collectives() -> None:
    from trainkit.collectives import Topology, forest, optimum

    star = Topology.from_dict(_STAR)
    # a node's link, of 10, brings the shares of the three others
    _equal("the optimum of the star", optimum(star).inv_rate, Fraction(3, 10))
    found = forest(star)
    found.verify()
    _equal("the forest of the star", found.inv_rate, Fraction(3, 10))


def _switchml(rank: int) -> None:
    import torch.distributed as dist

    from trainkit.collectives._exchange import Exchange, Placement
    from trainkit.switchml import SoftwareSwitch, SwitchMLState, switchml_hook

    switch = SoftwareSwitch("127.0.0.1:0") if rank == 0 else None
    place = Placement.of(None)
    exchange = Exchange(place.store, place.rank, place.size, _MEETING_S)
    state = SwitchMLState(exchange.from_first(switch.address if switch else None))
    try:
        _gradients(state, switchml_hook)
        if not state.counters()["hook_calls"]:
            raise CheckFailed("the gradients must go through the hook, it was not called")
    finally:
        state.close()
        dist.barrier()  # the switch stays until both have left
        if switch:
            switch.close()


def _forest(rank: int) -> None:
    from trainkit.collectives import ForestState, Topology, forest_hook

    pair = {"name": "pair", "nodes": ["a", "b"], "compute_nodes": ["a", "b"], "links": [["a", "b", 1], ["b", "a", 1]]}
    state = ForestState(topology=Topology.from_dict(pair))
    try:
        _gradients(state, forest_hook)
        if not any(state.counters().values()):
            raise CheckFailed("the gradients must go along the forest, no byte did")
    finally:
        state.close()


def _gradients(state: Any, hook: Callable[..., Any]) -> None:
    """DDP's gradients with the hook, against local ones in fp64, averaged by gloo."""
    import copy

    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    exact = copy.deepcopy(model).double()
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(state, hook)
    inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(1 + dist.get_rank()))
    ddp(inputs).square().mean().backward()
    exact(inputs.double()).square().mean().backward()
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        dist.all_reduce(theirs.grad)
        _close("gradients", ours.grad, theirs.grad / dist.get_world_size(), 1e-5)
    del ddp


def _attention() -> None:
    import torch

    from trainkit.kernels import attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, tolerance = (torch.bfloat16, 2e-2) if device.type == "cuda" else (torch.float32, 1e-5)
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype).requires_grad_()

    q, k, v = numbers(2, 65, 4, 64), numbers(2, 65, 2, 64), numbers(2, 65, 2, 64)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    q64, k64, v64 = exact[0], *(x.repeat_interleave(2, dim=2) for x in exact[1:])
    scores = torch.einsum("bqhd,bkhd->bhqk", q64, k64) / 8
    hidden = torch.ones(65, 65, dtype=torch.bool, device=device).triu(1)
    truth = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v64)
    out = attention(q, k, v, causal=True)
    weight = torch.randn(truth.shape, generator=random).to(device, dtype)
    torch.autograd.backward((out, truth), (weight, weight.double()))
    _close("attention's output", out.detach(), truth.detach(), tolerance)
    for name, ours, theirs in zip("qkv", (q, k, v), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        _close(f"attention's gradient of {name}", ours.grad, theirs.grad, tolerance)


def _autolrs() -> None:
    import numpy as np

    from trainkit.autolrs import forecast

    steps = np.arange(200)
    found = float(forecast(1 + np.exp(-steps / 50), 400).mean)
    if abs(found - 1) > 0.05:
        raise CheckFailed(f"the forecast of 1 + exp(-step/50) at step 400 must be 1, got {found:.3f}")


def _p4(logs: Path) -> None:
    from trainkit.p4.deploy import deploy, reset, status

    program = shutil.which("simple_switch_grpc") or "simple_switch_grpc"
    options = ["--no-p4", "--device-id", "0", "--log-level", "off"]
    if "thrift-port" in subprocess.run([program, "--help"], capture_output=True, text=True).stdout:
        options += ["--thrift-port", str(free_port())]
    grpc = f"127.0.0.1:{free_port()}"
    description = logs / "workers.yaml"
    description.write_text(
        'switch: {ip: 10.0.0.254, mac: "02:00:00:00:00:fe"}\n'
        'workers: [{name: a, mac: "02:00:00:00:00:01", ip: 10.0.0.1, port: 1}]\n'
        "sessions: [{name: default, workers: [a], slots: 16, elements: 256}]\n"
    )
    with subprocess.Popen([program, *options, "--", "--grpc-server-addr", grpc, "--cpu-port", "510"]) as switch:
        try:
            _until_it_listens(grpc, switch)
            deploy(description, grpc=grpc, probe=False)
            if not status(description, grpc=grpc).as_described:
                raise CheckFailed("the switch must hold what was deployed, it does not")
            _equal("the sessions that were reset", reset(description, grpc=grpc), ["default"])
        finally:
            switch.kill()


def _until_it_listens(address: str, server: "subprocess.Popen[bytes]") -> None:
    host, _, port = address.rpartition(":")
    while server.poll() is None:  # the time limit ends it
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise CheckFailed(f"the switch must listen on {address}, it ended with exit code {server.returncode}")


def _equal(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise CheckFailed(f"{what} must be {wanted}, got {found}")


def _close(what: str, found: Any, wanted: Any, tolerance: float) -> None:
    """Largest difference over the largest magnitude."""
    error = float((found.double() - wanted).abs().max() / wanted.abs().max())
    if not error <= tolerance:
        raise CheckFailed(f"{what} must be within {tolerance:g} of what fp64 gives, got {error:.2g}")


def _work(check: str, rank: int, world_size: int, port: int, logs: Path) -> None:
    if world_size == 1:
        alone: dict[str, Callable[[], None]] = {
            "switch": _switch, "collectives": _collectives, "attention": _attention, "autolrs": _autolrs,
            "p4": lambda: _p4(logs),
        }  # fmt: skip
        return alone[check]()
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    {"switchml": _switchml, "forest": _forest}[check](rank)
    dist.destroy_process_group()


def main() -> None:
    """Do the job in argv; an error goes to the log in full and to the parent in one line."""
    job = json.loads(sys.argv[1])
    die_with_parent(job["parent"])
    logs = Path(job["logs"])
    try:
        _work(job["check"], job["rank"], job["world_size"], job["port"], logs)
    except BaseException as error:
        traceback.print_exc()
        (logs / f"error-{job['rank']}.txt").write_text(f"{type(error).__name__}: {error}")
        sys.stderr.flush()
        # not sys.exit: a peer that is gone would hold the process group's destructor
        os._exit(1)


if __name__ == "__main__":
    main()
