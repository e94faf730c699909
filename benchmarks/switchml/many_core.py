"""n workers and a switch in namespaces of one large machine, unshaped: `python benchmarks/switchml/many_core.py [n] [MB]`.

Needs root and pyroute2, not `ip`. For each count of channels and each MTU prints a row: medians and ranges of the goodput,
the multiple of gloo in the same run, and the packets a second that each thread of the switch took in and sent.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _unshared import unshare
from pyroute2 import IPRoute

_HERE = Path(__file__).parent
_SWITCH = "10.77.0.254"
_CASES = ((1, 9000, False), (4, 9000, False), (8, 9000, False), (8, 9000, True), (8, 1500, False))


def _hub() -> int:
    with IPRoute() as route:
        route.link("add", ifname="br0", kind="bridge")
        [bridge] = route.link_lookup(ifname="br0")
        route.link("set", index=bridge, state="up")
        route.addr("add", index=bridge, address=_SWITCH, prefixlen=24)
    return int(bridge)


def _start(rank: int, bridge: int, mtu: int, plan: str) -> "subprocess.Popen[str]":
    end = [str(_HERE / "_end.py"), plan, str(rank)]
    command = [sys.executable, str(_HERE / "_unshared.py"), f"10.77.0.{rank + 1}", str(mtu), *end]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    if process.stdout.readline() != "unshared\n":
        raise RuntimeError(f"worker {rank} has no namespace")
    with IPRoute() as route:
        route.link("add", ifname=f"p{rank}", kind="veth", peer={"ifname": "eth0", "net_ns_pid": process.pid})
        [port] = route.link_lookup(ifname=f"p{rank}")
        route.link("set", index=port, mtu=mtu, master=bridge, state="up")
    process.stdin.write("\n")
    process.stdin.flush()
    return process


def measure(workers: int, nbytes: int, threads: int, mtu: int, token: bool, port: int) -> dict[str, Any]:
    """Run one case; the answer of rank 0."""
    with tempfile.NamedTemporaryFile("w") as secret:
        secret.write("benchmark " * 4)
        secret.flush()
        trust = ["--token-file", secret.name] if token else ["--insecure"]
        listen = ["--listen", f"{_SWITCH}:0", "--threads", str(threads), "--json", "--interval", "1000"]
        switch = subprocess.Popen(
            [sys.executable, "-P", "-m", "trainkit", "switch", *listen, *trust], stdout=subprocess.PIPE, text=True
        )
        processes = [switch]
        try:
            assert switch.stdout is not None
            address = json.loads(switch.stdout.readline())["address"]
            plan = {"workers": workers, "bytes": nbytes, "switch": address, "port": port, "pairs": 5, "slots": 64}
            text = json.dumps({**plan, "token_file": secret.name if token else None})
            ends = [_start(rank, _BRIDGE, mtu, text) for rank in range(workers)]
            processes += ends
            out, _ = ends[0].communicate(timeout=120)
            return dict(json.loads(out.strip().splitlines()[-1]))
        finally:
            for process in processes:
                process.kill()
                process.wait()
            with IPRoute() as route:
                for rank in range(workers):
                    for index in route.link_lookup(ifname=f"p{rank}"):
                        route.link("del", index=index)


def _row(workers: int, nbytes: int, threads: int, mtu: int, token: bool, port: int) -> None:
    answer = measure(workers, nbytes, threads, mtu, token, port)
    cells = []
    for name in ("ours", "gloo"):
        rates = sorted(8e-6 * nbytes / seconds for seconds in answer[name])
        cells.append(f"{statistics.median(rates):.0f} ({rates[0]:.0f} to {rates[-1]:.0f})")
    ratio = statistics.median(answer["gloo"]) / statistics.median(answer["ours"])
    packets = 2 * workers * nbytes / 4 / answer["elements"] / statistics.median(answer["ours"])
    name = f"MTU {mtu}{', tag' if token else ''}"
    sizes = f"{answer['elements']} x {answer['slots']}"
    repeats = int(answer["counters"]["retransmissions"])
    print(
        f"| {name} | {threads} | {cells[0]} | {cells[1]} | {ratio:.2f} | {packets / 1e3:.0f} "
        f"| {packets / threads / 1e3:.0f} | {sizes} | {repeats} |",
        flush=True,
    )


if __name__ == "__main__":
    unshare()
    _BRIDGE = _hub()
    count, size = (int(sys.argv[1]) if len(sys.argv) > 1 else 8), (int(sys.argv[2]) if len(sys.argv) > 2 else 40)
    print(f"n = {count}, {size} MB, {os.cpu_count()} cores\n")
    print(
        "| links | channels | ours, Mbit/s a worker | gloo | ratio | thousand packets/s, switch | a thread "
        "| elements x slots | repeats |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for number, (threads, mtu, token) in enumerate(_CASES):
        try:
            _row(count, size * 1_000_000, threads, mtu, token, 29511 + number)
        except Exception as error:
            print(f"| MTU {mtu}, {threads} channels | failed: {error!r} |", flush=True)
