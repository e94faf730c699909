"""The HTTP side, in LitServe's own server: one LitSpec with the endpoints."""

import asyncio
import contextlib
import functools
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from litserve.specs.base import LitSpec
from starlette.requests import ClientDisconnect

from trainkit.serving.engine._completions import DONE, Answer, Piece, event, read
from trainkit.serving.engine._metrics import Metrics
from trainkit.serving.engine._options import ServeOptions
from trainkit.serving.engine._requests import Refused, authorise, deadline_of, model_of, read_json

# The name of what stands for many answers in LitServe's buffer.
ANSWERS = "answers"
# After its deadline a request is answered by us, whatever has become of the scheduler.
_GRACE_S = 1.5
# A text that has begun and then stands still for so long will not go on.
_STALL_S = 30.0


class _Answers:
    """An entry of LitServe's buffer of responses that stands for many: the scheduler answers a batch by one message."""

    worker_id = None

    def __init__(self, buffer: dict[str, Any], state: Callable[[dict[str, int]], None]) -> None:
        self._buffer, self._state = buffer, state
        self.response: Any = None
        self.event = self

    def is_set(self) -> bool:
        return True

    def set(self) -> None:
        answers, state = self.response[0]
        self._state(state)
        for uid, answer in answers:
            sink = self._buffer.get(uid)
            if sink is not None:  # else its client is gone
                sink(answer)


