"""The packet table, the fixed point and the tag: Python and native, to the bit."""

import dataclasses
import json
import random
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import DATA

from trainkit.switchml import _control as control
from trainkit.switchml import _native
from trainkit.switchml import _packet as packet
from trainkit.switchml._fixed_point import block_exponents, dequantise, quantise
from trainkit.switchml._membership import Membership
from trainkit.switchml._tag import derived, open_tagged, tagged
from trainkit.switchml.reference import Switch, Worker

VECTORS = json.loads((DATA / "switchml_vectors.json").read_text())
SWITCHES = {"python": Switch, "native": _native.Switch}


def test_header_fields_are_the_table() -> None:
    assert packet.Header._fields == tuple(field.name for field in packet.HEADER)
    assert sum(field.bits for field in packet.HEADER) == 8 * packet.HEADER_BYTES == 160


@pytest.mark.parametrize("core", SWITCHES)
@pytest.mark.parametrize("scenario", VECTORS, ids=lambda scenario: scenario["name"])
def test_switch_answers_as_the_vectors_say(core: str, scenario: dict[str, Any]) -> None:
    member = Membership(**{**scenario["member"], "key": bytes.fromhex(scenario["member"]["key"])})
    switch = SWITCHES[core]()
    addresses = tuple((f"10.77.0.{rank + 1}", 4000) for rank in range(member.world))
    switch.install(member, addresses)
    for step in scenario["steps"]:
        answers = switch.receive(bytes.fromhex(step["packet"]), addresses[step["from"]])
        got = [{"to": addresses.index(address), "packet": answer.hex()} for address, answer in answers]
        assert got == step["answers"]


def test_vectors_hold_the_cases_that_matter() -> None:
    assert {scenario["member"]["profile"] for scenario in VECTORS} == {"core", "full"}
    kinds = {int(a["packet"][2:4], 16) for s in VECTORS for step in s["steps"] for a in step["answers"]}
    assert kinds == {packet.Kind.RESULT, packet.Kind.PROGRESS}


@pytest.mark.parametrize("wire", ["int32", "int16", "int8"])
@pytest.mark.parametrize("world", [1, 2, 3, 31, 32, 64])
def test_average_is_within_the_bound_and_no_sum_overflows(world: int, wire: str) -> None:
    numbers = np.random.default_rng(world)
    for power in (-45, -38, -20, 0, 20, 38):
        values = (numbers.uniform(-1, 1, (world, 100)) * 10.0**power).astype(np.float32)
        values[:, 0] = values.flat[np.abs(values).argmax()]  # all at the largest magnitude
        exponent = max(int(block_exponents(own, 100)[0]) for own in values)
        integers = [quantise(own, exponent, world, wire).astype(np.int64) for own in values]
        total = np.sum(integers, axis=0)
        limit = {"int32": 2**31 - 1, "int16": 2**31 - 1, "int8": 2**15 - 1}[wire]
        assert np.abs(total).max() <= limit
        exact = values.astype(np.float64).mean(axis=0)
        error = np.abs(dequantise(total.astype(np.int32), exponent, world, wire) - exact).max()
        step = {"int32": world * 2.0**-27, "int16": 2.0**-14, "int8": 2.0**-6}[wire]
        assert error <= step * np.abs(values).max() + np.abs(exact).max() * 2.0**-24 + 2.0**-149


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_value_that_is_not_finite_makes_the_chunk_nan(bad: float) -> None:
    values = np.array([1.0, bad, 2.0], np.float32)
    assert block_exponents(values, 3)[0] == packet.NON_FINITE
    assert not quantise(values, packet.NON_FINITE, 2, "int32").any()
    assert np.isnan(dequantise(np.zeros(3, np.int32), packet.NON_FINITE, 2, "int32")).all()


@settings(deadline=None, max_examples=150)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=0, max_size=70),
    world=st.integers(1, 64),
    wire=st.sampled_from(["int32", "int16", "int8"]),
    profile=st.sampled_from(["core", "full"]),
    elements=st.integers(1, 33),
    guess=st.lists(st.integers(0, 255), min_size=1, max_size=4),
)
def test_native_worker_sends_and_stores_what_the_python_one_does(
    bits: list[int], world: int, wire: str, profile: str, elements: int, guess: list[int]
) -> None:
    member = Membership(1, 2, world, world - 1, slots=3, elements=elements, wire=wire, profile=profile)
    ours, oracle = _native.Worker(member), Worker(member)
    values = np.array(bits, np.uint32).view(np.float32)
    outs = [np.full_like(values, 5) for _ in range(2)]
    errors = [np.full_like(values, 5) for _ in range(2)]
    known = [np.resize(np.array(guess, np.uint8), len(block_exponents(values, elements))) for _ in range(2)]
    pending = ours.submit(values, outs[0], 0.0, errors[0], known[0])
    assert pending == oracle.submit(values, outs[1], 0.0, errors[1], known[1])
    down = packet.DOWN_BYTES[wire]
    while pending:  # a network that answers with this worker's own integers
        header, payload = packet.decode(pending.pop(0)) or pytest.fail("malformed")
        sums = np.frombuffer(payload, f">i{header.wire}").astype(f">i{down}").tobytes()
        answer = packet.encode(header._replace(kind=packet.Kind.RESULT, worker=packet.FROM_SWITCH, wire=down), sums)
        sent = ours.receive(answer, 0.1)
        assert sent == oracle.receive(answer, 0.1)
        pending += sent
    assert ours.finished == oracle.finished == 1
    np.testing.assert_array_equal(outs[0].view(np.uint32), outs[1].view(np.uint32))
    np.testing.assert_array_equal(errors[0].view(np.uint32), errors[1].view(np.uint32))
    np.testing.assert_array_equal(known[0], known[1])


