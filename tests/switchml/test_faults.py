"""Real processes, a real switch program, and signals: every failure has a name, no pause within the deadline hurts."""

import contextlib
import datetime
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from execute_ranks import RANKS, start
from torch.nn.parallel import DistributedDataParallel

from trainkit.switchml import SwitchMLState, _failover, switchml_hook
from trainkit.switchml import _packet as packet


def _average(state: SwitchMLState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return state.average(bucket.buffer())


def _loss(model: torch.nn.Module, step: int, rank: int) -> torch.Tensor:
    seeded = torch.Generator().manual_seed(10 * step + rank)
    images = torch.randn(8, 1, 8, 8, generator=seeded)
    return torch.nn.functional.cross_entropy(model(images), torch.randint(0, 10, (8,), generator=seeded))


def _train(state: SwitchMLState, rank: int, steps: int, pace: float, guess: bool, tell: Any) -> tuple[str, float]:
    """A digest of the parameters, and how far the worst gradient was off the two ranks' mean."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 10)
    )  # fmt: skip
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(state, switchml_hook if guess else _average)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    worst = 0.0
    for step in range(steps):
        both = [torch.autograd.grad(_loss(model, step, r), list(model.parameters())) for r in range(2)]
        _loss(ddp, step, rank).backward()
        for p, first, second in zip(model.parameters(), *both, strict=True):
            assert p.grad is not None
            worst = max(worst, float((p.grad - (first + second) / 2).abs().max()))
        optimizer.step()
        optimizer.zero_grad()
        tell(f"step {step}")
        time.sleep(pace)
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest(), worst


def _work(rank: int, meet: str, told: Connection, options: dict[str, Any]) -> None:
    """One rank: tells its steps as it goes, at last what it found."""
    steps, pace, guess = options.pop("steps"), options.pop("pace", 0.0), options.pop("guess", True)
    again, halt = options.pop("again", False), options.pop("halt", None)
    _failover._RETRY = options.pop("retry", 15.0)
    minute = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2, timeout=minute)
    state = SwitchMLState(**options)
    answer: dict[str, Any] = {}

    def tell(step: str) -> None:
        told.send(step)
        if step == halt:
            told.recv()

    try:
        state.connect()
        answer["digest"], answer["worst"] = _train(state, rank, steps, pace, guess, tell)
        answer["failovers"] = getattr(state.link, "failovers", 0)
        if again:
            answer["undisturbed"] = _train(state, rank, steps, 0.0, guess, lambda said: None)[0]
    except RuntimeError:
        if state.error is None:
            raise
        answer = {"error": type(state.error).__name__, "words": str(state.error)}
        answer["ranks"] = getattr(state.error, "ranks", None)
    state.close()
    told.send({**answer, **state.counters()})


class Worker:
    """A rank in a process of its own."""

    def __init__(self, rank: int, meet: str, options: dict[str, Any]) -> None:
        self._told, theirs = RANKS.Pipe()
        self.process = start(_work, rank, meet, theirs, options)
        theirs.close()  # so that its end is seen

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def until(self, step: str) -> None:
        """Wait for a step."""
        while (said := self._told.recv()) != step:
            assert isinstance(said, str), f"the worker ended before it said {step!r}: {said}"

    def go_on(self) -> None:
        """End its halt."""
        self._told.send("go on")

    def answer(self) -> dict[str, Any]:
        """What it found."""
        while isinstance(said := self._told.recv(), str):
            pass
        self.process.join(90)
        return dict(said)


class Scene:
    """A switch and two workers as processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.switches: list[subprocess.Popen[str]] = []
        self.ranks: list[Worker] = []

    def switch(self, listen: str = "127.0.0.1:0") -> "subprocess.Popen[str]":
        words = ["-m", "trainkit", "switch", "--listen", listen, "--json", "--interval", "1000"]
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True, cwd=self.folder)
        self.switches.append(process)
        self.address: str = json.loads(process.stdout.readline())["address"]  # type: ignore[union-attr]
        return process

    def workers(self, second: str | None = None, **options: Any) -> list[Worker]:
        """Both workers; `second` is where rank 1 finds the switch."""
        places = (self.address, second or self.address)
        self.ranks += [
            Worker(rank, str(self.folder / "meet"), {"switch": place, **options}) for rank, place in enumerate(places)
        ]
        return self.ranks

    def close(self) -> None:
        for process in (*self.switches, *(rank.process for rank in self.ranks)):
            process.kill()
        for process in self.switches:
            process.communicate()
        for rank in self.ranks:
            rank.process.join()


