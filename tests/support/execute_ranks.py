"""Ranks of one test, as engines of this process or as processes of their own."""

import contextlib
import importlib.util
import inspect
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainkit.collectives import Schedule
from trainkit.collectives.execute._mesh import Mesh
from trainkit.collectives.execute._program import compile_rank
from trainkit.collectives.execute._tcp import TcpTransport


class Engines:
    """One TCP engine per rank, all of them in this process and connected to each other."""

    def __init__(self, size: int, timeout_s: float = 20.0) -> None:
        store = dist.HashStore()
        self.transports = [
            TcpTransport(Mesh(dist.PrefixStore("ranks", store), rank, "127.0.0.1", timeout_s), timeout_s)
            for rank in range(size)
        ]
        self.each(lambda rank: self.transports[rank].prepare(set(range(size)) - {rank}))

    def each(self, call: Callable[[int], None]) -> None:
        errors: list[BaseException] = []

        def guarded(rank: int) -> None:
            try:
                call(rank)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(len(self.transports))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def run(self, schedule: Schedule, buffers: list[torch.Tensor]) -> None:
        """In place on all ranks."""
        works = [
            self.transports[rank].start(compile_rank(schedule, rank), buffers[rank])
            for rank in range(len(schedule.ranks))
        ]
        for work in works:
            work.wait()

    def close(self) -> None:
        for transport in self.transports:
            transport.close()


@contextlib.contextmanager
def engines(size: int, timeout_s: float = 20.0) -> Iterator[Engines]:
    made = Engines(size, timeout_s)
    try:
        yield made
    finally:
        made.close()


# Ranks are forked from a process in which nothing has run: its imports are there, no thread and no GPU is.
RANKS = multiprocessing.get_context("forkserver")


def module_at(where: str | Path) -> types.ModuleType:
    """A file of tests as a module; by the name that pytest gives it, no other process can import it."""
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def preload() -> None:
    """Have what is imported here imported in the process that ranks are forked from."""
    slow = ("torch", "torch._dynamo", "pytest", "hypothesis", "torchmetrics", "pytorch_lightning")
    RANKS.set_forkserver_preload([name for name in sys.modules if name in slow or name.startswith("trainkit")])
    forkserver.ensure_running()


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Call `function(...)` of a file of tests in a process of its own."""
    process = RANKS.Process(target=_call, args=(inspect.getfile(function), function.__name__, arguments), daemon=True)
    process.start()
    return process


def _call(where: str, name: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    getattr(module_at(where), name)(*arguments)
    os._exit(0)  # a group whose member was killed cannot be destroyed


def _rank(
    where: str, name: str, rank: int, size: int, port: int, backend: str, arguments: tuple[Any, ...], results: Any
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size)
    )
    try:
        if backend:
            dist.init_process_group(backend)
        results.put((rank, getattr(module_at(where), name)(rank, *arguments), ""))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()


def processes(
    function: Callable[..., Any],
    size: int,
    *arguments: Any,
    backend: str = "gloo",
    deadline_s: float = 90.0,
    expect: int = -1,
) -> dict[int, Any]:
    """Call `function(rank, ...)` in processes of one group; rank -> what it returned, for those that lived to return."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = RANKS.Queue()
    what = inspect.getfile(function), function.__name__
    started = [start(_rank, *what, rank, size, port, backend, arguments, results) for rank in range(size)]
    try:
        until = time.monotonic() + deadline_s
        got: dict[int, Any] = {}
        while len(got) < (size if expect < 0 else expect):
            rank, value, error = results.get(timeout=max(until - time.monotonic(), 0.1))
            assert not error, f"rank {rank} of {size}: {error}"
            got[rank] = value
        return got
    finally:
        for process in started:
            process.kill()
            process.join()
