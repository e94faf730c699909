"""Writes switchml_vectors.json: what a switch answers to each packet, by the Python state machine.

Each scenario names its profile, so that a P4 or XDP switch takes the `core` ones as they stand.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.switchml import _packet as packet
from trainkit.switchml._membership import Membership
from trainkit.switchml._packet import Header, Kind
from trainkit.switchml.reference import Switch

HOSTS = [f"10.77.0.{rank + 1}" for rank in range(3)]


class Scenario:
    """A switch and what was sent to it."""

    def __init__(self, name: str, **member: Any) -> None:
        self.member = Membership(session=3, epoch=0x01020304, world=3, slots=2, **member)
        said = {name: value for name, value in self.member.__dict__.items() if name != "control"}
        self.record: dict[str, Any] = {"name": name, "member": {**said, "key": self.member.key.hex()}}
        self.record["steps"] = []
        self.switch = Switch()
        self.switch.install(self.member, tuple((host, 4000) for host in HOSTS))

    def send(
        self, source: int, chunk: int, values: "list[int] | None" = None, exponent: int = 0, **changed: int
    ) -> None:
        """Worker `source` sends DATA of `chunk`: the first integers of its payload, zeros behind."""
        member = self.member
        integers = np.zeros(member.elements if values is not None else 0, np.int64)
        integers[: len(values or [])] = values or []
        up = packet.UP_BYTES[member.wire]
        fields = Header(
            packet.MAGIC, Kind.DATA, member.session, member.epoch, chunk, packet.slot_field(chunk, member.slots), source,
            exponent, integers.size, up, 0,
        )._replace(**changed)  # fmt: skip
        self.raw(source, packet.encode(fields, integers.astype(f">i{up}").tobytes()))

    def raw(self, worker: int, data: bytes) -> None:
        """Worker `worker` sends these bytes."""
        answers = [
            {"to": HOSTS.index(host), "packet": answer.hex()}
            for (host, _), answer in self.switch.receive(data, (HOSTS[worker], 4000))
        ]
        self.record["steps"].append({"from": worker, "packet": data.hex(), "answers": answers})


def exchange(run: Scenario) -> None:
    """An exponent round, its data, a repeat of each kind, and the stale packet that the published algorithm adds."""
    for worker, exponent in enumerate((120, 127, 3)):
        run.send(worker, 0, exponent=exponent)
    limit = 2 ** (8 * packet.UP_BYTES[run.member.wire] - 1) - 1
    run.send(0, 1, [1, -2, limit], exponent=255)
    run.send(0, 1, [1, -2, limit], exponent=255)  # repeated while unfinished
    run.send(2, 1, [10, -20, limit])
    run.send(1, 1, [100, -100, 3])
    run.send(1, 1, [100, -100, 3])  # repeated when finished
    for worker in range(3):
        run.send(worker, 2, [worker, worker], exponent=1)
    for worker in range(2):
        run.send(worker, 3, [7])
    run.send(0, 0, exponent=120)  # stale: slot 0 is at chunk 2 in the other version
    run.send(0, 4, [5])
    run.send(1, 0, exponent=127)  # stale: this version is at chunk 4
    run.send(2, 3, [7])


def refused(run: Scenario) -> None:
    """Packets that change nothing: each is followed by the proof that nothing changed."""
    run.send(0, 0, [1])
    run.send(0, 0, [9], epoch=0x01020305)
    run.send(0, 0, [9], session=4)
    run.send(2, 0, [9], worker=1)
    run.send(1, 0, [9], slot=1)
    run.send(1, 0, [9], wire=2)
    run.send(1, 0, [9], worker=77)
    run.raw(1, bytes(30))
    run.raw(1, b"\xb1")
    run.send(1, 0, [2])
    run.send(2, 0, [4])


def main() -> None:
    """Write the file beside this one."""
    scenarios = []
    for name, member in {
        "core, 64 elements": {"profile": "core", "elements": 64},
        "full": {"elements": 64},
        "full, int16": {"elements": 64, "wire": "int16"},
        "full, int8": {"elements": 64, "wire": "int8"},
    }.items():
        for steps in (exchange, refused):
            run = Scenario(f"{name}: {steps.__name__}", **member)
            steps(run)
            scenarios.append(run.record)
    path = Path(__file__).with_name("switchml_vectors.json")
    path.write_text(json.dumps(scenarios, indent=1) + "\n")


if __name__ == "__main__":
    main()