class Relay(threading.Thread):
    """Stands between a worker and its switch, and once `hold` is set keeps from the worker every sum that is new."""

    def __init__(self, switch: str) -> None:
        super().__init__(daemon=True)
        host, port = switch.split(":")
        self.near, self.far = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        self.near.bind(("127.0.0.1", 0))
        self.far.connect((host, int(port)))
        self.address = "{}:{}".format(*self.near.getsockname())
        self.hold, self.held, self.newest = threading.Event(), 0, -1

    def run(self) -> None:
        worker: Any = None
        while True:
            for ready in select.select([self.near, self.far], [], [])[0]:
                with contextlib.suppress(OSError):
                    data, source = ready.recvfrom(65535)
                    if ready is self.near:
                        worker = source
                        self.far.send(data)
                    elif self._passes(data):
                        self.near.sendto(data, worker)

    def _passes(self, data: bytes) -> bool:
        header, _ = packet.decode(data) or (None, b"")
        if header is None or header.kind != packet.Kind.RESULT:
            return True
        if self.hold.is_set() and header.chunk > self.newest and header.elements:
            self.held += 1
            return False
        if not self.hold.is_set():
            self.newest = max(self.newest, header.chunk)
        return True


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.close()


@pytest.mark.slow
def test_switch_killed_and_restarted_with_fallback(scene: Scene) -> None:
    switch = scene.switch()
    workers = scene.workers(steps=60, pace=0.03, timeout_s=1.5, fallback="allreduce", retry=0.3)
    workers[0].until("step 10")
    switch.send_signal(signal.SIGKILL)
    switch.wait()
    workers[0].until("step 15")
    scene.switch(scene.address)
    first, second = (worker.answer() for worker in workers)
    assert first["digest"] == second["digest"]
    assert max(first["worst"], second["worst"]) < 1e-6
    assert first["failovers"] == second["failovers"] == 1
    # it went through the switch before the kill and after the return, and not between
    assert 10 < first["buckets"] < 60


def test_last_result_reaches_the_rank_that_missed_it(scene: Scene) -> None:
    switch = scene.switch()
    relay = Relay(scene.address)
    relay.start()
    # without guesses, so that what is held are sums that need nothing more of rank 1
    workers = scene.workers(relay.address, steps=5, halt="step 3", timeout_s=1.5, fallback="allreduce", guess=False)
    for worker in workers:
        worker.until("step 3")
    relay.hold.set()
    for worker in workers:
        worker.go_on()
    workers[0].until("step 4")  # rank 0 has the last sum, and ends as soon as it may
    deadline = time.monotonic() + 10
    while not relay.held:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    switch.send_signal(signal.SIGKILL)
    first, second = (worker.answer() for worker in workers)
    assert first["digest"] == second["digest"]
    assert max(first["worst"], second["worst"]) < 1e-6
    assert (first["failovers"], second["failovers"]) == (0, 1)
    assert first["buckets"] == second["buckets"] + 1


@pytest.mark.slow
@pytest.mark.parametrize("listens_again", [False, True])
def test_switch_killed_without_fallback_is_named_on_every_rank(scene: Scene, listens_again: bool) -> None:
    switch = scene.switch()
    workers = scene.workers(steps=1000, pace=0.02, timeout_s=30.0 if listens_again else 2.0)
    workers[0].until("step 3")
    switch.send_signal(signal.SIGKILL)
    switch.wait()
    if listens_again:
        scene.switch(scene.address)
    for worker in workers:
        answer = worker.answer()
        assert answer["error"] == ("SessionLost" if listens_again else "SwitchUnreachable")
        assert scene.address in answer["words"]


@pytest.mark.slow
def test_pause_of_5_s_within_a_limit_of_10_s_costs_time_only(scene: Scene) -> None:
    scene.switch()
    workers = scene.workers(steps=20, pace=0.02, timeout_s=10.0, again=True)
    workers[0].until("step 3")
    workers[1].signal(signal.SIGSTOP)
    time.sleep(5.0)
    workers[1].signal(signal.SIGCONT)
    answers = [worker.answer() for worker in workers]
    assert len({answer[run] for answer in answers for run in ("digest", "undisturbed")}) == 1
    assert answers[0]["worst"] < 1e-6


@pytest.mark.parametrize("fallback", ["error", pytest.param("allreduce", marks=pytest.mark.slow)])
def test_pause_of_5_s_beyond_a_limit_of_2_s_is_named_on_every_rank(scene: Scene, fallback: str) -> None:
    scene.switch()
    workers = scene.workers(steps=1000, pace=0.02, timeout_s=2.0, fallback=fallback)
    workers[0].until("step 3")
    workers[1].signal(signal.SIGSTOP)
    time.sleep(5.0)
    workers[1].signal(signal.SIGCONT)
    answers = [worker.answer() for worker in workers]
    for answer in answers:
        assert answer["error"] == "WorkerMissing"
        assert "rank 1" in answer["words"]
    assert answers[0]["ranks"] == (1,)


@pytest.mark.parametrize("fallback", [pytest.param("error", marks=pytest.mark.slow), "allreduce"])
def test_dead_worker_is_named(scene: Scene, fallback: str) -> None:
    scene.switch()
    workers = scene.workers(steps=1000, pace=0.02, timeout_s=1.0, fallback=fallback)
    workers[0].until("step 3")
    workers[1].signal(signal.SIGKILL)
    answer = workers[0].answer()
    assert answer["error"] == "WorkerMissing"
    assert answer["ranks"] == (1,)
