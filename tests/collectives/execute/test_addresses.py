"""Hosts as Debian makes them, whose own name is 127.0.1.1 to themselves; and hosts that have IPv6 alone."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.netns

SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from trainkit import NetworkState, auto_network_hook
from trainkit.collectives import ForestState, Topology, forest_hook, probe, register_backend

torch.set_num_threads(1)
pair = Topology("pair", list("ab"), list("ab"), [("a", "b", 1), ("b", "a", 1)], unit="Mbit/s")
backend = sys.argv[1]
register_backend(pair, timeout_s=20)
dist.init_process_group(backend)
rank = dist.get_rank()
told = {}

def train(name, state=None, hook=None):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    ddp = DistributedDataParallel(model)
    if state is not None:
        ddp.register_comm_hook(state, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(20):
        ddp(torch.full((4, 8), rank + step / 7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    told[name] = [round(value, 4) for value in model.weight.flatten().tolist()]
    if state is not None:
        told[name + " counts"] = sum(state.counters().values())
        dist.barrier()
        state.close()

train(backend)
if backend == "trainkit":
    forest = ForestState(topology=pair, timeout_s=20)
    train("forest", forest, forest_hook)
    network = probe(warm_s=0.02, measure_s=0.05)
    told["probe"] = sorted(str(facts["address"]) for facts in network.devices.values())
    automatic = NetworkState(timeout_s=20)
    train("automatic", automatic, auto_network_hook)
    told["plan"] = automatic.plan.topology.name
print(json.dumps(told), flush=True)
dist.barrier()
os._exit(0)
"""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(params=["10.77.0", "fd00:77:"])
def hosts(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, str, str]]]:
    """(namespace, its name, its address) of two hosts."""
    net, own = request.param, os.getpid() % 10000
    six = ":" in net
    names = [f"tka{own}", f"tkb{own}"]
    addresses = [f"{net}:{end}" if six else f"{net}.{end}" for end in (1, 2)]
    folders = [Path("/etc/netns") / name for name in names]
    with contextlib.ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
        _ip("link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "vb", "netns", names[1])
        for at, (name, folder) in enumerate(zip(names, folders, strict=True)):
            device = "va" if at == 0 else "vb"
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", device, "up")
            more = ["nodad"] if six else []
            _ip("-n", name, "address", "add", f"{addresses[at]}/{64 if six else 24}", "dev", device, *more)
            folder.mkdir(parents=True)
            stack.callback(folder.rmdir)
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {names[at]}", f"{addresses[1 - at]} {names[1 - at]}"]
            (folder / "hosts").write_text("\n".join(lines) + "\n")
            stack.callback((folder / "hosts").unlink)
        yield [(name, name, address) for name, address in zip(names, addresses, strict=True)]


@pytest.mark.parametrize("backend", ["trainkit", "gloo"])
def test_a_name_that_is_loopback_to_itself(hosts: list[tuple[str, str, str]], backend: str, tmp_path: Path) -> None:
    """Nothing is set for our own; for plain gloo what `trainkit doctor` and the docs say."""
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    ranks = []
    for rank, (namespace, name, _) in enumerate(hosts):
        given = {
            "MASTER_ADDR": hosts[0][1], "MASTER_PORT": "29611", "RANK": str(rank), "WORLD_SIZE": "2",
            **({"GLOO_SOCKET_IFNAME": "va" if rank == 0 else "vb"} if backend == "gloo" else {}),
        }  # fmt: skip
        environment = {**{key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"}, **given}
        # a host name of its own
        words = ["ip", "netns", "exec", namespace, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name]
        command = [*words, sys.executable, "-P", str(script), backend]
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        said = [rank.communicate(timeout=150) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(out.strip() for out, _ in said), "\n".join(errors[-1500:] for _, errors in said)
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in said)
    assert first[backend] == second[backend]
    if backend == "trainkit":
        assert first["forest"] == second["forest"] == first["automatic"] == second["automatic"] == first["trainkit"]
        assert first["forest counts"] > 0
        assert first["probe"] == sorted(address for *_, address in hosts)
        assert first["plan"] == "probed: 2 hosts"
