"""What strangers cost a switch: `python benchmarks/switchml/strangers.py [seconds]`, one JSON object a measurement.

1. Resident memory of a switch's process, and of a worker's, over 1000 sessions that are joined, used and left.
2. Resident memory of the switch over `seconds` of forged joins from ports that change, of loopback addresses that change.
3. A job's joins a second: alone, beside a flood from one port, and beside one whose port changes with every packet.
"""

import argparse
import contextlib
import json
import multiprocessing as mp
import secrets
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from trainkit.switchml import SwitchMLState
from trainkit.switchml import _control as control

_SESSIONS = 1000
_WARM = 100
"""Sessions before the first look: by then every pool of the allocator has been filled once."""
_JOINS = 60


def resident(process: int) -> float:
    """MB of a process that are in memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


@contextlib.contextmanager
def switch() -> Iterator[tuple[int, str]]:
    """A switch in a process of its own; the process and its address."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "trainkit",
        "switch",
        "--listen",
        "127.0.0.1:0",
        "--json",
        "--interval",
        "1000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.pid, json.loads(process.stdout.readline())["address"]
    finally:
        process.terminate()
        process.communicate()


def joined(address: str, name: str) -> None:
    """One session of one worker: joined, one bucket, left."""
    state = SwitchMLState(address, rank=0, world_size=1, session=name, elements=256, timeout_s=60)
    state.average(torch.ones(1000)).wait()
    state.close()


def forge(address: str, ports: int, seconds: float) -> None:
    """Send joins that nobody will confirm, as fast as one process can, from `ports` sockets in turn."""
    host, port = address.split(":")
    ends = []
    for number in range(ports):
        end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        end.bind((f"127.0.{number // 250}.{number % 250 + 2}" if ports > 1 else "127.0.0.1", 0))
        end.setblocking(False)
        end.connect((host, int(port)))
        ends.append(end)
    asked = {
        "op": "join", "v": control.PROTOCOL, "job": "", "rank": 0, "world": 2, "elements": 64, "slots": 4, "wire": "int32",
        "profile": "full", "channels": 1,
    }  # fmt: skip
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for end in ends:
            fresh = {**asked, "session": secrets.token_hex(8), "nonce": secrets.token_hex(16), "cookie": ""}
            for _ in range(2):  # the second with the cookie that the first has drawn, where it has come
                with contextlib.suppress(OSError):
                    end.send(control.encode(fresh, b""))
                with contextlib.suppress(OSError):
                    told = control.decode(end.recv(4096), b"") or {}
                    if told.get("op") == "retry":
                        fresh |= {"nonce": told["nonce"], "cookie": told["cookie"]}


def joins_a_second(address: str) -> float:
    """Of a job that does nothing else."""
    began = time.monotonic()
    for number in range(_JOINS):
        joined(address, f"real{number}")
    return _JOINS / (time.monotonic() - began)


def main(seconds: float) -> None:
    """Measure and print."""
    with switch() as (process, address):
        for number in range(_WARM):
            joined(address, f"s{number}")
        before = resident(process), resident(mp.current_process().pid or 0)
        for number in range(_WARM, _WARM + _SESSIONS):
            joined(address, f"s{number}")
        after = resident(process), resident(mp.current_process().pid or 0)
        grown = {
            end: round(late - early, 2) for end, early, late in zip(("switch", "worker"), before, after, strict=True)
        }
        print(json.dumps({"sessions": _SESSIONS, "grown_MB": grown}), flush=True)
    with switch() as (process, address):
        flood = mp.Process(target=forge, args=(address, 200, seconds))
        flood.start()
        time.sleep(min(10.0, seconds / 4))
        sizes = [resident(process)]
        while flood.is_alive():
            flood.join(5.0)
            sizes.append(resident(process))
        print(
            json.dumps({"forged_s": seconds, "MB": {"first": sizes[0], "most": max(sizes), "last": sizes[-1]}}),
            flush=True,
        )
    rates: dict[str, list[float]] = {"alone": [], "one port": [], "200 addresses": []}
    for _ in range(3):
        for name, ports in (("alone", 0), ("one port", 1), ("200 addresses", 200)):
            with switch() as (_, address):
                flood = mp.Process(target=forge, args=(address, ports, 3600.0))
                if ports:
                    flood.start()
                    time.sleep(0.5)
                rates[name].append(joins_a_second(address))
                if ports:
                    flood.kill()
                    flood.join()
    print(
        json.dumps(
            {"joins_a_second": {name: round(statistics.median(of), 1) for name, of in rates.items()}, "all": rates}
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What strangers cost a switch.")
    parser.add_argument("seconds", nargs="?", type=float, default=600.0, help="of forged joins; 600 by default")
    mp.set_start_method("spawn")
    main(parser.parse_args().seconds)
