"""Both cores against a seeded adversary that drops, duplicates, reorders, delays, crashes and restarts.

The published algorithm, which does not look at the chunk of a packet, is driven by the same adversary and must fail.
"""

from typing import Any

import pytest
from switchml_adversary import Adversary, PublishedSwitch, schedule
from switchml_failover import failover

from trainkit.switchml import _native
from trainkit.switchml import _packet as packet
from trainkit.switchml._ledger import Ledger
from trainkit.switchml._membership import Membership
from trainkit.switchml._packet import Kind
from trainkit.switchml.reference import Switch


@pytest.mark.parametrize("core", ["python", "native"])
def test_sums_are_exact_under_the_adversary(core: str) -> None:
    for seed in range(2000 if core == "native" else 300):
        try:
            schedule(core, seed)
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error


@pytest.mark.parametrize("wire", ["int16", "int8"])
@pytest.mark.parametrize("core", ["python", "native"])
def test_narrow_wires_are_exact_under_the_adversary(core: str, wire: str) -> None:
    for seed in range(100):
        schedule(core, seed, wire)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("core", ["native", "python"])
def test_sums_are_exact_in_a_hundred_thousand_schedules(core: str) -> None:
    for seed in range(10_000, 60_000):
        schedule(core, seed)


def test_published_algorithm_fails_under_the_same_adversary() -> None:
    wild = Adversary(drop=0.02, duplicate=0.1, late=0.1)
    wrong = 0
    for seed in range(60):
        try:
            schedule("published", seed, profile="core", adversary=wild)
        except (AssertionError, ValueError):
            wrong += 1
    assert wrong >= 5
    for seed in range(60):  # and ours passes the very same schedules
        schedule("native", seed, profile="core", adversary=wild)


def test_published_algorithm_adds_a_late_duplicate_into_a_later_chunk() -> None:
    member = Membership(session=0, epoch=0, world=2, slots=1, elements=1, profile="core")

    def sent(worker: int, chunk: int, value: int) -> bytes:
        slot = packet.slot_field(chunk, 1)
        header = packet.Header(packet.MAGIC, Kind.DATA, 0, 0, chunk, slot, worker, 0, 1, 4, 0)
        return packet.encode(header, value.to_bytes(4, "big"))

    def sums(switch: Any) -> list[int]:
        switch.install(member, (("10.0.0.0", 1), ("10.0.0.1", 1)))
        late = sent(0, 0, 1)
        stream = [late, sent(1, 0, 10), sent(0, 1, 2), late, sent(1, 1, 20), sent(0, 2, 3), sent(1, 2, 30)]
        answers = [switch.receive(data, (f"10.0.0.{data[14]}", 1)) for data in stream]
        return [int.from_bytes(answer[0][1][20:24], "big") for answer in answers if len(answer) == 2]

    assert sums(PublishedSwitch()) == [11, 20, 42]
    assert sums(Switch()) == [11, 22, 33]
    assert sums(_native.Switch()) == [11, 22, 33]


@pytest.mark.parametrize("core", ["python", "native"])
def test_sums_are_exact_through_fall_backs_and_returns(core: str) -> None:
    returns = 0
    for seed in range(1000):
        try:
            returns += failover(core, seed)
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
    assert returns > 1500


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("core", ["native", "python"])
def test_sums_are_exact_through_fall_backs_and_returns_in_a_hundred_thousand_schedules(core: str) -> None:
    for seed in range(10_000, 60_000):
        failover(core, seed)


def test_a_return_without_roll_back_is_found_by_the_same_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward_all(self: Ledger, path: Any) -> None:  # as it was: from memory that the failed session may have written
        self._turn = 0
        for number in sorted(self.open):
            self.forward(self.open[number], path)

    monkeypatch.setattr(Ledger, "forward_all", forward_all)
    wrong = 0
    for seed in range(200):
        try:
            failover("native", seed)
        except AssertionError:
            wrong += 1
    assert wrong >= 5
