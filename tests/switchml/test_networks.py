"""Networks as they are: several addresses, IPv6, a NAT that forgets, a bridge that loses what offload has joined."""

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from switchml_ends import joined, together

from trainkit.switchml import SoftwareSwitch, SwitchMLState, parse_address

TRAINEE = ROOT / "tests" / "support" / "switchml_trainee.py"
_LONG = "4,128 0 0 0,37 0 1 1600,6 0 0 2,6 0 0 4294967295"
"""Classic BPF: frames of more than 1600 bytes are dropped, others go on."""


def averaged(address: str, **options: Any) -> dict[str, Any]:
    """Two workers average a few buckets; rank 0's counters."""
    states = joined(address, 2, **options)
    for size in (1, 5000, 100_000):
        got = together(*(lambda s=s, n=size: s.average(torch.full((n,), 1.0 + s.rank)).wait() for s in states))
        assert all(torch.equal(one, torch.full((size,), 1.5)) for one in got)
    counters = states[0].counters()
    together(*(state.close for state in states))
    return dict(counters)


@pytest.mark.parametrize(
    ("listen", "asked"),
    [
        ("0.0.0.0", "127.0.0.2"),
        ("0.0.0.0", "127.0.0.1"),
        ("127.0.0.1", "localhost"),
        ("[::1]", "[::1]"),
        ("[::]", "[::1]"),
        ("[::]", "127.0.0.3"),
    ],
)
def test_a_switch_answers_from_the_address_that_was_asked(listen: str, asked: str) -> None:
    with SoftwareSwitch(f"{listen}:0", threads=2, insecure=True) as switch:
        averaged(f"{asked}:{parse_address(switch.address, 'switch')[1]}")


