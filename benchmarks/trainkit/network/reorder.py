"""Two racks, interleaved ranks: gloo's all-reduce in the given order, and in the order of `trainkit order`.

    python benchmarks/trainkit/network/reorder.py           # root; prints Markdown
    python benchmarks/trainkit/network/reorder.py --probe   # the order from `trainkit probe` on the same hosts

Eight namespaces, two racks of four hosts (100 Mbit/s), uplinks a quarter. torchrun starts the same program on every host,
once with `--rdzv-backend c10d` and once with `--rdzv-backend trainkit`, in turn; in the first it also runs on a group of
`ordered_group`, which changes the order in process. The program times all-reduces of 8 MiB; bytes are the uplinks' own
counters.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from _cases import interleaved
from _lab import Lab

from trainkit.collectives import Topology
from trainkit.collectives.order import RankPlan

PROGRAM = """
import json, os, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
folder, nbytes, runs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(minutes=5))
rank = dist.get_rank()
groups = {"as launched": None}
if len(sys.argv) > 4:  # in process: another group
    from trainkit.collectives.order import ordered_group
    hosts = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, os.environ["HOST"])
    groups["ordered_group"] = ordered_group([hosts.index(host) for host in json.loads(sys.argv[4])])
data = torch.ones(nbytes // 4)
for group in groups.values():
    dist.all_reduce(data, group=group)
for run in range(runs):
    for name, group in groups.items():
        data.fill_(1.0)
        dist.barrier()
        if rank == 0:
            (folder / "ready").write_text(name)
        while not (folder / f"go{run}{name}").exists():
            time.sleep(0.01)
        dist.barrier()
        start = time.monotonic()
        dist.all_reduce(data, group=group)
        seconds = torch.tensor(time.monotonic() - start)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        assert bool((data == dist.get_world_size()).all())
        if rank == 0:
            (folder / "ready").write_text(f"{float(seconds)}")
            while not (folder / f"on{run}{name}").exists():
                time.sleep(0.01)
dist.barrier()
dist.destroy_process_group()
"""


def wait_for(file: Path, agents: list["subprocess.Popen[bytes]"], seconds: float = 400) -> str:
    """The text of a file that will come; it is taken away."""
    end = time.monotonic() + seconds
    while not (file.exists() and (text := file.read_text())):
        failed = [agent for agent in agents if agent.poll()]
        if failed or time.monotonic() > end:
            raise RuntimeError(f"the program failed: {file.parent}")
        time.sleep(0.01)
    file.unlink()
    return text


def launch(
    lab: Lab, folder: Path, backend: str, plan: RankPlan, nbytes: int, runs: int
) -> dict[str, list[tuple[float, float]]]:
    """Way -> (seconds, MB out of the first rack) of every all-reduce."""
    hosts = lab.topology.compute_nodes
    folder.mkdir()
    (folder / "plan.json").write_text(plan.text())
    (folder / "program.py").write_text(PROGRAM)
    conf = "last_call_timeout=2,join_timeout=600" + (f",plan={folder / 'plan.json'}" if backend == "trainkit" else "")
    more = [json.dumps(list(plan.hosts))] if backend == "c10d" else []
    agents = []
    for host in hosts:
        address = lab.address(host)
        words = ["--nnodes", str(len(hosts)), "--nproc-per-node", "1", "--rdzv-backend", backend, "--rdzv-id", "job"]
        words += ["--rdzv-endpoint", f"{lab.address(hosts[0])}:29400", "--local-addr", address]
        words += ["--rdzv-conf", f"{conf},is_host={int(host == hosts[0])}"]
        words += [str(folder / "program.py"), str(folder), str(nbytes), str(runs), *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOST": host}
        with (folder / f"log-{host}").open("wb") as log:
            command = [sys.executable, "-m", "torch.distributed.run", *words]
            agents.append(lab.popen(host, command, env=environment, stdout=log, stderr=log, start_new_session=True))
    found: dict[str, list[tuple[float, float]]] = {}
    uplink = ("rack0", "core")
    ways = ["as launched", *(["ordered_group"] if more else [])]
    try:
        for run in range(runs):
            for way in ways:
                assert wait_for(folder / "ready", agents) == way
                before = lab.bytes()[uplink]
                (folder / f"go{run}{way}").touch()
                seconds = float(wait_for(folder / "ready", agents))
                found.setdefault(way, []).append((seconds, (lab.bytes()[uplink] - before) / 1e6))
                (folder / f"on{run}{way}").touch()
        for agent in agents:
            agent.wait(timeout=120)
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()
    return found


def probed(lab: Lab, folder: Path) -> Topology:
    """What `trainkit probe` on these hosts writes, without counting routers."""
    hosts = lab.topology.compute_nodes
    out = folder / "probed.json"
    words = [sys.executable, "-m", "trainkit", "probe", "--hosts", str(len(hosts)), "--ignore-hops", "--out", str(out)]
    words += ["--rendezvous", f"{lab.address(hosts[0])}:29400", "--join", "300"]
    more = [["--rank", str(rank), "--name", host] for rank, host in enumerate(hosts)]
    running = [
        lab.popen(host, [*words, *own], stdout=subprocess.DEVNULL) for host, own in zip(hosts, more, strict=True)
    ]
    try:
        if any([process.wait(timeout=600) for process in running]):
            raise RuntimeError("the probe failed")
    finally:
        for process in running:
            process.kill()
    network = Topology.load(out)
    here = {u: v for u, v, _ in network.links if u in hosts}
    there = {u: v for u, v, _ in lab.topology.links if u in hosts}
    exact = all((here[u] == here[v]) == (there[u] == there[v]) for u in hosts for v in hosts)
    print(f"probed racks: {'exact' if exact else here}; links (Mbit/s): ", end="")
    print(", ".join(f"{u} -> {v} {float(rate):g}" for u, v, rate in network.links), flush=True)
    return network


def ordered(network: Topology, folder: Path) -> RankPlan:
    """What `trainkit order` makes of the network."""
    network.save(folder / "network.json")
    words = ["order", str(folder / "network.json"), "--bytes", "8MiB", "--write", "torchrun"]
    words += ["--out", str(folder / "rank_order.json")]
    print(subprocess.run([sys.executable, "-m", "trainkit", *words], check=True, capture_output=True, text=True).stdout)
    return RankPlan.load(folder / "rank_order.json")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--probe", action="store_true", help="order what `trainkit probe` finds, not the declared network"
    )
    parser.add_argument("--runs", type=int, default=5, help="all-reduces a launch")
    parser.add_argument("--launches", type=int, default=2, help="launches of each, in turn")
    options = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {}
    with Lab(interleaved()) as lab, tempfile.TemporaryDirectory() as scratch:
        devices = {host: {"address": lab.address(host)} for host in lab.topology.compute_nodes}
        network = probed(lab, Path(scratch)) if options.probe else replace(lab.topology, devices=devices)
        plan = ordered(network, Path(scratch))
        for launch_ in range(options.launches):
            for backend in ("c10d", "trainkit"):
                folder = Path(scratch, f"{launch_}{backend}")
                for way, rows in launch(lab, folder, backend, plan, 8 * 2**20, options.runs).items():
                    name = f"torchrun, {backend}" + (f", {way}" if way != "as launched" else "")
                    results.setdefault(name, []).extend(rows)
                    print(name, *(f"{seconds:.2f} s, {megabytes:.1f} MB;" for seconds, megabytes in rows), flush=True)
    base = [statistics.median(column) for column in zip(*results["torchrun, c10d"], strict=True)]
    print("\n| 8 MiB all-reduce | runs | median s | min..max | uplink MB | time: given / this | bytes: given / this |")
    print("|---|---|---|---|---|---|---|")
    for name, rows in results.items():
        seconds, megabytes = zip(*rows, strict=True)
        time_, bytes_ = statistics.median(seconds), statistics.median(megabytes)
        cells = [name, len(rows), f"{time_:.2f}", f"{min(seconds):.2f}..{max(seconds):.2f}", f"{bytes_:.1f}"]
        print("|", " | ".join(map(str, [*cells, f"{base[0] / time_:.2f}", f"{base[1] / bytes_:.2f}"])), "|")


if __name__ == "__main__":
    main()