def test_right_guess_saves_the_second_round_and_a_wrong_one_costs_it() -> None:
    member = Membership(1, 2, 1, slots=4, elements=8)
    values = np.arange(1, 17, dtype=np.float32)
    for known, rounds in (([0, 0], 2), ([130, 131], 1), ([131, 132], 1), ([127, 140], 2), ([255, 131], 2)):
        for make in (Worker, _native.Worker):
            worker, out = make(member), np.zeros_like(values)
            pending, took = worker.submit(values, out, 0.0, known=np.array(known, np.uint8)), 0
            while worker.finished == 0:
                answers = []
                for data in pending:
                    header, payload = packet.decode(data) or pytest.fail("malformed")
                    answer = header._replace(kind=packet.Kind.RESULT, worker=packet.FROM_SWITCH)
                    answers.append(packet.encode(answer, bytes(payload)))
                pending = [sent for answer in answers for sent in worker.receive(answer, 0.1)]
                took += 1
            assert took == rounds, (known, make)
            np.testing.assert_array_equal(out, values)


@settings(deadline=None, max_examples=400)
@given(
    data=st.binary(max_size=200),
    start=st.sampled_from([b"", b"\xb1", b"\xb1\x01", b"\xb1\x02\0\1\0\0\0\2", b"\xb1\x10"]),
)
def test_no_bytes_break_a_parser(data: bytes, start: bytes) -> None:
    data = start + data
    member = Membership(1, 2, 2, slots=2, elements=8)
    packet.decode(data)
    control.decode(data, b"")
    control.decode(data, b"k" * 32)
    for worker in (Worker(member), _native.Worker(member)):
        assert worker.receive(data, 0.0) == []
    source = ("10.0.0.1", 1)
    for switch in (Switch(), _native.Switch()):
        switch.install(member, (source, ("10.0.0.2", 2)))
        for _, answer in switch.receive(data, source):
            assert len(answer) <= len(data) + packet.HEADER_BYTES + 8


def test_bits_flipped_or_cut_off_change_no_sum() -> None:
    member = Membership(1, 2, 2, slots=1, elements=8, key=bytes(range(32)))
    addresses = (("10.0.0.1", 1), ("10.0.0.2", 2))
    seeded = random.Random(0)
    for make in SWITCHES.values():
        switch = make()
        switch.install(member, addresses)
        workers = [_native.Worker(member.as_worker(rank)) for rank in range(2)]
        values = [np.arange(8, dtype=np.float32) + rank for rank in range(2)]
        outs = [np.empty_like(own) for own in values]
        pending = [(r, data) for r in range(2) for data in workers[r].submit(values[r], outs[r], 0.0)]
        while pending:
            rank, data = pending.pop(0)
            for _ in range(20):
                broken = bytearray(data)
                broken[seeded.randrange(len(data))] ^= 1 << seeded.randrange(8)
                assert switch.receive(bytes(broken), addresses[rank]) == []
                assert switch.receive(data[: seeded.randrange(len(data))], addresses[rank]) == []
            for address, answer in switch.receive(data, addresses[rank]):
                to = addresses.index(address)
                broken = bytearray(answer)
                broken[seeded.randrange(len(answer))] ^= 1 << seeded.randrange(8)
                assert workers[to].receive(bytes(broken), 0.0) == []
                pending += [(to, sent) for sent in workers[to].receive(answer, 0.0)]
        for out in outs:
            np.testing.assert_array_equal(out, np.arange(8) + 0.5)


def test_tag_is_under_a_key_of_one_epoch_alone() -> None:
    said = b"secret", b"salt", b"data", b"agreed"
    keys = {derived(*said)} | {derived(*said[:i], b"other", *said[i + 1 :]) for i in range(4)}
    assert len(keys) == 5
    data = struct.pack(">20s4s", b"\xb1\x01", b"data")
    sealed = tagged(data, keys.pop())
    assert len(sealed) == len(data) + packet.TAG_BYTES and sealed.startswith(data)
    assert open_tagged(sealed, keys.pop()) is None


def test_control_messages_carry_a_tag_with_a_token() -> None:
    key = control.control_key(b"0123456789abcdef")
    sealed = control.encode({"op": "join"}, key)
    assert control.decode(sealed, key) == {"op": "join"}
    assert control.decode(sealed, control.control_key(b"another")) is None
    assert control.decode(control.encode({"op": "join"}, b""), key) is None
    deep = packet.encode(packet.Header(packet.MAGIC, 16, *[0] * 9), b"[" * 1900)
    assert control.decode(deep, b"") is None


def test_membership_outside_the_limits_is_refused() -> None:
    good = Membership(1, 2, 2, slots=2, elements=8)
    for change in ({"world": 65}, {"world": 0}, {"slots": 0}, {"elements": 20000}, {"worker": 2}):
        with pytest.raises(ValueError, match="limits"):
            _native.Worker(dataclasses.replace(good, **change))
