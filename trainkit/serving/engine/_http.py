"""The HTTP side, in LitServe's own server: one LitSpec with the endpoints."""

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from litserve.specs.base import LitSpec
from litserve.utils import ResponseBufferItem

from trainkit.serving.engine._metrics import Metrics
from trainkit.serving.engine._options import ServeOptions

# After its deadline a request is answered by us, whatever has become of the scheduler.
_GRACE_S = 1.5


class _Refused(Exception):
    """A request that is answered without being scheduled."""

    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status, self.retry_after = status, retry_after


class Endpoints(LitSpec):  # type: ignore[misc]
    """`POST /v1/models/NAME:predict`, `POST /predict`, `GET /v1/models`, `GET /metrics`, `POST /admin/reload`."""

    def __init__(self, options: ServeOptions) -> None:
        super().__init__()
        self.options = options
        self._numbers = {name: number for number, name in enumerate(options.models)}
        self._metrics: Metrics | None = None
        self.api_path = "/predict"

    def __getstate__(self) -> dict[str, Any]:
        """What the scheduler's process gets: nothing of the server's."""
        kept: dict[str, Any] = super().__getstate__()
        return kept | {"response_buffer": None, "request_queue": None, "data_streamer": None, "_metrics": None}

    def pre_setup(self, lit_api: Any) -> None:
        """Register the endpoints."""
        self.add_endpoint("/predict", self.predict, ["POST"])
        self.add_endpoint("/v1/models/{name}:predict", self.predict, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/metrics", self.metrics_text, ["GET"])
        self.add_endpoint("/admin/reload", self.reload, ["POST"])

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

    def _authorise(self, request: Request) -> None:
        token = self.options.token
        given = request.headers.get("authorization", "").encode()
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise _Refused(401, "the header Authorization must be: Bearer TOKEN")

    async def _body(self, request: Request) -> dict[str, Any]:
        limit = self.options.max_body_bytes
        read = bytearray()
        async for piece in request.stream():
            read += piece
            if len(read) > limit:
                raise _Refused(413, f"a body is at most {limit} bytes")
        try:
            body = json.loads(bytes(read))
        except (ValueError, RecursionError):
            raise _Refused(400, "the body must be JSON") from None
        if not isinstance(body, dict) or "input" not in body:
            raise _Refused(400, 'the body must be an object with the key "input"')
        return body

    def _model(self, request: Request, body: dict[str, Any]) -> str:
        name = request.path_params.get("name", body.get("model"))
        if name is None and len(self._numbers) == 1:
            return next(iter(self._numbers))
        if not isinstance(name, str) or name not in self._numbers:
            raise _Refused(404, f"there is no such model; there are {', '.join(self._numbers)}")
        return name

    def _deadline(self, body: dict[str, Any], name: str, arrived: int) -> int:
        limit = body.get("deadline_ms", self.options.slo_ms[name])
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit <= 3_600_000:
            raise _Refused(400, "deadline_ms is above 0 and at most 3600000")
        return arrived + round(limit * 1e6)

    async def predict(self, request: Request) -> Response:
        """One input, one output, within the objective or a 503."""
        arrived = time.monotonic_ns()
        name = "-"
        try:
            self._authorise(request)
            body = await self._body(request)
            name = self._model(request, body)
            deadline = self._deadline(body, name, arrived)
            if len(self.response_buffer) >= self.options.max_waiting:
                raise _Refused(503, f"{self.options.max_waiting} requests are open already", 1)
            status, answer, state = await self._scheduled(
                request, ("infer", self._numbers[name], deadline, body["input"]), deadline
            )
            self.metrics.state(state)
        except _Refused as refused:
            status, answer = refused.status, {"detail": str(refused), "retry_after": refused.retry_after}
        ended = time.monotonic_ns()
        late = status == 200 and ended > deadline
        self.metrics.answered(name, "late" if late else str(status), (ended - arrived) / 1e9, answer.get("batch"))
        retry = answer.pop("retry_after", None)
        headers = {} if retry is None else {"Retry-After": str(retry)}
        try:
            return JSONResponse(answer, status, headers)
        except ValueError:  # not a number, for one
            return JSONResponse({"detail": "the model's output is not JSON"}, 500)

    async def _scheduled(self, request: Request, payload: tuple[Any, ...], deadline: int) -> tuple[int, Any, Any]:
        """The scheduler's answer; 499 where the client left; 503 where the scheduler is gone."""
        uid = uuid.uuid4().hex
        item = self.response_buffer[uid] = ResponseBufferItem(asyncio.Event())
        answer = asyncio.ensure_future(item.event.wait())
        gone = asyncio.ensure_future(_left(request))
        try:
            try:
                self.request_queue.put((self.response_queue_id, uid, time.monotonic(), payload))
            except (OSError, EOFError):
                raise _Refused(503, "the scheduler is not there", 5) from None
            patience = (deadline - time.monotonic_ns()) / 1e9 + _GRACE_S
            await asyncio.wait({answer, gone}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if item.response is not None:
                (status, body, state), _ = item.response
                return status, body, state
            with contextlib.suppress(OSError, EOFError):
                self.request_queue.put((self.response_queue_id, uid, time.monotonic(), ("cancel",)))
            if gone.done():
                raise _Refused(499, "the client left")
            raise _Refused(503, "the scheduler did not answer", 5)
        finally:
            answer.cancel()
            gone.cancel()
            del self.response_buffer[uid]

    async def models(self, request: Request) -> Response:
        """What is served."""
        facts = {
            name: {"slo_ms": self.options.slo_ms[name], "max_batch": self.options.profiles[name].max_batch}
            for name in self._numbers
        }
        return JSONResponse({"models": facts})

    async def metrics_text(self, request: Request) -> Response:
        """Prometheus' text format."""
        try:
            self._authorise(request)
        except _Refused as refused:
            return JSONResponse({"detail": str(refused)}, refused.status)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def reload(self, request: Request) -> Response:
        """Load the models anew, one device after the other, while the others serve."""
        try:
            self._authorise(request)
            status, answer, _ = await self._scheduled(request, ("reload",), time.monotonic_ns() + 10**10)
        except _Refused as refused:
            status, answer = refused.status, {"detail": str(refused)}
        return JSONResponse(answer, status)


async def _left(request: Request) -> None:
    """Returns once the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
