"""`p4 deploy` and what stands on it, against a P4Runtime server of the tests."""

import copy
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("p4runtime_sh", reason="needs the extra p4")

from p4_fake_switch import FakeSwitch
from paths import ROOT
from switchml_peer import Peer

from trainkit.cli import main
from trainkit.cli._p4_serve import serve
from trainkit.p4._client import Connection, SwitchError
from trainkit.p4._description import DescriptionError, load
from trainkit.p4._entries import wanted
from trainkit.p4._frames import datagram, udp_frame
from trainkit.p4._plane import Plane
from trainkit.p4.deploy import DeployError, deploy, reset, status
from trainkit.switchml import FixedSwitch, Preconfigured
from trainkit.switchml._membership import Membership

LAB: dict[str, Any] = {
    "switch": {"ip": "10.0.0.254", "mac": "02:00:00:00:00:fe"},
    "workers": [
        {"name": name, "mac": f"02:00:00:00:00:0{place}", "ip": f"10.0.0.{place}", "port": place}
        for place, name in enumerate("abc", 1)
    ],
    "sessions": [
        {"name": "default", "workers": ["a", "b"], "slots": 4, "elements": 64},
        {"name": "other", "workers": ["c", "a"], "slots": 2},
    ],
}


@pytest.fixture
def switch() -> Iterator[FakeSwitch]:
    fake = FakeSwitch()
    fake.hosts = {(place, 0x0A000000 + place): 0x020000000000 + place for place in (1, 2, 3)}
    yield fake
    fake.close()


def written(folder: Path, change: Any = None) -> Path:
    """The lab's file, after `change` was made to it."""
    lab = copy.deepcopy(LAB)
    if change:
        change(lab)
    path = folder / "workers.yaml"
    path.write_text(yaml.safe_dump(lab))
    return path


