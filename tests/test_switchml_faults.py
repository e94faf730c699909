"""Real processes, a real switch program, and signals: every failure has a name, no pause within the deadline hurts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_WORKER = """
import datetime, json, os, sys, time
import torch, torch.distributed as dist
from trainkit.switchml import SwitchMLState, SwitchMLError, _rescue
torch.set_num_threads(1)
rank, options = int(sys.argv[1]), json.loads(sys.argv[2])
buckets, pace, die = options.pop("buckets"), options.pop("pace", 0.0), options.pop("kill_switch_after_last", None)
_rescue._RETRY = options.pop("retry", 15.0)
dist.init_process_group("gloo", init_method=f"file://{options.pop('meet')}", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))
state = SwitchMLState(**options)
state.connect()
print("joined", flush=True)
digest, worst = 0, 0.0
try:
    for step in range(buckets):
        own = [torch.randn(3000, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(2)]
        got = own[rank].clone()
        state.average(got).wait()
        worst = max(worst, float((got - (own[0] + own[1]) / 2).abs().max()))
        digest = hash((digest, got.numpy().tobytes()))
        print("step", step, flush=True)
        time.sleep(pace)
    answer = {"digest": digest, "worst": worst, "rescues": getattr(state.link, "rescues", 0)}
except RuntimeError as error:
    answer = {"error": type(state.error).__name__, "words": str(state.error), "ranks": getattr(state.error, "ranks", None)}
state.close()
print(json.dumps({**answer, **state.counters()}), flush=True)
"""


class Scene:
    """A switch and two workers as processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []
        self.script = folder / "worker.py"
        self.script.write_text(_WORKER)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment, cwd=self.folder
        )
        self.processes.append(process)
        return process

    def switch(self, listen: str = "127.0.0.1:0") -> "subprocess.Popen[str]":
        process = self.start("-m", "trainkit", "switch", "--listen", listen, "--json", "--interval", "1000")
        self.address: str = json.loads(process.stdout.readline())["address"]  # type: ignore[union-attr]
        return process

    def workers(self, **options: Any) -> list["subprocess.Popen[str]"]:
        plan = json.dumps({"switch": self.address, "meet": str(self.folder / "meet"), **options})
        return [self.start(str(self.script), str(rank), plan) for rank in range(2)]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


def _until(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdout is not None
    for said in process.stdout:
        if said.startswith(line):
            return
    raise AssertionError(f"the worker ended before it said {line!r}")


def _answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    # not communicate(), which misses what the line reader has taken ahead
    out = process.stdout.read()
    process.wait(timeout=90)
    return dict(json.loads(out.strip().splitlines()[-1]))


def test_switch_killed_and_restarted_with_fallback(scene: Scene) -> None:
    switch = scene.switch()
    workers = scene.workers(buckets=60, pace=0.03, deadline_s=1.5, fallback="allreduce", retry=0.3)
    _until(workers[0], "step 10")
    switch.send_signal(signal.SIGKILL)
    switch.wait()
    _until(workers[0], "step 15")
    scene.switch(scene.address)
    first, second = (_answer(worker) for worker in workers)
    assert first["digest"] == second["digest"]
    assert max(first["worst"], second["worst"]) < 1e-6
    assert first["rescues"] == second["rescues"] == 1
    # it went through the switch before the kill and after the return, and not between
    assert 10 < first["buckets"] < 60


def test_last_result_reaches_the_rank_that_missed_it(scene: Scene) -> None:
    switch = scene.switch()
    workers = scene.workers(buckets=3, deadline_s=1.5, fallback="allreduce")
    _until(workers[1], "joined")
    workers[1].send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    workers[1].send_signal(signal.SIGCONT)
    _until(workers[0], "step 2")
    switch.send_signal(signal.SIGKILL)
    first, second = (_answer(worker) for worker in workers)
    assert first["digest"] == second["digest"]


@pytest.mark.parametrize("listens_again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_switch_killed_without_fallback_is_named_on_every_rank(scene: Scene, listens_again: bool) -> None:
    switch = scene.switch()
    workers = scene.workers(buckets=1000, pace=0.02, deadline_s=30.0 if listens_again else 2.0)
    _until(workers[0], "step 3")
    switch.send_signal(signal.SIGKILL)
    switch.wait()
    if listens_again:
        scene.switch(scene.address)
    for worker in workers:
        answer = _answer(worker)
        assert answer["error"] == ("SessionLost" if listens_again else "SwitchUnreachable")
        assert scene.address in answer["words"]


def test_pause_within_the_deadline_costs_time_only(scene: Scene) -> None:
    scene.switch()
    workers = scene.workers(buckets=20, pace=0.02, deadline_s=6.0)
    _until(workers[0], "step 3")
    workers[1].send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    workers[1].send_signal(signal.SIGCONT)
    first, second = (_answer(worker) for worker in workers)
    assert first["digest"] == second["digest"]
    assert first["worst"] < 1e-6


@pytest.mark.parametrize("fallback", [None, "allreduce"])
def test_pause_beyond_the_deadline_and_death_are_named(scene: Scene, fallback: str | None) -> None:
    scene.switch()
    workers = scene.workers(buckets=1000, pace=0.02, deadline_s=1.0, fallback=fallback)
    _until(workers[0], "step 3")
    if fallback is None:
        workers[1].send_signal(signal.SIGSTOP)
        answer = _answer(workers[0])
        workers[1].send_signal(signal.SIGCONT)
        assert "rank 1" in _answer(workers[1])["words"]  # the paused one is told too
    else:
        workers[1].send_signal(signal.SIGKILL)
        answer = _answer(workers[0])
    assert answer["error"] == "WorkerMissing"
    assert answer["ranks"] == [1]
