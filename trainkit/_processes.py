"""Worker processes of one machine: they die with their parent, and one that fails is named."""

import ctypes
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05
_STDERR = 2


class WorkerFailed(RuntimeError):
    """A worker ended without finishing; the message names it."""


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, whose pid is `parent`, is gone.

    Raises:
        SystemExit: it is gone already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the parent process is gone")


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class Workers:
    """`count` processes that run `python -m MODULE JOB`, where JOB is `job` plus rank, world size and a port to meet at.

    A worker writes the error it ends with to `error-RANK.txt` in `logs`; its output goes to `worker-RANK.log` there.

    Args:
        module: to run.
        job: what to do, JSON-able.
        count: of processes.
        logs: folder.
        grace_s: how long the others may take to end by themselves after one has failed.
        shown: rank 0's output goes to our standard error instead: a progress bar.
    """

    def __init__(
        self, module: str, job: dict[str, Any], *, count: int, logs: Path, grace_s: float, shown: bool = True
    ) -> None:
        self._logs, self._grace_s = logs, grace_s
        logs.mkdir(parents=True, exist_ok=True)
        for stale in logs.glob("error-*.txt"):
            stale.unlink()
        port = free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(count):
            words = json.dumps({**job, "rank": rank, "world_size": count, "port": port, "parent": os.getpid()})
            with (logs / f"worker-{rank}.log").open("ab") as log:
                output = _STDERR if shown and rank == 0 else log
                self._processes.append(
                    subprocess.Popen(
                        # -P: a source tree in the working directory must not hide the installed package
                        [sys.executable, "-P", "-m", module, words],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        # DDP's C++ warnings are about options that are chosen on purpose here
                        env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"},
                    )
                )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def wait(self, timeout_s: float = math.inf) -> None:
        """Wait until all are done.

        Args:
            timeout_s: longest wait.

        Raises:
            WorkerFailed: one was not; the first to go is named, with what it said.
        """
        end = time.monotonic() + timeout_s
        while (codes := self._codes()).count(0) < len(codes):
            if time.monotonic() > end:
                raise WorkerFailed(f"worker {codes.index(None)} of {len(codes)} has not ended within {timeout_s:g} s")
            if any(codes):
                first = next(rank for rank, code in enumerate(codes) if code)
                self._let_the_others_end()
                raise WorkerFailed(self._obituary(first))
            time.sleep(_POLL_S)

    def _codes(self) -> Sequence[int | None]:
        return [process.poll() for process in self._processes]

    def _let_the_others_end(self) -> None:
        deadline = time.monotonic() + self._grace_s
        while None in self._codes() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _obituary(self, rank: int) -> str:
        process = self._processes[rank]
        code = process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        said = self._logs / f"error-{rank}.txt"
        what = f": {said.read_text().strip()}" if said.exists() else ""
        return f"worker {rank} of {len(self._processes)} (pid {process.pid}) {how}{what}"
