"""Three torchrun agents on loopback addresses of one machine, each a host to the rendezvous plug-in."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paths import ROOT

# Tells where it is and goes on together with all others until a file ends it; dies once where a file says so.
WORKER = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
folder = Path(sys.argv[1])
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
ranks = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
dist.all_gather(ranks, torch.tensor([dist.get_rank()]))
assert [int(rank) for rank in ranks] == list(range(dist.get_world_size()))
restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
line = f"{os.environ['HOST_UNDER_TEST']} {dist.get_rank()} {dist.get_world_size()} {restart} {os.environ['MASTER_ADDR']}\\n"
with (folder / "ranks").open("a") as file:
    file.write(line)
kill = folder / "kill"
while True:
    stop = torch.tensor([int((folder / "stop").exists())])
    dist.all_reduce(stop)
    if stop.item():
        break
    if kill.exists() and kill.read_text() == os.environ["HOST_UNDER_TEST"]:
        kill.unlink()
        os._exit(7)
    time.sleep(0.2)
dist.barrier()
dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Agents:
    """torchrun on hosts 127.0.0.1, 127.0.0.2, ... with a plan of ranks."""

    def __init__(self, folder: Path, plan: dict[str, Any], *, nodes: str, restarts: int) -> None:
        self.folder, self.nodes, self.restarts = folder, nodes, restarts
        self.port = free_port()
        (folder / "plan.json").write_text(json.dumps(plan))
        (folder / "worker.py").write_text(WORKER)
        (folder / "ranks").touch()
        # the entry point of pyproject.toml, for an installation that is older than it
        entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["torchrun.handlers"]
        info = folder / "site" / "trainkit_order_under_test-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trainkit-order-under-test\nVersion: 0\n")
        lines = "\n".join(f"{name} = {home}" for name, home in entry.items())
        (info / "entry_points.txt").write_text(f"[torchrun.handlers]\n{lines}\n")
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, host: str, *, plan: str = "plan.json", rack: str | None = None) -> None:
        """Run an agent for a host, which is one of the loopback addresses."""
        conf = f"plan={self.folder / plan},last_call_timeout=2,order_timeout=20,is_host={int(host == '127.0.0.1')}"
        conf += f",rack={rack}" if rack else ""
        words = ["--nnodes", self.nodes, "--nproc-per-node", "1", "--max-restarts", str(self.restarts)]
        words += ["--rdzv-backend", "trainkit", "--rdzv-id", "job", "--rdzv-conf", conf + ",keep_alive_interval=1"]
        words += ["--rdzv-endpoint", f"127.0.0.1:{self.port}", "--local-addr", host, "--monitor-interval", "0.3"]
        environment = {
            **os.environ,
            "HOST_UNDER_TEST": host,
            "PYTHONPATH": str(self.folder / "site"),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        log = (self.folder / f"log-{host}").open("ab")
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *words,
            str(self.folder / "worker.py"),
            str(self.folder),
        ]
        self.running[host] = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def rounds(self) -> list[list[str]]:
        """host, rank, world size, restart count, master of every worker that started."""
        return [line.split() for line in (self.folder / "ranks").read_text().splitlines()]

    def wait(self, what: Callable[[], bool], seconds: float = 200) -> None:
        """Until `what` holds."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.1)

    def settled(self, *hosts: str) -> bool:
        """Whether the workers that started last have the ranks of this order."""
        return {host: (int(rank), int(world)) for host, rank, world, *_ in self.rounds()[-len(hosts) :]} == {
            host: (rank, len(hosts)) for rank, host in enumerate(hosts)
        }

    def logs(self) -> str:
        """The end of every agent's output."""
        return "\n".join(f"{log.name}:\n{log.read_text()[-1500:]}" for log in sorted(self.folder.glob("log-*")))

    def leave(self, host: str) -> None:
        """Kill a host: agent and worker, without a word."""
        agent = self.running.pop(host)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True).stdout
        for pid in [agent.pid, *map(int, children.split())]:
            os.kill(pid, signal.SIGKILL)
        agent.wait()

    def finish(self) -> list[int]:
        """Let the workers end; the agents' exit codes."""
        (self.folder / "stop").touch()
        return [agent.wait(timeout=200) for agent in self.running.values()]

    def close(self) -> None:
        """Kill what still runs."""
        for host in list(self.running):
            if self.running[host].poll() is None:
                self.leave(host)
