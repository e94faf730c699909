"""The main job, end to end, in processes of its own: what it leaves, what a kill leaves, what it refuses."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainkit.report import Run

STEPS = 64


# As a user starts it from the repository's root: the source tree there must not hide what is installed.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}


def demo(out: Path, *words: str) -> list[str]:
    return [str(Path(sys.executable).with_name("trainkit")), "demo", "--out", str(out), *words]


FRESH = ("--size", "tiny", "--steps", str(STEPS), "--seed", "3")


def finish(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(demo(out, *words), capture_output=True, text=True, timeout=280, env=ENVIRONMENT)


def children(pid: int) -> set[int]:
    """All descendants of a process."""
    found: set[int] = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found |= {int(path.parent.name), *children(int(path.parent.name))}
    return found


def gone(pids: set[int], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def results(out: Path) -> dict[str, dict[str, Any]]:
    arms = ("autolrs", "default", "constant")
    return {arm: json.loads((out / arm / "result.json").read_text()) for arm in arms}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo that nobody interrupted."""
    out = tmp_path_factory.mktemp("demo") / "run"
    done = finish(out, *FRESH, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {arm["arm"] for arm in json.loads(done.stdout)} == {"autolrs", "default", "constant"}
    return out


def test_it_learns_and_counts(whole: Path) -> None:
    arms = results(whole)
    history = arms["autolrs"]["history"]
    assert arms["autolrs"]["val_bits"] < arms["default"]["val_bits"] - 0.5
    assert history["kept_steps"] + history["discarded_steps"] == STEPS
    assert arms["autolrs"]["kept_steps"] == history["kept_steps"]
    assert arms["default"]["kept_steps"] == arms["constant"]["kept_steps"] == STEPS


def test_it_leaves_what_it_says(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    assert page.count('<figure class="chart"') == 7
    assert not re.search(r"""(src|href)=["']?http|@import|<script src""", page)
    rows = (whole / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + results(whole)["autolrs"]["kept_steps"]
    from trainkit.autolrs import LRSchedule

    assert len(LRSchedule.load(whole / "lr_schedule.json")) == len(rows) - 1
    assert (whole / "autolrs.ckpt").stat().st_size > 1 << 20


def test_every_gradient_went_through_the_switch(whole: Path) -> None:
    parameters = results(whole)["constant"]["parameters"]
    sent = Run.load(whole / "constant").columns["sent_bytes"]
    assert sent[-1] >= 4 * parameters * STEPS


def killed(out: Path, *words: str, when: Callable[[], object]) -> None:
    """Start the demo and SIGKILL its parent as soon as `when` returns; nothing of it stays."""
    with subprocess.Popen(
        demo(out, *words), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=ENVIRONMENT
    ) as parent:
        when()
        family = children(parent.pid)
        parent.send_signal(signal.SIGKILL)
    assert gone(family), "a process was left behind"


def assert_same_run(out: Path, whole: Path) -> None:
    for arm, result in results(whole).items():
        mine = results(out)[arm]
        assert mine["digest"] == result["digest"], f"{arm} ended with other weights"
        assert mine["val_bits"] == result["val_bits"]
        assert mine["kept_steps"] == result["kept_steps"]
    assert (out / "lr_schedule.json").read_text() == (whole / "lr_schedule.json").read_text()


def test_killed_while_it_searches_it_ends_with_the_same_weights(whole: Path, tmp_path: Path) -> None:
    """The arms without a search are not run again here: they are killed, too, in the test of ten kills."""
    out = tmp_path / "run"

    def trained_a_little() -> None:
        deadline = time.monotonic() + 120
        while not list((out / "autolrs").glob("step-*.ckpt")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(random.Random(1).uniform(0.0, 1.0))

    killed(out, *FRESH, when=trained_a_little)
    assert not (out / "autolrs" / "result.json").exists()
    for arm in ("default", "constant"):
        shutil.copytree(whole / arm, out / arm)
    done = finish(out, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_ten_times_it_ends_with_the_same_weights(whole: Path, tmp_path: Path) -> None:
    out, moment = tmp_path / "run", random.Random(2)
    for _ in range(10):
        words = ["--resume"] if (out / "config.json").exists() else [*FRESH]
        killed(out, *words, when=lambda: time.sleep(moment.uniform(1.0, 14.0)))
    done = finish(out, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(out, whole)


@pytest.mark.slow
def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = demo(out, "--size", "tiny", "--workers", "4", "--steps", "400", "--deadline", "10")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as parent:
        deadline = time.monotonic() + 240
        while not list((out / "autolrs").glob("step-*.ckpt")):  # all have joined and train
            assert time.monotonic() < deadline
            time.sleep(0.2)
        ranks = worker_pids(parent.pid)
        family = children(parent.pid)
        os.kill(ranks[2], signal.SIGKILL)
        killed = time.monotonic()
        _, said = parent.communicate(timeout=60)
    assert parent.returncode != 0
    assert time.monotonic() - killed < 30
    assert "worker 2 of 4" in said
    assert "was killed by SIGKILL" in said
    assert "trainkit demo --resume" in said
    assert gone(family)


def worker_pids(parent: int) -> dict[int, int]:
    found = {}
    for pid in children(parent):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"trainkit.demo._worker" in words:
            found[json.loads(words[4])["rank"]] = pid
    return found


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        done = finish(tmp_path / "run", *FRESH, "--port", str(port))
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_unreachable_switch(tmp_path: Path) -> None:
    done = finish(tmp_path / "run", *FRESH, "--switch", "127.0.0.1:9", "--deadline", "3")
    assert done.returncode == 2
    assert "127.0.0.1:9" in done.stderr.splitlines()[-1]


def test_unreadable_checkpoint(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("train.bin", "validation.bin"):
        (out / name).write_bytes((whole / name).read_bytes())
    config = json.loads((whole / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "workers": 1}))
    (out / "autolrs").mkdir()
    (out / "autolrs" / "step-00000010.ckpt").write_bytes(b"not a checkpoint")
    done = finish(out, "--resume")
    assert done.returncode == 2
    assert "needs a checkpoint that is whole" in done.stderr.splitlines()[-1]


def test_a_second_demo_in_the_same_folder_is_refused(whole: Path) -> None:
    import fcntl

    with (whole / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = finish(whole, "--resume")
    assert done.returncode == 2
    assert "one demo at a time" in done.stderr


def test_resume_with_other_options_is_refused(whole: Path) -> None:
    done = finish(whole, "--resume", "--size", "small")
    assert done.returncode == 2
    assert "got --size small" in done.stderr


def test_a_finished_run_resumes_to_its_table(whole: Path) -> None:
    done = finish(whole, "--resume")
    assert done.returncode == 0
    assert "bits a byte" in done.stderr


@pytest.mark.gpu
def test_the_demo_on_gpus(tmp_path: Path) -> None:
    done = finish(tmp_path / "run", "--size", "tiny", "--steps", "60")
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path / "run")["autolrs"]["val_bits"] < 6
