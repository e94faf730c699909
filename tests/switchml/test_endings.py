"""Three ranks, a switch that is restarted on its port, a rank that is stopped for longer than the limit: every run ends.

Each rank dumps the stacks of its threads where it has not ended long after it should have.
"""

import contextlib
import datetime
import faulthandler
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from execute_ranks import RANKS, start

from trainkit.switchml import SoftwareSwitch, SwitchMLError, SwitchMLState, _failover

_LIMIT = 75.0
"""Seconds after which a run is said to hang: some twenty times the waits that its faults can cause."""


def _work(rank: int, folder: str, switch: str, fallback: Any, told: Any) -> None:
    dump = open(f"{folder}/stacks{rank}", "w")  # noqa: SIM115 (for as long as the process lives)
    faulthandler.dump_traceback_later(_LIMIT - 10, file=dump)
    _failover._RETRY, _failover._RETRY_FOR = 0.5, 1.0
    limit = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3, timeout=limit)
    state = SwitchMLState(switch, timeout_s=1.0, fallback=fallback, elements=64, channels=1)
    told.send("ready")
    ended = "all right"
    try:
        for step in range(150):
            got = state.average(torch.full((700,), float(rank + step))).wait()
            assert torch.equal(got, torch.full((700,), step + 1.0)), f"step {step}: {got[0]}"
            time.sleep(0.01)
    except RuntimeError as error:
        named = error if isinstance(error, SwitchMLError) else state.error
        ended = f"{type(named).__name__}: {named}" if named else f"unnamed: {error}"
    state.close()
    told.send(ended)
    told.close()


def _run(seed: int) -> list[str]:
    """What each rank came to."""
    seeded = random.Random(seed)
    fallback = seeded.choice(["error", "allreduce"])
    with tempfile.TemporaryDirectory() as folder:
        switch = SoftwareSwitch()
        ranks = []
        for rank in range(3):
            ours, theirs = RANKS.Pipe()
            ranks.append((start(_work, rank, folder, switch.address, fallback, theirs), ours))
            theirs.close()
        try:
            ended = [told.recv() for _, told in ranks]
            for _ in range(seeded.randint(1, 2)):
                time.sleep(seeded.random())
                if seeded.random() < 0.5:
                    switch.close()
                    time.sleep(seeded.choice([0.0, 0.3, 1.5]))
                    switch = SoftwareSwitch(switch.address)
                else:
                    stopped = seeded.choice(ranks)[0].pid
                    assert stopped is not None
                    with contextlib.suppress(ProcessLookupError):  # it has ended
                        os.kill(stopped, signal.SIGSTOP)
                        time.sleep(seeded.choice([0.2, 1.6, 2.5]))
                        os.kill(stopped, signal.SIGCONT)
            until = time.monotonic() + _LIMIT
            for rank, (_, told) in enumerate(ranks):
                if not told.poll(max(0.0, until - time.monotonic())):
                    stacks = Path(folder, f"stacks{rank}").read_text()
                    raise AssertionError(f"run {seed} ({fallback}): rank {rank} has not ended\n{stacks}")
                ended[rank] = told.recv()
            return [f"{fallback}: {words}" for words in ended]
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()
            switch.close()


@pytest.mark.parametrize(
    "runs", [range(1000, 1006), pytest.param(range(200), marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_every_run_ends_with_right_sums_or_a_named_error(runs: range) -> None:
    seeds = iter(runs)
    told: list[str] = []
    failed: list[str] = []
    lock = threading.Lock()

    def some() -> None:
        while True:
            with lock:
                seed = next(seeds, None)
            if seed is None:
                return
            try:
                told.extend(_run(seed))
            except Exception as error:
                failed.append(f"run {seed}: {error!r}")

    threads = [threading.Thread(target=some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed += [words for words in told if "unnamed" in words]
    assert not failed, "\n".join(failed)
    assert len(told) == 3 * len(runs) and any("all right" in words for words in told)
