"""Joining, sessions side by side, refusals, and forged packets against a live switch."""

import pickle
import random
import socket
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from switchml_ends import joined, together
from switchml_peer import Peer

from trainkit.cli._switch_metrics import served
from trainkit.switchml import (
    Limits,
    SessionRefused,
    SoftwareSwitch,
    SwitchMLState,
    SwitchUnreachable,
    WorkerMissing,
    _link,
)
from trainkit.switchml import _control as control
from trainkit.switchml import _packet as packet
from trainkit.switchml._session import Sessions
from trainkit.switchml.reference import Switch


def averages(states: list[SwitchMLState], sizes: list[int], seed: int = 0) -> list[list[torch.Tensor]]:
    """What each state gets for buckets of these sizes, checked against the exact average."""
    own = [
        [torch.randn(n, generator=torch.Generator().manual_seed(seed + 97 * r + n)) for n in sizes]
        for r in range(len(states))
    ]

    def work(rank: int) -> list[torch.Tensor]:
        return [future.wait() for future in [states[rank].average(values.clone()) for values in own[rank]]]

    got = together(*(lambda r=r: work(r) for r in range(len(states))))
    for bucket in range(len(sizes)):
        exact = torch.stack([values[bucket].double() for values in own]).mean(0)
        for result in got:
            torch.testing.assert_close(result[bucket].double(), exact, rtol=0, atol=1e-6)
            assert torch.equal(result[bucket], got[0][bucket])
    return got


def closed(states: list[SwitchMLState]) -> None:
    together(*(state.close for state in states))


@pytest.mark.parametrize(("world", "threads"), [(1, 1), (2, 1), (5, 1), (2, 3)])
def test_buckets_of_all_sizes_back_to_back(world: int, threads: int) -> None:
    with SoftwareSwitch(threads=threads) as switch:
        states = joined(switch.address, world, elements=64, slots=4)
        averages(states, [1, 63, 64, 65, 4 * 64 - 1, 4 * 64 + 1, 20_000, 1, 0, 300])
        assert states[0].counters()["buckets"] == 10
        closed(states)


def test_lanes_are_as_many_as_all_ranks_want(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    with SoftwareSwitch(threads=4, token_file=str(token)) as switch:
        states = [
            SwitchMLState(switch.address, rank=r, world_size=2, channels=channels, token_file=str(token), elements=64)
            for r, channels in enumerate((None, 2))
        ]
        averages(states, [64 * 8 * 2, 64 * 8 * 2 - 1, 64 * 100 + 7, 5])
        assert [len(state.link._links) for state in states] == [2, 2]  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="channels"):
            SwitchMLState(switch.address, channels=0)
        closed(states)
    with pytest.raises(ValueError, match="threads"):
        SoftwareSwitch(threads=0)


def test_buckets_are_right_whether_or_not_their_exponents_are_guessed_right() -> None:
    with SoftwareSwitch() as switch:
        states = joined(switch.address, 2, elements=64)
        values = [torch.linspace(-1, 1, 64 * 3), torch.linspace(0, 1, 64 * 3)]
        plain = together(*(lambda s=s: s.average(values[s.rank].clone()).wait() for s in states))[0]
        for far in (1.0, 1.0, 1e6, 1e6, 1e-6, 1.0, float("inf"), 1.0):
            values[1][70] = far
            work = [lambda s=s: [s.average(values[s.rank].clone(), index=4) for _ in range(3)] for s in states]
            got = [[future.wait() for future in futures] for futures in together(*work)]
            assert all(torch.equal(one.view(torch.int32), got[0][0].view(torch.int32)) for one in got[0] + got[1])
            assert torch.equal(got[0][0][:64], plain[:64]) and torch.equal(got[0][0][128:], plain[128:])
            assert bool(torch.isfinite(got[0][0]).all()) == (far != float("inf"))
        closed(states)


def test_session_gathers_anew_before_chunk_numbers_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with SoftwareSwitch() as switch:
        states = joined(switch.address, 2, elements=64, slots=4)
        first = states[0].connect().member.epoch
        monkeypatch.setattr(_link, "_NUMBERS", 100)
        averages(states, [64 * 20, 64 * 20, 1, 64 * 30, 64 * 45])
        assert states[0].connect().member.epoch not in (first, first + 1)
        assert states[0].counters()["buckets"] == 5
        assert states[0].counters()["chunks"] >= 20 + 20 + 1 + 30 + 45
        closed(states)


def test_core_profile_over_the_wire() -> None:
    with SoftwareSwitch() as switch:
        states = joined(switch.address, 3, profile="core", elements=64)
        averages(states, [1, 64, 1000])
        closed(states)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_buckets(dtype: torch.dtype) -> None:
    with SoftwareSwitch() as switch:
        states = joined(switch.address, 2)
        got = together(*(lambda s=s: s.average(torch.full((9,), 1.5 + s.rank, dtype=dtype)).wait() for s in states))
        assert all(torch.equal(result, torch.full((9,), 2.0, dtype=dtype)) for result in got)
        closed(states)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_or_inf_on_one_rank_reaches_all(bad: float) -> None:
    with SoftwareSwitch() as switch:
        states = joined(switch.address, 3)
        values = [torch.ones(100) for _ in states]
        values[1][7] = bad
        got = together(*(lambda s=s: s.average(values[s.rank]).wait() for s in states))
        assert all(not torch.isfinite(result).all() for result in got)
        closed(states)


