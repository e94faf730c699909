"""The probe's protocol over loopback: results, strangers, hosts that die, freeze, or do not come."""

import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from execute_ranks import start

from trainkit.collectives import Topology
from trainkit.collectives._probe import ProbeError, probe_hosts
from trainkit.collectives._probe._agent import Agent
from trainkit.collectives._probe._coordinator import Coordinator
from trainkit.collectives._probe._leader import lead
from trainkit.collectives._probe._result import HostFacts
from trainkit.collectives._probe._rounds import Plan
from trainkit.collectives._probe._streams import receive_rate, send_until
from trainkit.collectives._probe._wire import Channel, Gone, Strangers, accept_channel, number, open_channel, whole

QUICK = {"warm_s": 0.02, "measure_s": 0.04, "join_s": 60.0}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls made at the same time; an exception is a result."""
    results: list[Any] = [None] * len(calls)

    def call(place: int) -> None:
        try:
            results[place] = calls[place]()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=call, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a host hangs"
    return results


def host(port: int, rank: int | None, hosts: int, **options: Any) -> Callable[[], Topology]:
    options = {**QUICK, "timeout_s": 20.0, "rank": rank, "name": f"h{rank}", **options}
    return lambda: probe_hosts(("127.0.0.1", port), hosts, **options)


def test_all_hosts_get_the_same_network_in_rank_order() -> None:
    port, said = free_port(), []
    calls = [host(port, rank, 3, key=b"k" * 16) for rank in (2, 0, 1)]
    calls[1] = host(port, 0, 3, key=b"k" * 16, progress=lambda *one: said.append(one))
    networks = together(*calls)
    assert all(network == networks[0] for network in networks)
    network = networks[0]
    assert network.compute_nodes == ("h0", "h1", "h2")
    assert network.unit == "Mbit/s"
    assert all(rate > 0 for _, _, rate in network.links)
    assert Topology.from_dict(network.to_dict()) == network
    assert set(network.confidence["links"]) == {f"{u}->{v}" for u, v, _ in network.links}
    assert {what for what, _, _ in said} == {"round trips", "all pairs under load", "groups under load"}


def test_hosts_without_a_rank_fill_the_gaps_and_equal_names_are_told_apart() -> None:
    port = free_port()
    first, *others = [host(port, rank, 3, name="same", streams=2) for rank in (0, None, None)]

    def later(call: Callable[[], Topology]) -> Callable[[], Topology]:
        """Who has no rank leads where it has the address, as all have here: not before rank 0 listens."""

        def run() -> Topology:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    return call()
                except ConnectionRefusedError:
                    time.sleep(0.01)

        return run

    networks = together(first, *map(later, others))
    assert all(isinstance(network, Topology) for network in networks), networks
    assert networks[0].compute_nodes == ("same-0", "same-1", "same-2")


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.0\r\n\r\n", struct.pack(">I", 2**31)])
def test_twenty_strangers_delay_nobody(noise: bytes) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", port), backlog=64))
        callers = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(20)]
        for caller in callers:
            caller.sendall(noise)
        coordinator = Coordinator(listener, b"k" * 16, 20.0)
        begun = time.monotonic()
        about = {"devices": {}}
        agents = [
            threading.Thread(
                target=lambda rank=rank: together(
                    lambda: Agent(
                        ("127.0.0.1", port), b"k" * 16, {**about, "name": f"h{rank}", "rank": rank}, 20.0, 20.0
                    ).run()
                )
            )
            for rank in range(2)
        ]
        for agent in agents:
            agent.start()
        coordinator.collect(2, 20.0)
        assert time.monotonic() - begun < 2.0
        assert [member.name for member in coordinator.members] == ["h0", "h1"]
        for member in coordinator.members * 20:
            caller = stack.enter_context(socket.create_connection((member.address, member.port)))
            caller.sendall(noise)
            if not noise:
                caller.shutdown(socket.SHUT_WR)
        facts = [HostFacts(member.name, member.address, 1, {}) for member in coordinator.members]
        network = lead(coordinator, Plan(2, 0.02, 0.05), facts, None, lambda what, done, total: None, False)
        coordinator.finish(network.to_dict())
        for agent in agents:
            agent.join()
        assert network.compute_nodes == ("h0", "h1")
        coordinator.close()


def test_of_too_many_strangers_the_longest_silent_goes() -> None:
    strangers, pairs = Strangers(), [socket.socketpair() for _ in range(257)]
    with contextlib.ExitStack() as stack:
        for ours, theirs in pairs:
            theirs.settimeout(5)
            stack.enter_context(strangers.admitted(ours))
        assert pairs[0][1].recv(1) == b""  # it was shut
        pairs[1][1].settimeout(0.05)
        with pytest.raises(TimeoutError):
            pairs[1][1].recv(1)
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


def test_a_stranger_disturbs_nobody() -> None:
    port = free_port()
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as one:
                    one.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(2000))
                    time.sleep(0.05)
            except OSError:
                time.sleep(0.01)

    stranger = threading.Thread(target=disturb)
    stranger.start()
    try:
        networks = together(*[host(port, rank, 2) for rank in range(2)])
    finally:
        stop.set()
        stranger.join()
    assert isinstance(networks[1], Topology)


def test_another_key_is_refused_and_the_missing_host_is_told() -> None:
    port = free_port()
    right = {"key": b"k" * 16, "timeout_s": 3.0, "join_s": 3.0}
    led, wrong = together(host(port, 0, 2, **right), host(port, 1, 2, **{**right, "key": b"x" * 16}))
    assert "1 of 2 hosts came within 3 s: h0" in str(led)
    assert "did not admit host 'h1'" in str(wrong)


@pytest.mark.parametrize(
    ("ranks", "what"), [((0, 1, 1), "both have rank 1"), ((0, 1, 7), "rank must be from 0 to 2, got 7")]
)
def test_ranks_that_make_no_sense(ranks: tuple[int, ...], what: str) -> None:
    port = free_port()
    said = together(*[host(port, rank, 3, timeout_s=2.0, join_s=2.0) for rank in ranks])
    assert any(what in str(one) for one in said)
    assert all(isinstance(one, ProbeError | ValueError) for one in said)


def _victim(port: int) -> None:
    probe_hosts(("127.0.0.1", port), 3, rank=2, name="victim", warm_s=0.02, measure_s=0.04)


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
def test_a_host_that_dies_or_freezes_is_named_on_every_other(way: signal.Signals) -> None:
    port = free_port()
    victim = start(_victim, port)
    pid = victim.pid
    assert pid is not None

    def strike(what: str, done: int, total: int) -> None:
        if what == "all pairs under load" and done == 3:
            os.kill(pid, way)

    try:
        timeout = 30.0 if way is signal.SIGKILL else 2.0
        said = together(*[host(port, r, 3, timeout_s=timeout, progress=strike if r == 0 else None) for r in range(2)])
    finally:
        victim.kill()
        victim.join()
    for one in said:
        assert isinstance(one, ProbeError)
        assert "host 'victim'" in str(one)


def _dying_leader(port: int) -> None:
    def die(what: str, done: int, total: int) -> None:
        if done == 1:
            os._exit(1)

    probe_hosts(("127.0.0.1", port), 2, rank=0, warm_s=0.02, measure_s=0.04, progress=die)


def test_a_coordinator_that_dies_is_named() -> None:
    port = free_port()
    leader = start(_dying_leader, port)
    (said,) = together(host(port, 1, 2))
    leader.join()
    assert "the coordinator left the probe" in str(said)


def test_a_host_too_many_is_told_so() -> None:
    about = {"name": "first", "devices": {}, "port": 1}
    listener = socket.create_server(("127.0.0.1", 0))
    coordinator = Coordinator(listener, b"", 5.0)
    at = listener.getsockname()
    with socket.create_connection(at) as late, socket.create_connection(at) as first:
        thread = threading.Thread(target=coordinator.collect, args=(1, 5.0))
        thread.start()
        open_channel(first, b"", about, 5.0)
        thread.join()
        channel, _ = open_channel(late, b"", {**about, "name": "late"}, 5.0)
        said = channel.receive(5.0)
        coordinator.close()
    assert said["do"] == "abort"
    assert "host 'late' came after the 1 that this probe is for" in said["reason"]


def test_a_name_that_no_other_host_would_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a host's name is letters, digits and \. : - _, .*, got 'my host'"):
        probe_hosts(("127.0.0.1", 1), 2, name="my host")


def test_nobody_there_is_an_error_with_the_address() -> None:
    port = free_port()
    (said,) = together(host(port, 1, 2, join_s=0.5, timeout_s=0.5))
    assert f"127.0.0.1:{port} could not be reached" in str(said)


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


@pytest.mark.parametrize(
    ("sent", "what"),
    [
        (struct.pack(">I", 1 << 30), "1073741824 bytes was announced"),
        (struct.pack(">I", 4) + b"{{{{", "makes no sense"),
        (struct.pack(">I", 4000) + b"[" * 4000, "makes no sense: JSON that is nested too deep"),
        (struct.pack(">I", 2) + b"[]", "must be an object, got list"),
        (b"\0\0", "nothing came in time"),
        (None, "the connection was closed"),
    ],
)
def test_what_is_no_message(sent: bytes | None, what: str) -> None:
    one, other = pair()
    with one, other:
        if sent is None:
            one.close()
        else:
            one.sendall(sent)
        with pytest.raises(Gone, match=what):
            Channel(other).receive(0.3)


def test_a_send_in_another_thread_does_not_cut_a_receive_short() -> None:
    class Hurried(socket.socket):
        """A socket whose timeout somebody else sets."""

        def settimeout(self, value: float | None) -> None:
            super().settimeout(0.02)

    one, other = pair()
    with one, Hurried(fileno=other.detach()) as hurried:
        (said, _) = together(
            lambda: Channel(hurried).receive(5.0),
            lambda: (time.sleep(0.1), Channel(one).send({"late": True}, 5.0)),
        )
    assert said == {"late": True}


def test_both_ends_prove_the_key() -> None:
    def meet(key: bytes, other_key: bytes) -> list[Any]:
        one, other = pair()
        with one, other:
            return together(
                lambda: open_channel(one, key, {"name": "a"}, 2.0)[1],
                lambda: accept_channel(other, other_key, {"n": 1}, 2.0)[1],
            )

    opened, accepted = meet(b"same", b"same")
    assert opened == {"n": 1}
    assert accepted["name"] == "a"
    assert all(isinstance(one, Gone) for one in meet(b"same", b"other"))


@pytest.mark.parametrize("value", [None, True, "3", -1, 11, float("nan"), [], 2.5])
def test_numbers_of_messages_are_checked(value: object) -> None:
    with pytest.raises(Gone, match="n must be"):
        whole({"n": value}, "n", 0, 10)
    if value != 2.5:
        with pytest.raises(Gone, match="n must be a number from 0 to 10"):
            number({"n": value}, "n", 0, 10)


def test_a_rate_is_what_the_kernel_counted() -> None:
    one, other = pair()
    now = time.monotonic()
    _, rate = together(lambda: send_until(one, now + 0.4), lambda: receive_rate(other, now + 0.1, now + 0.3))
    assert 1e7 < rate < 1e12
    one, other = pair()
    one.close()
    assert receive_rate(other, time.monotonic(), time.monotonic() + 0.1) == 0.0
