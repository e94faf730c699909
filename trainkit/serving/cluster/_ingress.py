"""The one ingress replica: HTTP in, the pure scheduler inside, batches out to pinned workers."""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from trainkit.serving.autoscaling import Autoscaler
from trainkit.serving.cluster import _membership
from trainkit.serving.engine._metrics import Metrics
from trainkit.serving.engine._options import ServeOptions
from trainkit.serving.engine._requests import Refused, authorise, deadline_of, model_of, read_json
from trainkit.serving.scheduler import Action, Dispatch, Scheduler

_logger = logging.getLogger(__name__)
_WINDOW_S = 1.0
# What a batch may take beyond twice its profile, once its replica is no longer among those that serve.
_PATIENCE_S = 0.5


@dataclass
class _Request:
    model: int
    input: Any
    deadline: int
    done: "asyncio.Future[tuple[int, dict[str, Any]]]"
    deaths: int = 0


class Ingress:
    """Holds the scheduler; its event loop is the scheduler's clock and driver."""

    def __init__(self, options: ServeOptions, autoscaler: Autoscaler | None, workers: Any) -> None:
        self._options, self._autoscaler, self._workers = options, autoscaler, workers
        self._names = list(options.models)
        self._margin = (
            round(options.margin_ms * 1e6) // 2
        )  # as on one machine: half to be late in, half for the way back
        self._scheduler = Scheduler(options.profiles, 0, drop=options.drop, jitter_ns=self._margin)
        self._gpus: dict[int, str] = {}  # number -> replica
        self._left: dict[str, asyncio.Event] = {}
        self._open: dict[int, _Request] = {}
        self._next = self._wanted = 0
        self._metrics = Metrics()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._begun = False
        self._touched: set[int] = set()
        self._ended = self._bad = 0

    async def __call__(self, request: Request) -> Response:
        """Any path."""
        if not self._begun:
            await self._begin()
        path = request.url.path
        if path == "/health":
            return Response("ok" if self._gpus else "not ready", 200 if self._gpus else 503)
        try:
            authorise(request.headers, self._options.token)
            if path == "/metrics":
                self._metrics.open(len(self._open))
                self._metrics.state(self._state)
                return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")
            if path == "/v1/models":
                return JSONResponse({"models": {name: {"slo_ms": self._options.slo_ms[name]} for name in self._names}})
            if path != "/predict" or request.method != "POST":
                raise Refused(404, "there are POST /predict, GET /v1/models, /metrics and /health")
            return await self._predict(request)
        except Refused as refused:
            retry = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
            return JSONResponse({"detail": str(refused)}, refused.status, retry)

    @property
    def _state(self) -> dict[str, int]:
        return {"waiting": self._scheduler.waiting, "idle": self._scheduler.idle_gpus, "gpus": len(self._gpus)}

    async def _begin(self) -> None:
        """The first call brings the router to life, which then says which replicas there are."""
        self._begun = True
        loop = asyncio.get_running_loop()
        await self._workers.remote(None, "", (), 0)

        def hear(names: list[str]) -> None:
            loop.call_soon_threadsafe(self._replicas, names)

        _membership.listen(hear)
        await asyncio.sleep(0)  # what it said is taken in before the first request
        self._keep(self._watch())

    def _keep(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _replicas(self, names: list[str]) -> None:
        """What left is given no more batches, what came is."""
        now = time.monotonic_ns()
        for number in [number for number, name in self._gpus.items() if name not in names]:
            self._left.pop(self._gpus.pop(number)).set()
            self._scheduler.remove_gpu(number, now)
        for name in names:
            if name not in self._gpus.values():
                number = next(n for n in range(len(self._gpus) + 1) if n not in self._gpus)
                self._gpus[number] = name
                self._left[name] = asyncio.Event()
                self._act(self._scheduler.add_gpu(number, now))
        self._arm()

    async def _predict(self, request: Request) -> Response:
        arrived = time.monotonic_ns()
        body = await read_json(request.stream(), self._options.max_body_bytes)
        name = model_of(body.get("model"), self._names)
        deadline = deadline_of(body, self._options.slo_ms[name], arrived)
        if len(self._open) >= self._options.max_waiting:
            raise Refused(503, f"{self._options.max_waiting} requests are open already", 1)
        id = self._next = self._next + 1
        done: asyncio.Future[tuple[int, dict[str, Any]]] = asyncio.get_running_loop().create_future()
        self._open[id] = _Request(self._names.index(name), body["input"], deadline, done)
        self._ask(id)
        status = 499
        answer: dict[str, Any] = {}
        try:
            status, answer = await done
        finally:  # Ray cancels us where the client hangs up
            if self._open.pop(id, None) is not None:
                self._act(self._scheduler.cancel([id], time.monotonic_ns()))
                self._arm()
            ended = time.monotonic_ns()
            late = status == 200 and ended > deadline
            self._ended += 1
            self._bad += late or status == 503
            outcome = "late" if late else str(status)
            self._metrics.answered(name, outcome, (ended - arrived) / 1e9, answer.get("batch"))
        return JSONResponse(answer, status, {"Retry-After": "1"} if status == 503 else {})

    def _ask(self, id: int) -> None:
        one = self._open[id]
        self._act(self._scheduler.on_request(id, one.model, one.deadline - self._margin, time.monotonic_ns()))
        self._arm()

    def _act(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            if isinstance(action, Dispatch):
                self._touched.add(action.gpu)
                self._keep(self._run(action, self._gpus[action.gpu]))
            else:
                for id in action.ids:
                    self._finish(id, 503, {"detail": "the deadline cannot be met at this load"})

    def _arm(self) -> None:
        """One timer, at the scheduler's next."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._scheduler.next_timer
        if due is not None:
            wait = max(0.0, (due - time.monotonic_ns()) / 1e9)
            self._timer = asyncio.get_running_loop().call_later(wait, self._tick)

    def _tick(self) -> None:
        self._act(self._scheduler.on_timer(time.monotonic_ns()))
        self._arm()

    async def _run(self, action: Dispatch, replica: str) -> None:
        """A batch on its replica. If that dies, its requests run again, once and within their deadlines."""
        inputs = [self._open[id].input if id in self._open else None for id in action.ids]
        left = self._left[replica]
        call = asyncio.ensure_future(self._called(replica, self._names[action.model], inputs))
        gone = asyncio.ensure_future(left.wait())
        await asyncio.wait({call, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        # one that was told to go ends its batch first; a call to a dead one may stay without an answer for ever
        patience = 2 * self._options.profiles[self._names[action.model]].latency_ns[len(inputs) - 1] / 1e9 + _PATIENCE_S
        await asyncio.wait({call}, timeout=patience)
        values = call.result() if call.done() else None
        if values is None:
            call.cancel()
            if self._gpus.get(action.gpu) == replica:
                self._replicas([name for name in self._gpus.values() if name != replica])
            for id in action.ids:
                if (one := self._open.get(id)) is not None:
                    one.deaths += 1
                    if one.deaths > 1:
                        self._finish(id, 500, {"detail": "two replicas died while they ran this request"})
                    else:
                        self._ask(id)
            return
        for id, (good, value) in zip(action.ids, values, strict=True):
            if good:
                self._finish(id, 200, {"output": value, "batch": len(values), "gpu": action.gpu})
            else:
                self._finish(id, value[0], {"detail": value[1]})
        if self._gpus.get(action.gpu) == replica:
            self._act(self._scheduler.on_gpu_free(action.gpu, time.monotonic_ns()))
            self._arm()

    async def _called(self, replica: str, model: str, inputs: list[Any]) -> Any:
        """The batch's answers; None where the replica failed."""
        try:
            return await self._workers.remote(replica, model, inputs, self._wanted)
        except Exception as error:
            _logger.warning("replica %s failed: %s", replica, type(error).__name__)
            return None

    def _finish(self, id: int, status: int, body: dict[str, Any]) -> None:
        one = self._open.pop(id, None)
        if one is not None and not one.done.done():
            one.done.set_result((status, body))

    async def _watch(self) -> None:
        """After each window the autoscaler decides; the workers carry the figure to Ray's controller."""
        while self._autoscaler is not None:
            await asyncio.sleep(_WINDOW_S)
            there = len(self._gpus)
            if there == 0:
                continue
            untouched = sum(number not in self._touched for number in self._gpus)
            self._wanted = self._autoscaler.observe(
                time.monotonic(),
                there,
                starting=max(0, self._wanted - there),
                answered=self._ended,
                bad=self._bad,
                untouched=untouched,
            )
            self._ended = self._bad = 0
            self._touched.clear()
            for replica in self._gpus.values():
                self._keep(self._tell(replica))

    async def _tell(self, replica: str) -> None:
        try:
            await asyncio.wait_for(self._workers.remote(replica, "", (), self._wanted), _WINDOW_S)
        except Exception:  # it is gone: the router says so by itself
            return