@pytest.mark.parametrize("wire", ["int16", "int8"])
def test_narrow_wire_gives_back_what_rounding_took(wire: Any) -> None:
    with SoftwareSwitch() as switch:
        states = joined(switch.address, 2, wire=wire)
        values = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
        total = torch.zeros(500)
        for _ in range(50):
            got = together(*(lambda s=s: s.average(values[s.rank].clone()).wait() for s in states))
            assert torch.equal(got[0], got[1])
            total += got[0]
        one_step = {"int16": 2.0**-13, "int8": 2.0**-5}[wire]
        assert (total / 50 - values.mean(0)).abs().max() < values.abs().max() * one_step / 20
        closed(states)


def test_same_session_is_joined_again_beside_what_the_dead_left_behind() -> None:
    with SoftwareSwitch() as switch:
        dead = joined(switch.address, 2)
        averages(dead, [1000])
        # a worker of a run that never came together
        half = SwitchMLState(switch.address, rank=0, world_size=2, timeout_s=0.3)
        with pytest.raises(WorkerMissing, match="rank 1 of 2"):
            half.connect()
        fresh = joined(switch.address, 2)
        averages(fresh, [1000, 10])
        # the first run's workers are told, whatever they do next
        with pytest.raises(RuntimeError, match="no longer knows this epoch"):
            dead[0].average(torch.ones(10)).wait()
        averages(fresh, [1000])
        closed(fresh + dead)


def test_a_rank_that_closed_early_is_named_at_once() -> None:
    with SoftwareSwitch() as switch:
        states = joined(switch.address, 2, timeout_s=50)  # far beyond what a test waits
        together(*(lambda s=s: s.average(torch.ones(10)).wait() for s in states))
        states[1].close()
        with pytest.raises(RuntimeError, match="rank 1 left the session"):
            states[0].average(torch.ones(10)).wait()
        assert isinstance(states[0].error, WorkerMissing) and states[0].error.ranks == (1,)
        states[0].close()


def test_two_sessions_at_once() -> None:
    with SoftwareSwitch() as switch:
        first, second = joined(switch.address, 2, session="a"), joined(switch.address, 3, session="b")
        results = together(lambda: averages(first, [5000] * 5), lambda: averages(second, [7000] * 5, seed=5))
        assert not any(isinstance(result, Exception) for result in results)
        assert {row["session"]: row["world"] for row in switch.sessions()} == {"a": 2, "b": 3}
        closed(first + second)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_metrics_are_prometheus_text() -> None:
    port = _free_port()
    with SoftwareSwitch() as switch, served(switch, ("127.0.0.1", port)):
        states = joined(switch.address, 1, session='a "b"')
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        assert 'switchml_session_workers{session="a \\"b\\"",job=""} 1' in lines
        assert all(line.startswith("# TYPE ") or float(line.rsplit(" ", 1)[1]) >= 0 for line in lines)
        closed(states)


def test_wrong_world_size_wire_or_protocol_is_refused() -> None:
    with SoftwareSwitch(limits=Limits(sessions=1, memory=1 << 20)) as switch:

        def join(**options: Any) -> Any:
            return SwitchMLState(switch.address, **{"timeout_s": 6, **options}).connect()

        results = together(lambda: join(rank=0, world_size=2), lambda: join(rank=1, world_size=3))
        assert any(isinstance(r, SessionRefused) and "world size" in str(r) for r in results)
        results = together(
            lambda: join(rank=0, world_size=2, session="default"), lambda: join(rank=1, world_size=2, wire="int8")
        )
        assert any(isinstance(r, SessionRefused) and "wire" in str(r) for r in results)
        with pytest.raises(SessionRefused, match="bytes of slots"):
            join(rank=0, world_size=1, elements=16000, slots=64)


def test_more_sessions_than_admitted_are_refused() -> None:
    with SoftwareSwitch(limits=Limits(sessions=1)) as switch:
        states = joined(switch.address, 1)
        with pytest.raises(SessionRefused, match="1 sessions already"):
            joined(switch.address, 1, session="other")
        closed(states)


