"""What a request must be, whatever server took it: token, size, JSON, model, deadline."""

import hmac
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Protocol


class Headers(Protocol):
    """Headers of a request."""

    def get(self, key: str, default: str) -> str:
        """One header's value."""


class Refused(Exception):
    """A request that is answered without being scheduled."""

    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status, self.retry_after = status, retry_after

    @property
    def answer(self) -> dict[str, Any]:
        """The body, and when to come again."""
        return {"detail": str(self), "retry_after": self.retry_after}


def authorise(headers: Headers, token: str | None) -> None:
    """Refuse who does not carry the token."""
    given = headers.get("authorization", "").encode()
    if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        raise Refused(401, "the header Authorization must be: Bearer TOKEN")


async def read_json(pieces: AsyncIterator[bytes], limit: int) -> dict[str, Any]:
    """The body, an object."""
    read = bytearray()
    async for piece in pieces:
        read += piece
        if len(read) > limit:
            raise Refused(413, f"a body is at most {limit} bytes")
    try:
        body = json.loads(bytes(read))
    except (ValueError, RecursionError):
        raise Refused(400, "the body must be JSON") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be an object")
    return body


def model_of(name: object, known: Iterable[str]) -> str:
    """The model's name; the only one where none is given."""
    names = list(known)
    if name is None and len(names) == 1:
        return names[0]
    if not isinstance(name, str) or name not in names:
        raise Refused(404, f"there is no such model; there are {', '.join(names)}")
    return name


def deadline_of(body: Mapping[str, Any], slo_ms: float, arrived: int) -> int:
    """When the answer is due, ns."""
    if "input" not in body:
        raise Refused(400, 'the body must be an object with the key "input"')
    limit = body.get("deadline_ms", slo_ms)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit <= 3_600_000:
        raise Refused(400, "deadline_ms is above 0 and at most 3600000")
    return arrived + round(limit * 1e6)
