"""The scheduler process: drains LitServe's queue, decides with the pure core, owns the GPU processes."""

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import litserve
from litserve.loops.base import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType

from trainkit.serving.engine._gpu import GpuProcess, run_batches
from trainkit.serving.engine._http import ANSWERS
from trainkit.serving.engine._logs import configure
from trainkit.serving.engine._models import ModelError
from trainkit.serving.engine._options import ServeOptions
from trainkit.serving.engine._replicas import Replicas
from trainkit.serving.scheduler import Action, Dispatch, Scheduler

_logger = logging.getLogger(__name__)
# A GPU process that does not come back is tried again after this.
_RESTART_S = 1.0
# How old the state may be that metrics and the live page show while nothing is answered.
_STATE_S = 0.9
# LitServe looks for a dead scheduler every 2 s.
_PULL_S = 0.5


@dataclass
class _Request:
    """One open request."""

    consumer: int
    uid: str
    model: int
    input: Any
    deadline: int  # ns
    deaths: int = 0  # GPU processes that died while they ran it


class Api(litserve.LitAPI):  # type: ignore[misc]
    """LitServe's view of the models: set up is what makes it ready."""

    def __init__(self, options: ServeOptions, **named: Any) -> None:
        super().__init__(**named)
        self.options = options
        self.gpus: list[GpuProcess] = []
        self.languages: list[tuple[str, GpuProcess]] = []

    def setup(self, device: str) -> None:
        """Start a process for each device and wait until all are warm."""
        configure(self.options.json)
        if self.options.models:
            self.gpus = [GpuProcess(name, run_batches, self.options.models) for name in self.options.devices]
        self.languages = Replicas.start(self.options)
        deadline = time.monotonic() + self.options.startup_timeout_s
        try:
            for process in [*self.gpus, *(one for _, one in self.languages)]:
                process.wait_ready(max(0.0, deadline - time.monotonic()))
        except ModelError as error:
            print(f"trainkit serve: {error}", file=sys.stderr, flush=True)
            raise
        _logger.info("ready: %d processes", len(self.gpus) + len(self.languages))

    def predict(self, x: Any) -> Any:
        """Never called: batches run in the GPU processes."""
        raise NotImplementedError


class SchedulerLoop(LitLoop):  # type: ignore[misc]
    """LitServe's one inference worker is the scheduler."""

    def run(
        self,
        lit_api: Api,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: Any,
        workers_setup_status: Any,
        callback_runner: Any,
    ) -> None:
        """Serve until the process ends."""
        _Service(self, lit_api, request_queue, transport).run()


