"""The control plane of a switch that can only add: who may join what it was programmed for."""

from typing import Any

import pytest
from switchml_peer import Peer, met

from trainkit.switchml import FixedSwitch, Preconfigured
from trainkit.switchml._membership import Membership

HOSTS = ("10.0.0.1", "10.0.0.2")


class _Plane:
    def __init__(self) -> None:
        self.installed: list[tuple[Membership, Any]] = []
        self.moved: list[Any] = []

    def install(self, member: Membership, addresses: Any) -> None:
        self.installed.append((member, addresses))

    def remove(self, session: int) -> None:
        pass

    def move(self, member: Membership, addresses: Any) -> None:
        self.moved.append(addresses)

    def mismatched(self, session: int) -> int:
        return 0

    def unfinished(self, session: int) -> int:
        return 0b10


def _switch(plane: _Plane, token: bytes = b"") -> FixedSwitch:
    return FixedSwitch(plane, {"a": Preconfigured(7, HOSTS, slots=64, elements=64)}, token)


def _peer(rank: int, token: bytes = b"", **changes: Any) -> Peer:
    asked = {"session": "a", "elements": 256, "slots": 20, "profile": "core", **changes}
    return Peer(rank, asked.pop("world", 2), token, **asked)


PLACES: list[Any] = [(host, 4000) for host in HOSTS]


@pytest.mark.parametrize("token", [b"", b"0123456789abcdef"])
def test_a_session_begins_as_it_was_set_up(token: bytes) -> None:
    plane = _Plane()
    switch = _switch(plane, token)
    peers = [_peer(rank, token) for rank in range(2)]
    met(switch, peers, PLACES)
    # 20 slots asked for, hardware counts in powers of two; its elements, though workers could take more
    offers = [peer.offer or {} for peer in peers]
    assert [(o["session"], o["slots"], o["elements"]) for o in offers] == [(7, 16, 64)] * 2
    ((member, addresses),) = plane.installed
    assert list(addresses) == PLACES
    assert member.key == b""  # the token guards the join; data of profile `core` have no tag
    ((_, pong),) = switch.receive(peers[0].ping(), PLACES[0], 1.0)
    assert (peers[0].take(pong) or {})["missing"] == [1]
    assert switch.table(1.0)[0]["session"] == "a"


@pytest.mark.parametrize(
    ("changes", "host", "why"),
    [
        ({"session": "b"}, HOSTS[0], "session 'b' is not one of a"),
        ({"profile": "full"}, HOSTS[0], "adds in hardware"),
        ({"world": 1}, HOSTS[0], "deployed for 2 workers"),
        ({}, HOSTS[1], "deployed for host 10.0.0.1, this one is 10.0.0.2"),
    ],
)
def test_what_was_not_set_up_is_refused(changes: dict[str, object], host: str, why: str) -> None:
    peer = _peer(0, **changes)
    heard = met(_switch(_Plane()), [peer], [(host, 4000)])[0]
    assert [one["op"] for one in heard[:2]] == ["retry", "refused"] and why in heard[1]["why"]


def test_one_job_at_a_time_has_the_session() -> None:
    switch = _switch(_Plane())
    met(switch, [_peer(rank, job="one") for rank in range(2)], PLACES)
    other = [_peer(rank, job="two") for rank in range(2)]
    assert "belongs to another job" in met(switch, other, PLACES, now=2.0)[0][1]["why"]
    met(switch, other, PLACES, now=20.0)  # of the first nothing has been heard for long
    assert all(peer.began for peer in other)


def test_a_worker_that_comes_from_another_port_is_followed_and_one_from_another_host_is_not() -> None:
    plane = _Plane()
    switch = _switch(plane)
    peers = [_peer(rank) for rank in range(2)]
    met(switch, peers, PLACES)
    assert switch.receive(peers[0].ping(), ("10.9.9.9", 4000), 2.0) == []
    moved = (HOSTS[0], 4999)
    ping = peers[0].ping()
    ((address, answer),) = switch.receive(ping, moved, 2.0)
    assert address == moved and len(answer) <= 3 * len(ping)
    cookie = (peers[0].take(answer) or {})["cookie"]
    assert switch.receive(peers[0].within({"op": "move", "cookie": cookie}), (HOSTS[0], 5000), 2.0) == []
    assert not plane.moved
    switch.receive(peers[0].within({"op": "move", "cookie": cookie}), moved, 2.0)
    assert plane.moved == [(moved, PLACES[1])]


def test_what_is_no_control_message_is_not_answered() -> None:
    switch = _switch(_Plane(), b"0123456789abcdef")
    assert switch.receive(b"\xb1\x01", PLACES[0], 1.0) == []
    assert switch.receive(_peer(0).join(), PLACES[0], 1.0) == []  # without the token's tag
