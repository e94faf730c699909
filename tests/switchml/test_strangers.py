"""What strangers send: text that a terminal would act on, questions that draw long answers, joins that fill the room."""

import io
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from switchml_peer import Peer, met, packed

from trainkit.cli import _switch
from trainkit.cli._switch_metrics import text
from trainkit.switchml import (
    KernelSwitch,
    Limits,
    SessionRefused,
    SoftwareSwitch,
    SwitchMLState,
    _kernel_switch,
    _native,
    read_token,
)
from trainkit.switchml import _packet as packet
from trainkit.switchml._membership import Membership
from trainkit.switchml._session import Sessions
from trainkit.switchml.reference import Switch

NAMES = ["job[/1]", "[bold red]x", "\x1b[2J\x1b]0;title\x07", "line\nfeed", "a\u202eb", "[link=file:///etc]x"]
HOSTS: list[Any] = [(f"10.0.0.{rank + 1}", 4000) for rank in range(64)]


@pytest.mark.parametrize("name", NAMES)
def test_a_sessions_name_is_shown_and_does_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    monkeypatch.setattr("rich.live.get_console", lambda: console)
    with SoftwareSwitch() as switch:
        state = SwitchMLState(switch.address, rank=0, world_size=1, session=name, timeout_s=5)
        state.connect()
        stop = threading.Event()
        threading.Timer(0.2, stop.set).start()
        _switch._watch(switch, stop, 0.05)
        metrics = text(switch)
        state.close()
    drawn = out.getvalue()
    assert "last heard" in drawn
    for bad in ("\x1b[2J", "\x1b]0;", "\u202e", "\x1b]8;"):
        assert bad not in drawn and bad not in metrics
    if name.isprintable():
        assert name in drawn  # whole, and taken for no markup
    assert all(
        line.startswith("#") or line.rsplit(" ", 1)[1].replace(".", "").isdigit() for line in metrics.splitlines()
    )


@pytest.mark.parametrize("token", [b"", b"0123456789abcdef"])
def test_nobody_draws_more_than_three_bytes_for_one_before_his_address_is_proven(token: bytes) -> None:
    table = Sessions(Switch(), token, 1 << 24)
    there = [Peer(rank, 64, token) for rank in range(64)]
    met(table, there, HOSTS)
    key = b"" if not token else None
    for peer in there[:3]:
        fresh = Peer(63, 64, token)
        questions = [
            fresh.join(),
            peer.ready(),
            peer.ping(),
            packed(0, 0, 0, {"op": "x"}, key or b""),
            b"\xb1\x10" + bytes(18),
        ]
        questions += [packed(9, 9, 0, {"op": "ping", "n": 2**62, "epoch": "\u20ac" * 2000}, b"k" * 32)]
        questions += [packed(0, 0, 0, {"op": "join", "v": 1, "nonce": "n" * 60}, key or b"")]
        for question in questions:
            answers = table.receive(question, ("10.9.9.9", 9), 1.0)
            assert sum(len(answer) for _, answer in answers) <= 3 * len(question)
            assert {address for address, _ in answers} <= {("10.9.9.9", 9)}
    # proven, a question is answered to who asked, and not to the other 63; a repeated ping is not answered
    again = Peer(63, 64, token)
    for _ in range(20):
        for address, answer in table.receive(again.join(), HOSTS[63], 1.0):
            assert address == HOSTS[63] and len(answer) <= 3 * len(again.join())
            again.take(answer)
    ping = there[0].ping()
    assert [len(table.receive(ping, HOSTS[0], 1.0)) for _ in range(5)] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("make", [Switch, _native.Switch])
def test_a_repeat_is_answered_once_a_round_trip(make: Any) -> None:
    switch, member = make(), Membership(1, 2, 2, slots=2, elements=8)
    switch.install(member, tuple(HOSTS[:2]))

    def sent(rank: int, chunk: int, now: float, kind: int = 1) -> int:
        elements = 8 if kind == 1 else 0
        fields = packet.Header(packet.MAGIC, kind, 1, 2, chunk, packet.slot_field(chunk, 2), rank, 0, elements, 4, 0)
        return sum(len(d) for _, d in switch.receive(packet.encode(fields, bytes(4 * elements)), HOSTS[rank], now))

    for chunk in range(4):
        for rank in range(2):
            sent(rank, chunk, 0.01 * chunk)  # a round trip of 0.02 s
    first = sent(0, 3, 1.0, kind=4)
    assert first == 20 + 32
    assert sum(sent(0, 3, 1.0 + 0.0001 * n, kind=4) for n in range(150)) == 0
    assert sent(0, 3, 1.021, kind=4) == first
    assert sent(1, 3, 1.021, kind=4) == first  # another worker's
    # an unfinished chunk's missing workers are told once, too
    sent(0, 4, 2.0)
    assert sent(0, 4, 2.001, kind=4) == 28 and sent(0, 4, 2.002, kind=4) == 0