class Endpoints(LitSpec):  # type: ignore[misc]
    """Predictions, completions, what is served, metrics, the live page, reload."""

    def __init__(self, options: ServeOptions) -> None:
        super().__init__()
        self.options = options
        self._numbers = {name: number for number, name in enumerate(options.models)}
        self._metrics: Metrics | None = None
        self._outbox: list[tuple[str, tuple[Any, ...]]] = []
        self._sending = False
        self._sender: asyncio.Future[None] | None = None
        self.api_path = "/predict"

    def __getstate__(self) -> dict[str, Any]:
        """What the scheduler's process gets: nothing of the server's."""
        kept: dict[str, Any] = super().__getstate__()
        return kept | {
            "response_buffer": None,
            "request_queue": None,
            "data_streamer": None,
            "_metrics": None,
            "_sender": None,
        }

    def pre_setup(self, lit_api: Any) -> None:
        """Register the endpoints."""
        self.add_endpoint("/predict", self.predict, ["POST"])
        self.add_endpoint("/v1/models/{name}:predict", self.predict, ["POST"])
        self.add_endpoint("/v1/completions", self.completions, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/metrics", self.metrics_text, ["GET"])
        self.add_endpoint("/live", self.live, ["GET"])
        self.add_endpoint("/live/data", self.live_data, ["GET"])
        self.add_endpoint("/admin/reload", self.reload, ["POST"])

    def setup(self, server: Any) -> None:
        """Where requests go and answers come from."""
        super().setup(server)
        self.response_buffer[ANSWERS] = _Answers(self.response_buffer, lambda state: self.metrics.state(state))

    def decode_request(self, request: Any, context_kwargs: Any = None) -> Any:
        """Never called: bodies are read by the endpoints."""
        raise NotImplementedError

    def encode_response(self, output: Any, context_kwargs: Any = None) -> Any:
        """Never called: answers are written by the endpoints."""
        raise NotImplementedError

    @property
    def metrics(self) -> Metrics:
        """Of this server process."""
        if self._metrics is None:
            self._metrics = Metrics()
        return self._metrics

    @property
    def _open(self) -> int:
        return len(self.response_buffer) - 1  # ANSWERS is no request

    def _room(self) -> None:
        if self._open >= self.options.max_waiting:
            raise Refused(503, f"{self.options.max_waiting} requests are open already", 1)

    async def _body(self, request: Request) -> dict[str, Any]:
        authorise(request.headers, self.options.token)
        try:
            return await read_json(request.stream(), self.options.max_body_bytes)
        except ClientDisconnect:
            raise Refused(499, "the client left") from None

    async def predict(self, request: Request) -> Response:
        """One input, one output, within the objective or a 503."""
        arrived = time.monotonic_ns()
        name, deadline = "-", arrived
        try:
            body = await self._body(request)
            name = model_of(request.path_params.get("name", body.get("model")), self._numbers)
            deadline = deadline_of(body, self.options.slo_ms[name], arrived)
            self._room()
            payload = ("infer", self._numbers[name], deadline, body["input"])
            status, answer = await self._scheduled(request, payload, deadline)
        except Refused as refused:
            status, answer = refused.status, refused.answer
        ended = time.monotonic_ns()
        late = status == 200 and ended > deadline
        self.metrics.answered(name, "late" if late else str(status), (ended - arrived) / 1e9, answer.get("batch"))
        try:
            return _reply(status, answer)
        except ValueError:  # not a number, for one
            return JSONResponse({"detail": "the model's output is not JSON"}, 500)

    async def _scheduled(self, request: Request, payload: tuple[Any, ...], deadline: int) -> Any:
        """The scheduler's answer; 499 where the client left; 503 where the scheduler is gone."""
        answers: asyncio.Queue[Any] = asyncio.Queue()
        with self._asked(payload, answers.put_nowait), _hangs_up(request) as gone:
            return await _next(answers, gone, (deadline - time.monotonic_ns()) / 1e9 + _GRACE_S)

    @contextlib.contextmanager
    def _asked(self, payload: tuple[Any, ...], sink: Callable[[Any], None]) -> Any:
        """Ask the scheduler; its answers go to `sink`. Who leaves with an error no longer wants one."""
        uid = uuid.uuid4().hex
        self.response_buffer[uid] = sink
        self._send(uid, payload)
        try:
            yield
        except BaseException:
            self._send(uid, ("cancel",))
            raise
        finally:
            del self.response_buffer[uid]

    def _send(self, uid: str, payload: tuple[Any, ...]) -> None:
        """To the scheduler: what comes while the last message is under way goes together."""
        self._outbox.append((uid, payload))
        if not self._sending:
            self._sending = True
            self._sender = asyncio.ensure_future(self._flush())

    async def _flush(self) -> None:
        try:
            while self._outbox:
                sent, self._outbox = self._outbox, []
                with contextlib.suppress(OSError, EOFError):  # unheard requests are answered when their time is over
                    await asyncio.to_thread(self.request_queue.put, (self.response_queue_id, "", 0.0, sent))
        finally:
            self._sending = False

    async def completions(self, request: Request) -> Response:
        """OpenAI's completions, whole or as server-sent events."""
        arrived = time.monotonic_ns()
        name, pieces = "-", None
        try:
            body = await self._body(request)
            if not self.options.languages:
                raise Refused(404, "no language model is served here; POST /predict")
            name = model_of(body.get("model"), self.options.languages)
            asks = read(body)
            self._room()
            deadline = arrived + round(self.options.languages[name].objective.ttft_ms * 1e6)
            pieces = self._pieces(request, name, asks, arrived, deadline)
            answer = Answer(uuid.uuid4().hex, name, len(asks))
            if not body.get("stream", False):
                async for index, piece in pieces:
                    answer.add(index, piece)
                return JSONResponse(answer.whole())
            first = await anext(pieces)  # so that a refusal has its status
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(_events(answer, first, pieces, usage), media_type="text/event-stream")
        except Refused as refused:
            if pieces is None:  # they count by themselves
                self.metrics.answered(name, str(refused.status), (time.monotonic_ns() - arrived) / 1e9, None)
            return _reply(refused.status, refused.answer)

    async def _pieces(
        self, request: Request, name: str, asks: Any, arrived: int, deadline: int
    ) -> AsyncIterator[tuple[int, Piece]]:
        """(prompt, piece) as they come.

        Raises:
            Refused: by the scheduler, or it is gone.
        """
        merged: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        outcome = "499"
        with contextlib.ExitStack() as stack, _hangs_up(request) as gone:
            for index, ask in enumerate(asks):
                sink = functools.partial(lambda at, what: merged.put_nowait((at, what)), index)
                stack.enter_context(self._asked(("complete", name, ask, deadline), sink))
            running, counts, first = set(range(len(asks))), [0] * len(asks), 0
            patience = (deadline - time.monotonic_ns()) / 1e9 + _GRACE_S
            try:
                while running:
                    index, what = await _next(merged, gone, patience)
                    patience = _STALL_S
                    if not isinstance(what, Piece):
                        raise Refused(*what)
                    now = time.monotonic_ns()
                    first = first or now
                    self.metrics.tokens(name, what.tokens - counts[index])
                    counts[index] = what.tokens
                    if what.finish is not None:
                        running.discard(index)
                        between = (now - first) / 1e9 / (what.tokens - 1) if what.tokens > 1 else None
                        self.metrics.pace(name, (first - arrived) / 1e9, between)
                    if what.text or what.finish is not None:
                        yield index, what
                outcome = "late" if first > deadline else "200"
            except Refused as refused:
                outcome = str(refused.status)
                raise
            finally:
                self.metrics.answered(name, outcome, (time.monotonic_ns() - arrived) / 1e9, None)

    async def models(self, request: Request) -> Response:
        """What is served."""
        facts: dict[str, Any] = {
            name: {"slo_ms": self.options.slo_ms[name], "max_batch": self.options.profiles[name].max_batch}
            for name in self._numbers
        }
        for name, language in self.options.languages.items():
            facts[name] = {"ttft_ms": language.objective.ttft_ms, "tpot_ms": language.objective.tpot_ms}
        listed = [{"id": name, "object": "model", "owned_by": "trainkit"} for name in facts]
        return JSONResponse({"object": "list", "data": listed, "models": facts})

    async def _guarded(self, request: Request, answer: Callable[[], Awaitable[Response]]) -> Response:
        try:
            authorise(request.headers, self.options.token)
            return await answer()
        except Refused as refused:
            return _reply(refused.status, refused.answer)

    async def metrics_text(self, request: Request) -> Response:
        """Prometheus' text format."""

        async def answer() -> Response:
            self.metrics.open(self._open)
            return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

        return await self._guarded(request, answer)

    async def live(self, request: Request) -> Response:
        """The live page: nothing secret in it, it asks for the data with the token."""
        return HTMLResponse(files("trainkit.serving.engine").joinpath("live.html").read_text())

    async def live_data(self, request: Request) -> Response:
        """What the live page draws."""

        async def answer() -> Response:
            return JSONResponse(self.metrics.live() | {"open": self._open})

        return await self._guarded(request, answer)

    async def reload(self, request: Request) -> Response:
        """Load the models anew, one device after the other, while the others serve."""

        async def answer() -> Response:
            return _reply(*await self._scheduled(request, ("reload",), time.monotonic_ns() + 10**10))

        return await self._guarded(request, answer)


def _reply(status: int, answer: dict[str, Any]) -> Response:
    retry = answer.pop("retry_after", None)
    return JSONResponse(answer, status, {} if retry is None else {"Retry-After": str(retry)})


async def _events(answer: Answer, first: Any, pieces: Any, usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events; a failure after the first is the last event."""
    try:
        answer.add(*first)
        yield answer.event(*first)
        async for one in pieces:
            answer.add(*one)
            yield answer.event(*one)
        if usage:
            yield answer.last_event()
    except Refused as refused:
        yield event({"error": {"message": str(refused), "code": refused.status}})
    finally:
        await pieces.aclose()
    yield DONE


@contextlib.contextmanager
def _hangs_up(request: Request) -> Any:
    """A future that is done once the client has left."""
    gone = asyncio.ensure_future(_left(request))
    try:
        yield gone
    finally:
        gone.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _next(answers: "asyncio.Queue[Any]", gone: "asyncio.Future[None]", patience: float) -> Any:
    """The next answer.

    Raises:
        Refused: the client left, or nothing came in time.
    """
    answer = asyncio.ensure_future(answers.get())
    try:
        await asyncio.wait({answer, gone}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
    finally:
        answer.cancel()
    if gone.done():
        raise Refused(499, "the client left")
    raise Refused(503, "the scheduler did not answer", 5)