def test_of_a_names_addresses_the_one_that_answers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = socket.getaddrinfo

    def both(host: str, port: int, **how: Any) -> list[Any]:
        names = ("127.0.0.1", "::1") if host == "switch.example" else (host,)
        return [place for name in names for place in found(name, port, **how)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    for listen in ("127.0.0.1", "[::1]"):
        with SoftwareSwitch(f"{listen}:0") as switch:
            averaged(f"switch.example:{parse_address(switch.address, 'switch')[1]}")


def test_an_ipv6_address_goes_in_brackets_and_loopback_needs_no_token() -> None:
    with pytest.raises(ValueError, match=r"in brackets, \[::1\]:48864"):
        SwitchMLState("::1:48864")
    assert parse_address("[fe80::1%eth0]:5", "switch") == ("fe80::1%eth0", 5)
    with pytest.raises(ValueError, match="--insecure"):
        SoftwareSwitch("[::]:0")


class Nat(threading.Thread):
    """Stands between a worker and its switch, and can forget which of its ports the worker had."""

    def __init__(self, switch: str) -> None:
        super().__init__(daemon=True)
        self.switch = parse_address(switch, "switch")
        self.near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.near.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.near.getsockname()[1]}"
        self.forget, self.over = threading.Event(), False
        self.far = self._port()

    def _port(self) -> socket.socket:
        far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        far.connect(self.switch)
        return far

    def run(self) -> None:
        worker: Any = None
        while not self.over:
            if self.forget.is_set():
                self.forget.clear()
                self.far.close()
                self.far = self._port()
            for ready in select.select([self.near, self.far], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    data, source = ready.recvfrom(65535)
                    if ready is self.near:
                        worker = source
                        self.far.send(data)
                    else:
                        self.near.sendto(data, worker)


@pytest.mark.parametrize("profile", ["full", "core"])
def test_a_nat_that_forgets_costs_a_moment(profile: Any, caplog: pytest.LogCaptureFixture) -> None:
    with SoftwareSwitch() as switch:
        nat = Nat(switch.address)
        nat.start()
        places = (nat.address, switch.address)
        options: dict[str, Any] = {"world_size": 2, "timeout_s": 10, "elements": 64, "profile": profile, "channels": 1}
        states = [SwitchMLState(place, rank=rank, **options) for rank, place in enumerate(places)]
        for step in range(20):
            if step in (5, 12):
                nat.forget.set()
            got = together(*(lambda s=s: s.average(torch.full((3000,), 1.0 + s.rank)).wait() for s in states))
            assert all(torch.equal(one, torch.full((3000,), 1.5)) for one in got), got
            time.sleep(0.02)
        together(*(state.close for state in states))
        nat.over = True
        nat.join()
    assert caplog.text.count("now sends from") == 2 and caplog.text.count("a NAT forgot it") >= 2


@contextlib.contextmanager
def bridged(mtu: int, v6: bool = False) -> Iterator[list[str]]:
    """A switch's namespace and two workers' around a bridge; their names."""
    prefix = f"tn{os.getpid() % 10000}"
    names = [f"{prefix}{end}" for end in ("b", "s", "0", "1")]

    def run(command: str) -> None:
        done = subprocess.run(command.split(","), capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def ip(words: str) -> None:
        run(",".join(["ip", *words.split()]))

    try:
        for name in names:
            ip(f"netns add {name}")
            ip(f"-n {name} link set lo up")
        ip(f"-n {names[0]} link add br0 type bridge")
        ip(f"-n {names[0]} link set br0 up")
        for number, name in enumerate(names[1:]):
            ip(f"link add e0 netns {name} type veth peer name p{number} netns {names[0]}")
            ip(f"-n {names[0]} link set p{number} mtu {mtu} master br0 up")
            ip(f"-n {name} link set e0 mtu {mtu} up")
            hosts = [number, number + 10] if number == 0 else [number]  # the switch has two addresses
            for host in hosts:
                ip(
                    f"-n {name} addr add "
                    + (f"fd00::{host + 1}/64 dev e0 nodad" if v6 else f"10.9.0.{host + 1}/24 dev e0")
                )
            subprocess.run(["tc", "-n", names[0], "qdisc", "add", "dev", f"p{number}", "clsact"], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def lose_long_frames(bridge: str) -> None:
    """From now on the bridge drops frames that segmentation offload has joined."""
    for number in range(3):
        words = f"tc -n {bridge} filter add dev p{number} ingress bpf da bytecode".split()
        subprocess.run([*words, _LONG], check=True)


@contextlib.contextmanager
def behind_nat(names: list[str]) -> Iterator[None]:
    """The first worker of `bridged` is moved behind a router that gives its packets the router's own address and ports."""
    worker, router = names[2], f"{names[0]}n"
    words = [
        f"ip netns add {router}",
        f"ip -n {worker} link del e0",
        f"ip link add e0 netns {router} type veth peer name n0 netns {names[0]}",
        f"ip link add e1 netns {router} type veth peer name e0 netns {worker}",
        f"ip -n {names[0]} link set n0 master br0 up",
        f"ip -n {router} link set e0 up",
        f"ip -n {router} link set e1 up",
        f"ip -n {router} addr add 10.9.0.50/24 dev e0",
        f"ip -n {router} addr add 192.168.7.1/24 dev e1",
        f"ip -n {worker} link set e0 up",
        f"ip -n {worker} addr add 192.168.7.2/24 dev e0",
        f"ip -n {worker} route add default via 192.168.7.1",
        f"ip netns exec {router} sysctl -qw net.ipv4.ip_forward=1",
        f"ip netns exec {router} nft add table ip nat",
        f"ip netns exec {router} nft add chain ip nat out {{ type nat hook postrouting priority 100 ; }}",
        f"ip netns exec {router} nft add rule ip nat out oifname e0 masquerade random",
    ]
    try:
        for one in words:
            done = subprocess.run(one.split(), capture_output=True, text=True)
            assert done.returncode == 0, f"{one}: {done.stderr}"
        yield
    finally:
        subprocess.run(["ip", "netns", "del", router], capture_output=True)


def trained(names: list[str], listen: str, asked: str, token: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """20 steps of two workers in their namespaces, through a switch in its own."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}

    def inside(name: str, *words: str) -> "subprocess.Popen[str]":
        command = ["ip", "netns", "exec", name, sys.executable, *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=bare, cwd=token.parent)

    words = [
        "-P",
        "-m",
        "trainkit",
        "switch",
        "--listen",
        listen,
        "--token-file",
        str(token),
        "--json",
        "--interval",
        "1000",
    ]
    switch = inside(names[1], *words)
    try:
        assert switch.stdout is not None
        json.loads(switch.stdout.readline())
        given = json.dumps({"token_file": str(token), **options})
        ends = [inside(name, str(TRAINEE), asked, str(rank), "2", given) for rank, name in enumerate(names[2:])]
        return [dict(json.loads(end.communicate(timeout=120)[0].splitlines()[-1])) for end in ends]
    finally:
        switch.kill()
        switch.communicate()


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft")
def test_a_training_through_a_nat_ends_with_the_bits_of_one_without(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    with bridged(1500) as names:
        plain = trained(names, "10.9.0.1:48864", "10.9.0.1:48864", token, {})
        with behind_nat(names):
            behind = trained(names, "10.9.0.1:48864", "10.9.0.1:48864", token, {})
    assert len({rank["digest"] for rank in plain + behind}) == 1


@pytest.mark.netns
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trainings_end_with_equal_bits_on_every_network(tmp_path: Path, every: bool) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    port = ":48864"
    told = {}
    with bridged(1500) as names:
        if every:
            told["plain"] = trained(names, "10.9.0.1" + port, "10.9.0.1" + port, token, {})
            told["multi-homed"] = trained(names, "0.0.0.0" + port, "10.9.0.11" + port, token, {})
        lose_long_frames(names[0])
        told["joined frames lost"] = trained(names, "0.0.0.0" + port, "10.9.0.11" + port, token, {})
        if every:
            told["joined frames lost, core"] = trained(
                names, "10.9.0.1" + port, "10.9.0.1" + port, token, {"profile": "core"}
            )
    if every:
        with bridged(1500, v6=True) as names:
            told["IPv6 alone"] = trained(names, "[fd00::1]" + port, "[fd00::1]" + port, token, {})
        assert told["IPv6 alone"][0]["elements"] == (1452 - 36) // 4
    whole = (1472 - 36) // 4
    assert told["joined frames lost"][0]["elements"] == whole
    assert all(ranks[0]["digest"] == ranks[1]["digest"] for ranks in told.values())
    # blocks of the same size give the same bits, whatever the network
    assert len({ranks[0]["digest"] for ranks in told.values() if ranks[0]["elements"] == whole}) == 1
    for name, ranks in told.items():
        said = [line for rank in ranks for line in rank["said"] if "one by one" in line]
        assert len(said) == (2 if "lost" in name else 0), (name, ranks)