def test_tokens(tmp_path: Path) -> None:
    right, wrong, short = (tmp_path / name for name in ("right", "wrong", "short"))
    for path, text in (
        (right, "0123456789abcdef" * 2 + "\n"),
        (wrong, "another secret of enough length!"),
        (short, "short"),
    ):
        path.write_text(text)
        path.chmod(0o600)
    with SoftwareSwitch("127.0.0.1:0", token_file=str(right)) as switch:
        states = joined(switch.address, 2, token_file=str(right))
        averages(states, [10_000])
        with pytest.raises(SwitchUnreachable, match="same token"):
            joined(switch.address, 1, session="x", token_file=str(wrong), timeout_s=0.5)
        closed(states)
    with pytest.raises(ValueError, match="at least 16"):
        SoftwareSwitch(token_file=str(short))
    with pytest.raises(ValueError, match="openssl rand"):
        SoftwareSwitch(token_file=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="--insecure"):
        SoftwareSwitch("0.0.0.0:0")
    with SoftwareSwitch() as switch, pytest.raises(OSError, match="another port"):
        SoftwareSwitch(switch.address)


def test_forged_replayed_and_broken_packets_change_no_sum(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    with SoftwareSwitch(token_file=str(token)) as switch:
        states = joined(switch.address, 2, token_file=str(token), elements=64, slots=8)
        member = states[0].connect().member
        seeded, stop = random.Random(0), threading.Event()
        host, port = switch.address.split(":")

        def flood() -> int:
            sent = 0
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as attacker:
                while not stop.is_set():
                    chunk = seeded.randrange(3000)
                    fields = packet.Header(
                        packet.MAGIC, seeded.choice([1, 1, 4, 2, 3]), member.session, member.epoch, chunk,
                        packet.slot_field(chunk, member.slots), seeded.randrange(2), 200, 64, 4, 0,
                    )  # fmt: skip
                    forged = packet.encode(fields, seeded.randbytes(256)) + seeded.randbytes(packet.TAG_BYTES)
                    attacker.sendto(
                        forged[: seeded.choice([len(forged), seeded.randrange(len(forged))])], (host, int(port))
                    )
                    attacker.sendto(
                        control.encode({"op": "leave"}, b"", 0, control.Place(member.session, member.epoch, 0)),
                        (host, int(port)),
                    )
                    sent += 2
            return sent

        results = together(flood, lambda: (averages(states, [40_000] * 3), stop.set()))
        stop.set()
        assert not isinstance(results[1], Exception)
        assert switch.counters()["forged"] > 100
        closed(states)


def test_session_table_never_begins_with_a_rank_that_did_not_confirm() -> None:
    table = Sessions(Switch(), b"", 1 << 20)
    killed, alive, restarted = Peer(0, 2), Peer(1, 2), Peer(0, 2)
    places: dict[Peer, Any] = {killed: ("10.0.0.1", 1), alive: ("10.0.0.2", 2), restarted: ("10.0.0.1", 3)}

    def says(peer: Peer, data: bytes, now: float) -> list[str]:
        answers = table.receive(data, places[peer], now)
        assert all(address == places[peer] for address, _ in answers)
        return [str((peer.take(answer) or {}).get("op")) for _, answer in answers]

    assert says(killed, killed.join(), 0.0) == ["retry"] and says(killed, killed.join(), 0.0) == ["wait"]
    assert says(alive, alive.join(), 0.1) == ["retry"] and says(alive, alive.join(), 0.1) == ["offer"]
    assert says(killed, killed.join(), 0.1) == ["offer"]
    assert says(alive, alive.ready(), 0.2) == ["wait"]
    assert says(restarted, restarted.join(), 0.3) == ["retry"] and says(restarted, restarted.join(), 0.3) == ["offer"]
    late = killed.ready()
    assert says(alive, alive.ready(), 0.4) == ["lost"]
    assert says(killed, late, 0.4) == ["lost"]
    alive.offer = None
    assert says(alive, alive.join(), 0.4) == ["offer"] and says(alive, alive.ready(), 0.4) == ["wait"]
    assert says(restarted, restarted.ready(), 0.5) == ["go"] and says(alive, alive.ready(), 0.5) == ["go"]


def test_state_is_pickled_without_its_connection_and_joins_late() -> None:
    with SoftwareSwitch() as switch:
        state = SwitchMLState(switch.address, rank=0, world_size=1)
        state.connect()
        copied = pickle.loads(pickle.dumps(state))
        state.close()
        assert copied.link is None and copied.options == state.options
        assert torch.equal(copied.average(torch.ones(3)).wait(), torch.ones(3))
        copied.close()


@pytest.mark.parametrize(
    "wrong",
    [{"elements": 63}, {"wire": "int4"}, {"slots": 0}, {"timeout_s": 0}, {"fallback": "ring"}, {"session": ""}],
)
def test_arguments_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if wrong != {"session": ""} else "name"):
        SwitchMLState("127.0.0.1:1", **wrong)


def test_switch_that_is_not_there_is_named_within_the_deadline() -> None:
    began = time.monotonic()
    with pytest.raises(SwitchUnreachable, match=r"127\.0\.0\.1:9"):
        SwitchMLState("127.0.0.1:9", rank=0, world_size=2, timeout_s=0.5).connect()
    assert time.monotonic() - began < 30