def test_one_host_cannot_take_all_sessions() -> None:
    table = Sessions(_native.Switch(), b"", 1 << 24, Limits(sessions=8))
    stranger = ("10.6.6.6", 666)
    begun = 0
    for number in range(3000):
        peer = Peer(0, 1 + number % 2, session=f"f{number}")
        for _ in range(3):
            for _, answer in table.receive(peer.question(), (stranger[0], number), 1.0):
                peer.take(answer)
        begun += peer.began
    assert begun == 2 and len(table._sessions) < 1100
    real = [Peer(rank, 2, session="real") for rank in range(2)]
    met(table, real, HOSTS[:2], now=1.1)
    assert all(peer.began for peer in real)


def test_a_session_that_cannot_begin_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plane:
        """The kernel's part, of which no interface is named for the first worker."""

        def __init__(self, *_: Any) -> None:
            self.installed = 0

        def install(self, member: Membership, _: Any) -> None:
            self.installed += 1
            if self.installed == 1:
                raise ValueError("worker 127.0.0.1 does not reach this switch over its interfaces: name all")

        def counters(self) -> dict[str, int]:
            return {}

        def unfinished(self, _: int) -> int:
            return 0

        mismatched = remove = unfinished

        def close(self) -> None:
            """Nothing is attached."""

    monkeypatch.setattr(_kernel_switch, "KernelPlane", Plane)
    with KernelSwitch("127.0.0.1:0", ["eth9"]) as switch:
        options: dict[str, Any] = {"rank": 0, "world_size": 1, "profile": "core", "elements": 64, "timeout_s": 5}
        with pytest.raises(SessionRefused, match="name all"):
            SwitchMLState(switch.address, **options).connect()
        state = SwitchMLState(switch.address, session="other", **options)
        state.connect()
        assert [row["session"] for row in switch.sessions()] == ["other"]
        state.close()


def test_token_files_that_others_may_read_are_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    for mode in (0o644, 0o604, 0o666, 0o620):
        token.chmod(mode)
        with pytest.raises(ValueError, match=f"chmod 600 {token}"):
            read_token(str(token))
    token.chmod(0o600)
    assert read_token(str(token)) == b"0123456789abcdef"


def test_memory_is_flat_over_sessions_and_forged_joins() -> None:
    table = Sessions(_native.Switch(), b"", 1 << 24)
    sizes = []
    for number in range(1000):
        now = 1.0 + 0.1 * number
        peers = [Peer(rank, 2, session=f"s{number}") for rank in range(2)]
        met(table, peers, HOSTS[:2], now)
        assert all(peer.began for peer in peers)
        for forged in range(10):  # never proven, and proven but alone
            lonely = Peer(0, 2, session=f"x{number}.{forged}")
            for _ in range(1 + forged % 2):
                for _, answer in table.receive(lonely.join(), (f"10.7.{forged}.1", 1), now):
                    lonely.take(answer)
        for rank, peer in enumerate(peers):
            table.receive(peer.within({"op": "leave"}), HOSTS[rank], now)
        if number % 50 == 0:
            table.sweep(now)
        sizes.append(len(table._sessions) + len(table._epochs))
    assert max(sizes) < 600
    table.sweep(1e6)
    assert not table._sessions and not table._epochs


def test_counters_count_every_session_right_and_are_ints() -> None:
    with SoftwareSwitch() as switch:
        states = [SwitchMLState(switch.address, rank=0, world_size=1, session=name, elements=500) for name in "ab"]

        def work(state: SwitchMLState) -> None:
            for _ in range(100):
                state.average(torch.ones(20_000)).wait()

        threads = [threading.Thread(target=work, args=(state,)) for state in states]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ours = [state.counters() for state in states]
        assert all(type(value) is int for one in ours for name, value in one.items() if name != "wait_s")
        theirs = switch.counters()
        assert theirs["sent_packets"] == sum(one["received_packets"] for one in ours)
        assert theirs["sent_bytes"] == sum(one["received_bytes"] for one in ours)
        for state in states:
            state.close()


def test_workers_that_start_before_the_switch_still_find_the_largest_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainkit.switchml import _reach

    monkeypatch.setattr(_reach, "is_loopback", lambda host: False)  # so that the path is probed
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    state = SwitchMLState(f"127.0.0.1:{port}", rank=0, world_size=1, timeout_s=20)
    joins = threading.Thread(target=state.connect)
    joins.start()
    time.sleep(0.5)
    with SoftwareSwitch(f"127.0.0.1:{port}"):
        joins.join()
        assert state.connect().member.elements == (8972 - 20) // 4
        state.close()
