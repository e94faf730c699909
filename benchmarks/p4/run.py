"""bmv2 adding gradients: training through it against the software switch, and packets a second against forwarding.

Needs root, p4c-bm2-ss and simple_switch_grpc on PATH, and the extra p4: `python benchmarks/p4/run.py [--json FILE]`.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "tests" / "support"))

from p4_bmv2 import MACS, OWN_IP, OWN_MAC, Bmv2, HardwareSwitch, free_port, worker_frame  # noqa: E402

from trainkit.switchml import SoftwareSwitch  # noqa: E402
from trainkit.switchml import _packet as packet  # noqa: E402
from trainkit.switchml._membership import Membership  # noqa: E402

_TURNS = 10
_EPOCHS = itertools.count(1)
OWN = ".".join(map(str, OWN_IP.to_bytes(4, "big")))


def _ranks(job: dict[str, Any], spaces: list[list[str]]) -> list[dict[str, Any]]:
    """Run both ranks, each under its prefix of words; what they print."""
    command = [sys.executable, str(HERE / "_trainee.py")]
    ranks = [
        subprocess.Popen([*words, *command, str(rank), json.dumps(job)], stdout=subprocess.PIPE, text=True)
        for rank, words in enumerate(spaces)
    ]
    try:
        return [json.loads(rank.communicate(timeout=900)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def through_bmv2(elements: int, steps: int) -> list[dict[str, Any]]:
    """Deploy, serve and train, two workers in namespaces, all by the command line's own verbs."""
    tag = f"tkd{os.getpid() % 10000}"
    address = OWN.rsplit(".", 1)[0]
    with contextlib.ExitStack() as stack:
        bmv2 = stack.enter_context(Bmv2(2, "tkd"))
        for port in (1, 2):
            bmv2.into_namespace(port, f"{tag}n{port}", f"{address}.{port}")
        workers = [
            {"name": f"w{p}", "mac": (MACS + p).to_bytes(6, "big").hex(":"), "ip": f"{address}.{p}", "port": p}
            for p in (1, 2)
        ]
        lab = {
            "switch": {"ip": OWN, "mac": OWN_MAC.to_bytes(6, "big").hex(":")},
            "workers": workers,
            "sessions": [{"name": "default", "workers": ["w1", "w2"], "slots": 16, "elements": elements}],
        }
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "workers.yaml"
        path.write_text(yaml.safe_dump(lab))
        verb = [sys.executable, "-m", "trainkit", "p4"]
        deployed = subprocess.run([*verb, "deploy", str(path), "--grpc", bmv2.grpc], capture_output=True, text=True)
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        print(deployed.stdout.splitlines()[-1], file=sys.stderr)
        serve = subprocess.Popen([*verb, "serve", str(path), "--grpc", bmv2.grpc], stdout=subprocess.PIPE, text=True)
        try:
            assert serve.stdout is not None and "serving" in serve.stdout.readline()
            job = {"switch": f"{OWN}:{packet.DEFAULT_PORT}", "meet": f"tcp://{address}.1:29500"}
            spaces = [["ip", "netns", "exec", f"{tag}n{port}", "env", "GLOO_SOCKET_IFNAME=eth0"] for port in (1, 2)]
            return _ranks({**job, "steps": steps, "elements": elements}, spaces)
        finally:
            serve.send_signal(signal.SIGTERM)
            serve.wait(20)


def through_software(elements: int, steps: int) -> list[dict[str, Any]]:
    """The same training through the software switch, on loopback."""
    with SoftwareSwitch() as switch:
        job = {"switch": switch.address, "meet": f"tcp://127.0.0.1:{free_port()}"}
        return _ranks({**job, "steps": steps, "elements": elements}, [[], []])


def rates(elements: int, window: int, seconds: float) -> dict[str, float]:
    """Packets a second, one worker with `window` in flight: results of the switch, and frames merely forwarded.

    Measured in turns, the best of each: on a machine that others use, too, that is the least disturbed.
    """
    epoch = next(_EPOCHS)  # whatever an earlier measurement left in the slots is another epoch's
    member = Membership(0, epoch, 1, slots=64, elements=elements, profile="core")
    address = ("10.77.0.1", 4000)
    switch = HardwareSwitch()
    switch.install(member, (address,))
    values = struct.pack(f">{elements}i", *range(elements))

    def data(chunk: int) -> bytes:
        slot = packet.slot_field(chunk, member.slots)
        header = packet.Header(packet.MAGIC, packet.Kind.DATA, 0, epoch, chunk, slot, 0, 0, elements, 4, 0)
        return worker_frame(1, address, packet.encode(header, values))

    size = len(data(0))
    # from the other port to the worker's: the same bytes, only forwarded
    plain = ((MACS + 1).to_bytes(6, "big") + (MACS + 2).to_bytes(6, "big") + b"\x88\xb6").ljust(size, b"\0")
    ends = switch.wires.sockets
    added = forwarded = 0.0
    numbers = itertools.count()
    for _ in range(_TURNS):
        added = max(added, _rate(ends[1], ends[1], lambda: data(next(numbers)), window, seconds / _TURNS))
        forwarded = max(forwarded, _rate(ends[2], ends[1], lambda: plain, window, seconds / _TURNS))
    return {"added": added, "forwarded": forwarded}


def _rate(out: socket.socket, back: socket.socket, frame: Any, window: int, seconds: float) -> float:
    """Packets a second that come back, `window` on their way; what is lost is sent anew after 20 ms."""
    out.setblocking(True)
    back.settimeout(0.02)
    sent = heard = lost = 0
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        while sent - heard - lost < window:
            out.send(frame())
            sent += 1
        try:
            _, where = back.recvfrom(2048)
            heard += where[2] != socket.PACKET_OUTGOING
        except TimeoutError:
            lost = sent - heard
    return heard / (time.monotonic() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--training", type=int, nargs="*", default=[64, 256], help="packet sizes to train with")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"training": [], "rates": []}
    for elements in arguments.training:
        hardware, software = (run(elements, arguments.steps) for run in (through_bmv2, through_software))
        digests = {rank["digest"] for rank in (*hardware, *software)}
        packets = sum(rank["sent_packets"] + rank["received_packets"] for rank in hardware)
        row = {
            "elements": elements,
            "same_bits": len(digests) == 1,
            "bmv2_s": hardware[0]["seconds"],
            "software_s": software[0]["seconds"],
            "packets_s": packets / hardware[0]["seconds"],
            "repeats": sum(rank["retransmissions"] for rank in hardware),
        }
        report["training"].append(row)
        print(row, flush=True)
    with Bmv2(2, "tkr") as bmv2:
        HardwareSwitch.plug_in(bmv2)
        for elements in (64, 256):
            for window in (1, 8, 32):
                rate = rates(elements, window, arguments.seconds)
                row = {"elements": elements, "window": window, **rate, "ratio": rate["added"] / rate["forwarded"]}
                report["rates"].append(row)
                print(row, flush=True)
        HardwareSwitch.unplug()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
