"""Run in the switch's namespace by test_switchml_kernel.py: packet vectors through the program in the kernel.

argv: vectors as JSON, namespaces of the workers, interfaces towards them. Worker r has the address 10.77.0.(r + 1).
"""

import ctypes
import json
import os
import socket
import sys
import time
from typing import Any

from trainkit.switchml import _control as control
from trainkit.switchml._kernel import KernelPlane
from trainkit.switchml._membership import Membership

_HOST, _PORT = "10.77.0.254", 48864


def socket_in(namespace: str) -> socket.socket:
    """A UDP socket of another network namespace."""
    home, other = os.open("/proc/self/ns/net", os.O_RDONLY), os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    enter = ctypes.CDLL(None).setns
    enter(other, 0)
    endpoint = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    enter(home, 0)
    return endpoint


def heard(sockets: list[socket.socket], wanted: int) -> list[dict[str, Any]]:
    """What arrives at the sockets: `wanted` packets, and what else comes in a moment."""
    got: list[dict[str, Any]] = []
    began = time.monotonic()
    while (waited := time.monotonic() - began) < 0.05 or (len(got) < wanted and waited < 5.0):
        for rank, endpoint in enumerate(sockets):
            try:
                got.append({"to": rank, "packet": endpoint.recv(2000).hex()})
            except BlockingIOError:
                continue
        time.sleep(0.002)
    return sorted(got, key=lambda answer: int(answer["to"]))


def main(vectors: list[dict[str, Any]], namespaces: list[str], interfaces: list[str]) -> None:
    """Play all scenarios; prints the number of steps whose answers were as written."""
    ours = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    ours.bind((_HOST, _PORT))
    plane = KernelPlane(interfaces, (_HOST, _PORT))
    steps = 0
    try:
        for scenario in vectors:
            member = Membership(**{**scenario["member"], "key": b""})
            sockets = [socket_in(namespace) for namespace in namespaces[: member.world]]
            for endpoint in sockets:
                endpoint.connect((_HOST, _PORT))
                endpoint.setblocking(False)
                endpoint.send(control.encode({"op": "here"}, b""))  # so that the switch learns the way
                ours.recv(2000)
            plane.install(member, tuple(endpoint.getsockname() for endpoint in sockets))
            for number, step in enumerate(scenario["steps"]):
                sockets[step["from"]].send(bytes.fromhex(step["packet"]))
                got = heard(sockets, len(step["answers"]))
                wanted = sorted(step["answers"], key=lambda answer: int(answer["to"]))
                if got != wanted:
                    raise SystemExit(f"{scenario['name']}, step {number}: {got} for {wanted}; {plane.counters()}")
                steps += 1
            plane.remove(member.session)
        print(json.dumps({"steps": steps, "counters": plane.counters()}))
    finally:
        plane.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(","))
