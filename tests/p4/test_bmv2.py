"""The v1model program on bmv2: byte for byte what the software switch answers, under the same vectors and adversary."""

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("p4runtime_sh", reason="needs the extra p4")

import switchml_adversary as adversary
from p4_bmv2 import MACS, OWN_IP, OWN_MAC, Bmv2, HardwareSwitch, worker_frame
from paths import DATA

from trainkit.p4._frames import arp_request
from trainkit.switchml import _native
from trainkit.switchml import _packet as packet
from trainkit.switchml._membership import Membership
from trainkit.switchml.reference import Switch

pytestmark = [pytest.mark.p4, pytest.mark.netns]

VECTORS = [
    scenario
    for scenario in json.loads((DATA / "switchml_vectors.json").read_text())
    if scenario["member"]["profile"] == "core"
]
WORKERS = 5


@pytest.fixture(scope="module", autouse=True)
def plugged_in() -> Iterator[None]:
    with Bmv2(WORKERS + 1) as bmv2:
        HardwareSwitch.plug_in(bmv2)
        yield
        HardwareSwitch.unplug()


def data_packet(member: Membership, worker: int, chunk: int, values: list[int], exponent: int = 0) -> bytes:
    slot = packet.slot_field(chunk, member.slots)
    header = packet.Header(
        packet.MAGIC, packet.Kind.DATA, member.session, member.epoch, chunk, slot, worker, exponent, len(values), 4, 0
    )
    return packet.encode(header, struct.pack(f">{len(values)}i", *values))


@pytest.mark.parametrize("scenario", VECTORS, ids=lambda scenario: scenario["name"])
def test_switch_answers_as_the_vectors_say(scenario: dict[str, Any]) -> None:
    member = Membership(**{**scenario["member"], "key": b""})
    switch = HardwareSwitch()
    addresses = tuple((f"10.77.0.{rank + 1}", 4000) for rank in range(member.world))
    switch.install(member, addresses)
    for step in scenario["steps"]:
        answers = switch.receive(bytes.fromhex(step["packet"]), addresses[step["from"]])
        got = [{"to": addresses.index(address), "packet": answer.hex()} for address, answer in answers]
        assert got == step["answers"]


@pytest.mark.parametrize("elements", [64, 256])
def test_switch_answers_as_the_software_switch_does(elements: int) -> None:
    """Random chunks, duplicates, stale and foreign packets, broken ones; sums that wrap."""
    seeded = random.Random(elements)
    member = Membership(2, 0xFFFFFFFE, 3, slots=4, elements=elements, profile="core")
    addresses = tuple((f"10.77.0.{rank + 1}", 4000 + rank) for rank in range(3))
    switch, oracle = HardwareSwitch(), Switch()
    for one in (switch, oracle):
        one.install(member, addresses)
    sent: list[tuple[bytes, int]] = []
    position = [0, 0, 0]
    for _ in range(400):
        rank = seeded.randrange(3)
        if sent and seeded.random() < 0.3:
            data, rank = seeded.choice(sent[-30:])
        elif position[rank] <= min(position) + member.slots - 1:
            chunk = position[rank]
            position[rank] += 1
            size = 0 if chunk % 3 == 1 else elements
            values = [seeded.randrange(-(2**31), 2**31) for _ in range(size)]
            data = data_packet(member, rank, chunk, values, seeded.randrange(256))
            sent.append((data, rank))
        else:
            continue
        if seeded.random() < 0.15:
            broken = bytearray(data)
            broken[seeded.randrange(20)] ^= 1 << seeded.randrange(8)
            # kind CONTROL is the control plane's: the software switch's state machine never sees it
            data = bytes(broken) if broken[1] != packet.Kind.CONTROL else data[:-1]
        assert switch.receive(data, addresses[rank]) == oracle.receive(data, addresses[rank])


def test_a_worker_at_another_port_or_address_changes_nothing() -> None:
    member = Membership(0, 5, 2, slots=1, elements=64, profile="core")
    addresses = (("10.77.0.1", 4000), ("10.77.0.2", 4000))
    switch = HardwareSwitch()
    switch.install(member, addresses)
    forged = data_packet(member, 1, 0, [1000] * 64)
    assert switch.receive(data_packet(member, 0, 0, [1] * 64), addresses[0]) == []
    assert switch.receive(forged, addresses[0]) == []
    assert switch.receive(forged, ("10.77.0.2", 4001)) == []
    # the right addresses, from another wire
    heard = switch.wires.exchange(1, worker_frame(1, addresses[1], forged), [1, 2])
    assert heard == {1: [], 2: []}
    # cut short, and longer than it says
    good = data_packet(member, 1, 0, [2] * 64)
    for frame in (
        worker_frame(2, addresses[1], good)[:-5],
        worker_frame(2, addresses[1], good[:-8], total=28 + len(good)),
    ):
        assert switch.wires.exchange(2, frame, [1, 2]) == {1: [], 2: []}
    answers = switch.receive(good, addresses[1])
    assert [struct.unpack(">64i", answer[20:]) for _, answer in answers] == [(3,) * 64] * 2


def test_two_sessions_do_not_meet() -> None:
    switch = HardwareSwitch()
    members = [Membership(number, 9, 2, slots=2, elements=64, profile="core") for number in range(2)]
    addresses = (("10.77.0.1", 4000), ("10.77.0.2", 4000))
    for member in members:
        switch.install(member, addresses)
    for rank, answers in ((0, 0), (1, 2)):
        for number, member in enumerate(members):
            got = switch.receive(data_packet(member, rank, 0, [10**number] * 64), addresses[rank])
            assert len(got) == answers
            assert all(struct.unpack_from(">i", answer, 20) == (2 * 10**number,) for _, answer in got)


def test_everything_else_is_forwarded() -> None:
    switch = HardwareSwitch()
    member = Membership(0, 5, 3, slots=1, elements=64, profile="core")
    switch.install(member, tuple((f"10.77.0.{rank + 1}", 4000) for rank in range(3)))
    everywhere = [1, 2, 3]
    mac = [(MACS + port).to_bytes(6, "big") for port in range(4)]
    frame = mac[2] + mac[1] + b"\x08\x06" + bytes(46)
    assert switch.wires.exchange(1, frame, everywhere) == {1: [], 2: [frame], 3: []}
    unknown = b"\x02\x00\x00\x00\x07\x07" + mac[1] + b"\x86\xdd" + bytes(46)
    assert switch.wires.exchange(1, unknown, everywhere) == {1: [], 2: [unknown], 3: [unknown]}
    heard = switch.wires.exchange(2, arp_request(MACS + 2, 0x0A4D0002, OWN_IP), everywhere)
    assert heard[1] == heard[3] == []
    (answer,) = heard[2]
    assert answer[:14] == mac[2] + OWN_MAC.to_bytes(6, "big") + b"\x08\x06"
    assert answer[20:32] == b"\0\2" + OWN_MAC.to_bytes(6, "big") + OWN_IP.to_bytes(4, "big")


def _schedules(seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adversary.CORES, "bmv2", (_native.Worker, HardwareSwitch))
    for seed in seeds:
        try:
            adversary.schedule("bmv2", seed, profile="core", elements=64, slots=1 << seed % 3)
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error


def test_sums_are_exact_under_the_adversary(monkeypatch: pytest.MonkeyPatch) -> None:
    _schedules(range(25), monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sums_are_exact_in_500_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    _schedules(range(500), monkeypatch)