class _Service:
    def __init__(self, loop: SchedulerLoop, api: Api, requests: Any, transport: Any) -> None:
        options = api.options
        self._loop, self._options, self._queue, self._transport = loop, options, requests, transport
        self._names = list(options.models)
        # A batch aims at the whole margin before its deadline. Were that its last moment, a timer that fires a little
        # late would drop it: half of the margin is for us to be late in, half for the answer's way back.
        self._margin = round(options.margin_ms * 1e6) // 2
        self._scheduler = Scheduler(options.profiles, len(api.gpus), drop=options.drop, jitter_ns=self._margin)
        self._gpus: dict[int, GpuProcess] = dict(enumerate(api.gpus))
        self._starting: dict[int, GpuProcess] = {}  # replacements that load
        self._reloading: deque[int] = deque()
        self._restarts: list[tuple[float, int]] = []
        self._running: dict[int, tuple[int, ...]] = {}
        self._open: dict[int, _Request] = {}
        self._ids: dict[str, int] = {}
        self._next = 0
        self._answers: dict[int, list[tuple[str, Any]]] = {0: []}
        self._languages = Replicas(options, self._answer)
        self._languages.adopt(api.languages)
        self._told: tuple[float, dict[str, int]] = (0.0, {})
        self._inbox: deque[Any] = deque()

    def run(self) -> None:
        bell, ring = Pipe(duplex=False)
        threading.Thread(target=self._pull, args=(ring,), daemon=True).start()
        parent = os.getppid()
        while os.getppid() == parent:
            pipes: dict[Any, int] = {g.pipe: number for number, g in [*self._gpus.items(), *self._starting.items()]}
            replicas: dict[Any, Any] = self._languages.pipes
            for ready in wait([bell, *pipes, *replicas], self._patience()):
                if ready is bell:
                    bell.recv_bytes()
                    self._take()
                elif ready in pipes:
                    self._hear(pipes[ready], ready)  # type: ignore[arg-type]
                else:
                    self._languages.hear(replicas[ready])
            self._act(self._scheduler.on_timer(time.monotonic_ns()))
            self._restart()
            self._languages.tick()
            self._flush()

    def _patience(self) -> float:
        """Seconds until something is due without a message."""
        timer = self._scheduler.next_timer
        due = [1.0]  # look for the parent
        if timer is not None:
            due.append((timer - time.monotonic_ns()) / 1e9)
        due += [at - time.monotonic() for at in [*self._languages.due, *(at for at, _ in self._restarts)]]
        return max(0.0, min(due))

    def _pull(self, ring: Connection) -> None:
        """Bring LitServe's queue to the main thread.

        If we are killed within `get`, the queue's own process goes on waiting for us and swallows the next message:
        with a time limit it has given up before a new scheduler starts.
        """
        with contextlib.suppress(EOFError, OSError):
            while True:
                try:
                    message = self._queue.get(timeout=_PULL_S)
                except queue.Empty:
                    continue
                self._inbox.append(message)
                ring.send_bytes(b"x")

    def _take(self) -> None:
        consumer, _, _, messages = self._inbox.popleft()
        for uid, (kind, *words) in messages:
            self._handle(consumer, uid, kind, words)

    def _handle(self, consumer: int, uid: str, kind: str, words: list[Any]) -> None:
        if kind == "cancel":
            id = self._ids.pop(uid, None)
            if id is None:
                self._languages.cancel(uid)
            else:
                del self._open[id]
                self._act(self._scheduler.cancel([id], time.monotonic_ns()))
        elif kind == "reload":
            self._reloading = deque(self._gpus)
            self._replace_next()
            count = len(self._gpus) + self._languages.reload()
            _logger.info("reload of %d processes", count)
            self._answer(consumer, uid, (202, {"reloading": count}))
        elif kind == "complete":
            self._languages.request(consumer, uid, *words)
        else:
            model, deadline, value = words
            id = self._next = self._next + 1
            self._open[id] = _Request(consumer, uid, model, value, deadline)
            self._ids[uid] = id
            self._act(self._scheduler.on_request(id, model, deadline - self._margin, time.monotonic_ns()))

    def _act(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            if isinstance(action, Dispatch):
                # an id may have been cancelled and dispatched within one event: it runs for nobody
                inputs = [self._open[id].input if id in self._open else None for id in action.ids]
                self._running[action.gpu] = action.ids
                self._gpus[action.gpu].send((self._names[action.model], inputs))
            else:
                for id in action.ids:
                    self._finish(id, 503, {"detail": "the deadline cannot be met at this load", "retry_after": 1})

    def _hear(self, number: int, pipe: Connection) -> None:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            self._lost(number, pipe)
            return
        if (fresh := self._starting.get(number)) is not None and fresh.pipe is pipe:
            try:
                fresh.started(message)
            except ModelError as error:
                _logger.error("a model does not load again: %s", error)
                self._lost(number, pipe)
                return
            if number not in self._running:
                self._install(number)
            return
        size = len(self._running[number])
        for id, (good, value) in zip(self._running.pop(number), message[1], strict=True):
            if good:
                self._finish(id, 200, {"output": value, "batch": size, "gpu": number})
            else:
                self._finish(id, value[0], {"detail": value[1]})
        if (fresh := self._starting.get(number)) is not None and fresh.ready:
            self._scheduler.remove_gpu(number, time.monotonic_ns())
            self._install(number)
        else:
            self._act(self._scheduler.on_gpu_free(number, time.monotonic_ns()))

    def _install(self, number: int) -> None:
        """A loaded replacement takes the place of the process before it, which runs nothing."""
        now = time.monotonic_ns()
        if (old := self._gpus.pop(number, None)) is not None:
            with contextlib.suppress(ValueError):
                self._scheduler.remove_gpu(number, now)
            old.close()
        self._gpus[number] = self._starting.pop(number)
        self._replace_next()
        self._act(self._scheduler.add_gpu(number, now))

    def _replace_next(self) -> None:
        """Reload one device at a time, so that its memory holds the models twice on one device only."""
        if self._starting or not self._reloading:
            return
        number = self._reloading.popleft()
        self._starting[number] = GpuProcess(self._options.devices[number], run_batches, self._options.models)

    def _lost(self, number: int, pipe: Connection) -> None:
        """A GPU process is gone: what it ran runs again, once and within its deadline."""
        pipe.close()
        if (fresh := self._starting.get(number)) is not None and fresh.pipe is pipe:
            del self._starting[number]
            if number not in self._gpus:
                self._restarts.append((time.monotonic() + _RESTART_S, number))
            self._replace_next()
            return
        _logger.warning("the process of GPU %d (%s) died; a new one loads", number, self._options.devices[number])
        now = time.monotonic_ns()
        del self._gpus[number]
        self._scheduler.remove_gpu(number, now)
        if number in self._starting:
            if self._starting[number].ready:
                self._running.pop(number, None)
                self._install(number)
        else:
            self._restarts.append((time.monotonic(), number))
        for id in self._running.pop(number, ()):
            request = self._open.get(id)
            if request is None:
                continue
            request.deaths += 1
            if request.deaths > 1:
                self._finish(id, 500, {"detail": "two GPU processes died while they ran this request"})
            else:
                self._act(self._scheduler.on_request(id, request.model, request.deadline - self._margin, now))

    def _restart(self) -> None:
        now = time.monotonic()
        due = [number for at, number in self._restarts if at <= now]
        self._restarts = [(at, number) for at, number in self._restarts if at > now]
        for number in due:
            self._starting[number] = GpuProcess(self._options.devices[number], run_batches, self._options.models)

    def _finish(self, id: int, status: int, body: dict[str, Any]) -> None:
        request = self._open.pop(id, None)
        if request is not None:  # else its client is gone
            self._ids.pop(request.uid, None)
            self._answer(request.consumer, request.uid, (status, body))

    def _answer(self, consumer: int, uid: str, what: Any) -> None:
        self._answers.setdefault(consumer, []).append((uid, what))

    def _flush(self) -> None:
        """One message a server process for all that was answered since; a changed state at least once a second."""
        at, told = self._told
        now = time.monotonic()
        state = {"waiting": self._scheduler.waiting, "idle": self._scheduler.idle_gpus, "gpus": len(self._gpus)}
        state |= self._languages.state
        for consumer, answers in self._answers.items():
            if answers or (state != told and now >= at + _STATE_S):
                self._told = (now, state)
                self._loop.put_response(
                    self._transport, consumer, ANSWERS, (answers, state), LitAPIStatus.OK, LoopResponseType.REGULAR
                )
                self._answers[consumer] = []
