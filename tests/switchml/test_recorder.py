"""Somebody on the path who has recorded every packet of every session, and plays any of them at any moment, to either side.

No sum, no session and no key may change, and no tag's key may meet one nonce twice with two messages.
"""

import random
import select
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.switchml import SoftwareSwitch, SwitchMLState, _native
from trainkit.switchml import _control as control
from trainkit.switchml._join import _Join
from trainkit.switchml._membership import Membership
from trainkit.switchml._options import Options
from trainkit.switchml._place import Place
from trainkit.switchml._session import Sessions
from trainkit.switchml.reference import Switch, Worker

TOKEN = b"0123456789abcdef0123456789abcdef"
KEY = control.control_key(TOKEN)
CORES: dict[str, Any] = {"python": (Worker, Switch), "native": (_native.Worker, _native.Switch)}


class Scene:
    """A switch that outlives many sessions, or is restarted, and a recorder between it and its workers."""

    def __init__(self, core: str, seeded: random.Random) -> None:
        self.make_worker, self.make_switch = CORES[core]
        self.seeded = seeded
        self.now = 0.0
        self.replays = self.sessions = 0
        self.recorded: list[tuple[int, bytes]] = []  # (rank whose packet it was or is to be, packet)
        self.sealed: dict[tuple[bytes, bytes], bytes] = {}
        self.keys: set[bytes] = set()
        self.restart()

    def restart(self) -> None:
        self.plane = self.make_switch()
        self.table = Sessions(self.plane, TOKEN, 1 << 22)

    def address(self, rank: int) -> Any:
        return f"10.0.0.{rank + 1}", 4000

    def log(self, data: bytes, key: bytes) -> None:
        """A packet that an honest side has sealed."""
        if key and data[1] != 16:
            nonce = data[:-16][:28].ljust(28, b"\0")
            assert self.sealed.setdefault((key, nonce), data) == data, "a nonce was used twice under one key"

    def to_switch(self, rank: int, data: bytes, honest: bool = True) -> list[tuple[int, bytes]]:
        self.now += 0.0005
        if honest:
            self.recorded.append((rank, data))
        core = self.table.receive if control.is_control(data) else self.plane.receive
        answers = [(int(address[0][-1]) - 1, answer) for address, answer in core(data, self.address(rank), self.now)]
        self.recorded += answers
        return answers

    def replayed(self) -> list[tuple[int, bytes]]:
        """Play some recorded packets at the switch; and some, and what it answers, for the workers to hear."""
        heard = []
        while self.recorded and self.seeded.random() < 0.45:
            rank, data = self.seeded.choice(self.recorded)
            self.replays += 1
            if data[14] == 0xFF:
                heard.append((rank, data))
            else:
                heard += self.to_switch(rank, data, honest=False)
        return heard

    def join(self, world: int) -> list[Membership]:
        """All ranks join, with the recorder at work."""
        options = Options("10.0.0.9:1", elements=64, slots=2, session=self.seeded.choice("ab"))
        joins = [_Join(options, Place(rank, world, "job"), TOKEN, 0) for rank in range(world)]
        asked = {
            "op": "join", "v": control.PROTOCOL, "session": options.session, "job": "job", "world": world, "elements": 64,
            "slots": 2, "wire": "int32", "profile": "full", "channels": 1,
        }  # fmt: skip
        for _ in range(400):
            for rank, join in enumerate(joins):
                if join.ports is None:
                    answers = self.to_switch(rank, join.question({**asked, "rank": rank}, KEY))
                    for to, answer in self.seeded.sample(heard := answers + self.replayed(), len(heard)):
                        if to < world:
                            joins[to].take(answer, KEY, 0.0)
            if all(join.ports is not None for join in joins):
                break
        members = [join.offer for join in joins]
        assert all(member is not None for member in members) and all(join.ports is not None for join in joins)
        (active,) = [s.active for s in self.table._sessions.values() if s.name == options.session]
        assert active is not None and active.nonces == tuple(join.nonce for join in joins)
        for rank, member in enumerate(members):
            assert member == active.member.as_worker(rank), "a wrong join"
        assert active.member.key not in self.keys and active.member.control not in self.keys, "a key was used before"
        self.keys |= {active.member.key, active.member.control}
        self.sessions += 1
        return [member for member in members if member is not None]

    def average(self, members: list[Membership]) -> None:
        """One bucket, with the recorder at work; the sums are exact."""
        world = len(members)
        values = [np.arange(300, dtype=np.float32) * (rank + self.sessions) for rank in range(world)]
        outs = [np.zeros(300, np.float32) for _ in members]
        workers = [self.make_worker(member) for member in members]
        pending: list[tuple[int, bytes]] = []
        for rank, worker in enumerate(workers):
            pending += [(rank, data) for data in worker.submit(values[rank], outs[rank], self.now)]
        while pending:
            rank, data = pending.pop(0)
            self.log(data, members[rank].key)
            answers = self.to_switch(rank, data)
            for _, answer in answers:
                self.log(answer, members[0].key)
            for to, answer in answers + self.replayed():
                if to < world and not control.is_control(answer):
                    pending += [(to, sent) for sent in workers[to].receive(answer, self.now)]
            if not pending:  # nothing is lost, but a replay may have drawn the one answer of a round trip
                self.now += 0.2
                pending += [(to, sent) for to, w in enumerate(workers) for sent in w.poll(self.now)]
        exact = np.mean(values, axis=0)
        for worker, out in zip(workers, outs, strict=True):
            assert worker.finished == 1
            np.testing.assert_array_equal(out, exact)