def test_first_run_programs_and_the_second_changes_nothing(
    switch: FakeSwitch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(written(tmp_path))
    assert main(["p4", "deploy", path, "--grpc", switch.address]) == 0
    said = capsys.readouterr().out
    assert "+ the program" in said and "all 3 workers answer" in said
    written_first = len(switch.writes)
    assert written_first == len(wanted(load(path))) and switch.pushes == 1
    assert main(["p4", "deploy", path, "--grpc", switch.address]) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert len(switch.writes) == written_first and switch.pushes == 1


def test_a_changed_worker_changes_the_difference_alone(switch: FakeSwitch, tmp_path: Path) -> None:
    deploy(written(tmp_path), grpc=switch.address, probe=False)
    switch.writes.clear()

    def moved(lab: Any) -> None:
        lab["workers"][1]["port"] = 9

    outcome = deploy(written(tmp_path, moved), grpc=switch.address, probe=False)
    places = {str(change.after).split(" ->")[0].split(":")[0] for change in outcome.changes if change.after}
    assert len(switch.writes) == len(outcome.changes) == 3
    assert places == {"l2 02", "multicast group 1", "multicast group 2"}
    assert all(change.before and change.after for change in outcome.changes)


def test_dry_run_shows_and_changes_nothing(
    switch: FakeSwitch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["p4", "deploy", str(written(tmp_path)), "--grpc", switch.address, "--dry-run"]) == 0
    assert "+ session 0 -> 3 0 4 64 2" in capsys.readouterr().out
    assert switch.config is None and not switch.writes


def test_another_program_is_only_overwritten_when_told(
    switch: FakeSwitch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    deploy(path, grpc=switch.address, probe=False)
    groups = dict(switch.groups)
    switch.config.p4info.pkg_info.name = "another"
    assert main(["p4", "deploy", str(path), "--grpc", switch.address]) == 2
    assert "runs another program: give --replace" in capsys.readouterr().err
    assert switch.pushes == 1
    deploy(path, grpc=switch.address, replace=True, probe=False)
    assert switch.pushes == 2 and switch.groups == groups  # one group each, though groups outlive a program


@pytest.mark.parametrize("fault", ["refuse_after", "forgets"])
def test_a_half_made_change_is_undone(fault: str, switch: FakeSwitch, tmp_path: Path) -> None:
    deploy(written(tmp_path), grpc=switch.address, probe=False)
    before = dict(switch.tables), dict(switch.groups)

    def grown(lab: Any) -> None:
        lab["workers"].append({"name": "d", "mac": "02:00:00:00:00:04", "ip": "10.0.0.4", "port": 4})
        lab["sessions"][0]["workers"].append("d")

    setattr(switch, fault, 2 if fault == "refuse_after" else 1)
    with pytest.raises((SwitchError, DeployError), match=r"refuses|does not hold.*undone"):
        deploy(written(tmp_path, grown), grpc=switch.address, probe=False)
    assert (switch.tables, switch.groups) == before


def test_nobody_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(SwitchError, match="no P4Runtime server answers"):
        Connection(address, seconds=0.5)
    assert main(["p4", "deploy", str(written(tmp_path)), "--grpc", address]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_another_controller_is_primary(switch: FakeSwitch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    with Connection(switch.address, election=5):
        for election in ("5", "1"):
            assert main(["p4", "deploy", str(path), "--grpc", switch.address, "--election", election]) == 2
            assert "another controller is primary" in capsys.readouterr().err


def test_mastership_lost_on_the_way(switch: FakeSwitch, tmp_path: Path) -> None:
    deploy(written(tmp_path), grpc=switch.address, probe=False)
    with Connection(switch.address, election=1) as first, Connection(switch.address, election=2):
        with pytest.raises(SwitchError, match="mastership lost"):
            first.push("", b"", 0)
        with pytest.raises(SwitchError, match="mastership lost"):
            first.receive(0.5)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda lab: lab["workers"][1].update(name="a"), "worker 'a' has the name of worker 'a'"),
        (lambda lab: lab["workers"][1].update(mac="02:00:00:00:00:01"), "worker 'b' has the mac of worker 'a'"),
        (lambda lab: lab["workers"][1].update(ip="10.0.0.254"), "worker 'b' has the ip of switch"),
        (lambda lab: lab["workers"][1].update(port=510), "a port is 0 to 509, got 510"),
        (lambda lab: lab["workers"][1].update(mac="ff:ff:ff:ff:ff:ff"), "not of one host"),
        (lambda lab: lab["workers"][1].update(ip="10.0.0.256"), "ip is an IPv4 address"),
        (lambda lab: lab["workers"][1].pop("port"), "worker 'b' has ip, mac, name, port; got ip, mac, name"),
        (lambda lab: lab["sessions"][0].update(workers=["a", "z"]), "worker 'z' is not in `workers`"),
        (lambda lab: lab["sessions"][0].update(workers=["a", "a"]), "worker 'a' is there twice"),
        (lambda lab: lab["sessions"][0].update(workers=["a"] * 33), "1 to 32 workers a session, got 33"),
        (lambda lab: lab["sessions"][0].update(slots=3), "slots are a power of two, got 3"),
        (lambda lab: lab["sessions"][0].update(slots=1024), "room for 64 and 512"),
        (lambda lab: lab["sessions"][0].update(elements=128), "elements are 64 or 256, got 128"),
        (lambda lab: lab.update(sessions=[]), "sessions is a list of at least one"),
    ],
)
def test_a_wrong_file_is_one_line(change: Any, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, change)
    with pytest.raises(DescriptionError):
        load(path)
    assert main(["p4", "deploy", str(path), "--grpc", "127.0.0.1:1"]) == 2
    said = capsys.readouterr().err
    assert what in said and said.count("\n") == 1


def test_probe_names_who_is_not_seen(
    switch: FakeSwitch, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainkit.p4.deploy._PROBE_WAIT", 0.2)
    del switch.hosts[2, 0x0A000002]
    switch.hosts[3, 0x0A000003] = 0x020000000033
    assert main(["p4", "deploy", str(written(tmp_path)), "--grpc", switch.address]) == 1
    said = capsys.readouterr().out
    assert "worker b (10.0.0.2, 02:00:00:00:00:02, port 2) is not seen" in said
    assert "worker c (10.0.0.3, 02:00:00:00:00:03, port 3) answers from port 3 with 02:00:00:00:00:33" in said
    assert "worker a" not in said


def test_deploy_runs_by_itself(switch: FakeSwitch, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "p4" / "deploy.py"), str(written(tmp_path)), "--grpc", switch.address]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "changes made and read back" in done.stdout
    deadline = time.monotonic() + 20
    while True:
        again = subprocess.run([*command, "--election", "0"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        # until the server has seen that the first run is gone
        if "another controller is primary" not in again.stderr or time.monotonic() > deadline:
            break
    assert "nothing to change" in again.stdout, again.stderr


class _Host:
    """A worker that speaks through the fake switch."""

    def __init__(self, switch: FakeSwitch, place: int, udp: int) -> None:
        self.switch, self.place, self.udp = switch, place, udp
        self.read = 0  # frames that have been looked at

    def says(self, data: bytes) -> None:
        own = 0x020000000000 + self.place, 0x0A000000 + self.place
        frame = bytearray(udp_frame(own, (0x0200000000FE, 0x0A0000FE), 48864, data))
        frame[34:36] = self.udp.to_bytes(2, "big")
        self.switch.inject(self.place, bytes(frame))

    def hears(self, peer: Peer, op: str = "") -> dict[str, Any]:
        """The next answer for `peer`, of kind `op` where that is given."""
        for _ in range(200):
            for port, frame in list(self.switch.sent)[self.read :]:
                self.read += 1
                told = datagram(frame)
                to_me = port == self.place and frame[36:38] == self.udp.to_bytes(2, "big")
                message = peer.take(told.data) if told and to_me else None
                if message and op in ("", message["op"]):
                    return message
            threading.Event().wait(0.05)
        raise AssertionError(f"no {op or 'answer'} for {self.place}")


def test_workers_join_through_the_switch(switch: FakeSwitch, tmp_path: Path) -> None:
    path = written(tmp_path)
    deploy(path, grpc=switch.address, probe=False)
    before = set(switch.tables)
    hosts = [_Host(switch, place, 4000 + place) for place in (1, 2)]
    stop = threading.Event()
    with Connection(switch.address) as connection:
        plane = Plane(connection, load(path))
        fixed = FixedSwitch(plane, {"default": Preconfigured(0, ("10.0.0.1", "10.0.0.2"), 4, 64)})
        thread = threading.Thread(target=serve, args=(plane, fixed, stop))
        thread.start()
        try:
            peers = [Peer(rank, 2, session="default", elements=256, slots=20, profile="core") for rank in range(2)]
            for _ in range(40):
                for host, peer in zip(hosts, peers, strict=True):
                    host.says(peer.question())
                    host.hears(peer)
                if all(peer.began for peer in peers):
                    break
            offers = [peer.offer or {} for peer in peers]
            assert [(o["slots"], o["elements"], o["session"]) for o in offers] == [(4, 64, 0)] * 2
            # rank 1 has not sent what rank 0 has: the switch's slots say so
            switch.versions[1] = {"chunk": 4, "epoch": offers[0]["epoch"], "seen": 1, "elements": 64}
            hosts[0].says(peers[0].ping())
            assert hosts[0].hears(peers[0], "pong")["missing"] == [1]
            assert status(path, grpc=switch.address).sessions["default"]["joined"] == 2  # beside the primary
            other = Peer(1, 2, session="default", elements=256, profile="full")
            for _ in range(2):
                hosts[1].says(other.question())
                heard = hosts[1].hears(other)
            assert heard["op"] == "refused" and "profile full" in heard["why"]
        finally:
            stop.set()
            thread.join()
    assert len(set(switch.tables) - before) == 4  # a member and a receiver each
    found = status(path, grpc=switch.address)
    assert found.as_described and found.sessions["default"]["joined"] == 2
    assert found.packets["malformed"] == 5
    assert reset(path, "default", grpc=switch.address) == ["default"]
    assert set(switch.tables) == before and not switch.versions


def test_a_changed_session_ends_what_was_joined(switch: FakeSwitch, tmp_path: Path) -> None:
    path = written(tmp_path)
    deploy(path, grpc=switch.address, probe=False)
    with Connection(switch.address) as connection:
        plane = Plane(connection, load(path))
        plane.install(Membership(0, 7, 2), (("10.0.0.1", 4001), ("10.0.0.2", 4002)))
        plane.install(Membership(1, 8, 2), (("10.0.0.3", 4003), ("10.0.0.1", 4004)))
    assert not deploy(path, grpc=switch.address, probe=False).changes

    def another_card(lab: Any) -> None:
        lab["workers"][1]["mac"] = "02:00:00:00:00:22"

    outcome = deploy(written(tmp_path, another_card), grpc=switch.address, probe=False)
    assert len([change for change in outcome.changes if change.after is None]) == 4 + 1
    assert status(path, grpc=switch.address).sessions["other"]["joined"] == 2


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trainkit.p4._client", None)
    with pytest.raises(DeployError, match=r"pip install 'p4runtime-shell>=0\.0\.6'"):
        deploy(written(tmp_path))
