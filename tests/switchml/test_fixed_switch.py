"""The control plane of a switch that can only add: who may join what it was programmed for."""

from typing import Any

import pytest

from trainkit.switchml import FixedSwitch, Programmed
from trainkit.switchml import _control as control
from trainkit.switchml._membership import Membership

HOSTS = ("10.0.0.1", "10.0.0.2")


class _Plane:
    def __init__(self) -> None:
        self.installed: list[tuple[Membership, Any]] = []

    def install(self, member: Membership, addresses: Any) -> None:
        self.installed.append((member, addresses))

    def remove(self, session: int) -> None:
        pass

    def unfinished(self, session: int) -> int:
        return 0b10


def _join(rank: int, **changes: object) -> control.Message:
    return {
        "op": "join", "v": control.PROTOCOL, "session": "a", "rank": rank, "world": 2, "nonce": str(rank),
        "elements": 256, "slots": 20, "wire": "int32", "profile": "core", **changes,
    }  # fmt: skip


def _said(switch: FixedSwitch, message: control.Message, host: str, key: bytes = b"") -> list[control.Message]:
    answers = switch.receive(control.encode(message, key), (host, 4000), 1.0)
    return [control.decode(answer, key) or {} for _, answer in answers]


def _switch(plane: _Plane, token: bytes = b"") -> FixedSwitch:
    return FixedSwitch(plane, {"a": Programmed(7, HOSTS, slots=64, elements=64)}, token)


@pytest.mark.parametrize("token", [b"", b"0123456789abcdef"])
def test_a_session_begins_as_it_was_programmed(token: bytes) -> None:
    plane, key = _Plane(), control.control_key(token)
    switch = _switch(plane, token)
    for rank, host in enumerate(HOSTS):
        offers = _said(switch, _join(rank), host, key)
    # 20 slots asked for, hardware counts in powers of two; its elements, though workers could take more
    assert [(o["op"], o["session"], o["slots"], o["elements"]) for o in offers] == [("offer", 7, 16, 64)] * 2
    for rank, host in enumerate(HOSTS):
        ready = {"op": "ready", "number": 7, "epoch": offers[0]["epoch"], "rank": rank}
        answers = _said(switch, ready, host, key)
    assert [answer["op"] for answer in answers] == ["go", "go"]
    ((member, addresses),) = plane.installed
    assert addresses == tuple((host, 4000) for host in HOSTS)
    assert member.key == b""  # the token guards the join; data of profile `core` have no tag
    ping = {"op": "ping", "number": 7, "epoch": member.epoch, "rank": 0}
    assert _said(switch, ping, HOSTS[0], key)[0]["missing"] == [1]
    assert switch.table(1.0)[0]["session"] == "a"


@pytest.mark.parametrize(
    ("changes", "host", "why"),
    [
        ({"session": "b"}, HOSTS[0], "session 'b' is not one of a"),
        ({"profile": "full"}, HOSTS[0], "adds in hardware"),
        ({"world": 1}, HOSTS[0], "deployed for 2 workers"),
        ({}, HOSTS[1], "deployed for host 10.0.0.1"),
    ],
)
def test_what_was_not_programmed_is_refused(changes: dict[str, object], host: str, why: str) -> None:
    (answer,) = _said(_switch(_Plane()), _join(0, **changes), host)
    assert answer["op"] == "refused" and why in answer["why"]


def test_what_is_no_control_message_is_not_answered() -> None:
    switch = _switch(_Plane(), b"0123456789abcdef")
    assert switch.receive(b"\xb1\x01", (HOSTS[0], 4000), 1.0) == []
    assert _said(switch, _join(0), HOSTS[0]) == []  # without the token's tag