@pytest.mark.parametrize("core", CORES)
def test_ten_thousand_replays_over_two_hundred_sessions_change_nothing(core: str) -> None:
    scene = Scene(core, random.Random(7))
    while scene.sessions < 200 or scene.replays < 10_000:
        if scene.seeded.random() < 0.1:
            scene.restart()
        members = scene.join(scene.seeded.randint(1, 3))
        for _ in range(scene.seeded.randint(1, 2)):  # an epoch, and its renewal over the same socket
            scene.average(members)
            members = scene.join(len(members)) if scene.seeded.random() < 0.5 else members[:0]
            if not members:
                break
        scene.now += scene.seeded.choice([0.1, 2.0, 40.0])
    assert len(scene.sealed) > 5000 and len(scene.keys) == 2 * scene.sessions


class Recorder(threading.Thread):
    """Stands between a worker and its switch, and plays what it has heard again, to both."""

    def __init__(self, switch: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.near, self.far = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        self.near.bind(("127.0.0.1", 0))
        host, port = switch.split(":")
        self.far.connect((host, int(port)))
        self.address = f"127.0.0.1:{self.near.getsockname()[1]}"
        self.seeded, self.heard, self.replays = random.Random(seed), ([], []), 0  # type: ignore[var-annotated]
        self.over = False

    def run(self) -> None:
        worker: Any = None
        while not self.over:
            for ready in select.select([self.near, self.far], [], [], 0.2)[0]:
                try:
                    data, source = ready.recvfrom(65535)
                except OSError:
                    continue
                upward = ready is self.near
                worker = source if upward else worker
                self.heard[upward].append(data)
                for packet in [data, *self.seeded.choices(self.heard[upward], k=self.seeded.choice([0, 0, 1, 2]))]:
                    self.replays += packet is not data
                    if upward:
                        self.far.send(packet)
                    else:
                        self.near.sendto(packet, worker)


@pytest.mark.parametrize("with_token", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_real_sessions_live_with_a_recorder(tmp_path: Path, with_token: bool) -> None:
    path = tmp_path / "token"
    path.write_bytes(TOKEN)
    path.chmod(0o600)
    token = str(path) if with_token else None
    with SoftwareSwitch(token_file=token) as switch:
        recorders = [Recorder(switch.address, rank) for rank in range(2)]
        for recorder in recorders:
            recorder.start()
        wrong: list[str] = []

        def work(rank: int, round_: int) -> None:
            options: dict[str, Any] = {"token_file": token, "elements": 64, "timeout_s": 20, "channels": 1}
            state = SwitchMLState(recorders[rank].address, rank=rank, world_size=2, **options)
            try:
                for step in range(10):
                    got = state.average(torch.full((200,), float(rank + round_ + step)), index=step % 2).wait()
                    if not torch.equal(got, torch.full((200,), round_ + step + 0.5)):
                        wrong.append(f"{got[0]} in step {step} of round {round_}")
            except Exception as error:
                wrong.append(f"round {round_}, rank {rank}: {error!r}")
            state.close()

        for round_ in range(10):
            threads = [threading.Thread(target=work, args=(rank, round_)) for rank in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not wrong
        assert sum(recorder.replays for recorder in recorders) > 500
        for recorder in recorders:
            recorder.over = True
            recorder.join()
