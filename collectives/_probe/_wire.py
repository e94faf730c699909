"""Messages between the hosts of a probe: length-prefixed JSON over TCP, opened by a mutual proof of the same key."""

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from trainkit.collectives._exchange import read_json

_MOST_BYTES = 8 << 20
_OPENING_BYTES = 4096  # before the other side has proved that it has the key
_LENGTH = struct.Struct(">I")


_MOST_STRANGERS = 256
"""Callers without a proof that are listened to at the same time."""
STRANGER_S = 5.0
"""Seconds that one may take for its proof."""


class ProbeError(RuntimeError):
    """A probe that could not be carried through; names the host that failed."""


class Gone(ProbeError):
    """The other side closed the connection, or said nothing in time, or nothing that makes sense."""


class Channel:
    """One connection that carries messages."""

    def __init__(self, connection: socket.socket) -> None:
        """Take the connection over."""
        self.socket = connection
        self._most = _OPENING_BYTES

    def send(self, message: Mapping[str, Any], timeout_s: float) -> None:
        """Send one message.

        Raises:
            Gone: it could not be sent in time.
        """
        text = json.dumps(message).encode()
        try:
            self.socket.settimeout(timeout_s)
            self.socket.sendall(_LENGTH.pack(len(text)) + text)
        except OSError as error:
            raise Gone(f"the connection failed: {error}") from None

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next message.

        Raises:
            Gone: it did not come in time, is too long, or is no JSON object.
        """
        end = time.monotonic() + timeout_s
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, end))
        if length > self._most:
            raise Gone(f"a message of {length} bytes was announced, {self._most} is the most")
        try:
            message = read_json(self._exactly(length, end))
        except ValueError as error:
            raise Gone(f"a message makes no sense: {error}") from None
        if not isinstance(message, dict):
            raise Gone(f"a message must be an object, got {type(message).__name__}")
        return message

    def close(self) -> None:
        """Close the connection."""
        shut(self.socket)

    def _exactly(self, count: int, end: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            left = end - time.monotonic()
            if left <= 0:
                raise Gone("nothing came in time")
            try:
                self.socket.settimeout(left)
                part = self.socket.recv(count - len(data))
            except TimeoutError:
                continue  # a send in another thread sets a shorter one on the same socket
            except OSError as error:
                raise Gone(f"the connection failed: {error}") from None
            if not part:
                raise Gone("the connection was closed")
            data += part
        return bytes(data)

    def trusted(self) -> "Channel":
        """The same, for messages of full length."""
        self._most = _MOST_BYTES
        return self


class Strangers:
    """Connections whose other end has not proved anything yet; of too many, the longest silent goes."""

    def __init__(self) -> None:
        """None yet."""
        self._guard = threading.Lock()
        self._waiting: list[socket.socket] = []

    @contextlib.contextmanager
    def admitted(self, connection: socket.socket) -> Iterator[None]:
        """While it proves itself; another one may end it."""
        with self._guard:
            self._waiting.append(connection)
            oldest = self._waiting.pop(0) if len(self._waiting) > _MOST_STRANGERS else None
        if oldest is not None:
            shut(oldest)
        try:
            yield
        finally:
            with self._guard, contextlib.suppress(ValueError):
                self._waiting.remove(connection)


def shut(one: socket.socket) -> None:
    """Close a socket, also under a thread that waits in it."""
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


def open_channel(
    connection: socket.socket, key: bytes, hello: Mapping[str, Any], timeout_s: float
) -> tuple[Channel, dict[str, Any]]:
    """Introduce oneself to a listener and let it prove that it has the key.

    Returns:
        The channel and the listener's answer.

    Raises:
        Gone: the listener has another key, or is none.
    """
    channel = Channel(connection)
    nonce = secrets.token_hex(16)
    theirs = _text(channel.receive(timeout_s), "nonce")
    opening = {**hello, "nonce": nonce}
    channel.send({"hello": opening, "proof": _proof(key, "opens", theirs, opening)}, timeout_s)
    answer = channel.receive(timeout_s)
    said = answer.get("answer")
    if not hmac.compare_digest(_text(answer, "proof"), _proof(key, "answers", nonce, said)) or not isinstance(
        said, dict
    ):
        raise Gone("the listener does not have this probe's key")
    return channel.trusted(), said


def accept_channel(
    connection: socket.socket, key: bytes, answer: Mapping[str, Any], timeout_s: float
) -> tuple[Channel, dict[str, Any]]:
    """The other half of `open_channel`: check who comes, answer.

    Returns:
        The channel and the other side's hello.

    Raises:
        Gone: it does not have the key; it is told so.
    """
    channel = Channel(connection)
    nonce = secrets.token_hex(16)
    channel.send({"nonce": nonce}, timeout_s)
    opening = channel.receive(timeout_s)
    hello = opening.get("hello")
    if not isinstance(hello, dict) or not hmac.compare_digest(
        _text(opening, "proof"), _proof(key, "opens", nonce, hello)
    ):
        raise Gone("somebody without this probe's key connected")
    channel.send({"answer": answer, "proof": _proof(key, "answers", _text(hello, "nonce"), answer)}, timeout_s)
    return channel.trusted(), hello


def number(message: Mapping[str, Any], key: str, low: float, high: float) -> float:
    """A number of a message, in range.

    Raises:
        Gone: it is none, or out of range.
    """
    value = message.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Gone(f"{key} must be a number from {low:g} to {high:g}, got {str(value)[:40]}")
    return value


def whole(message: Mapping[str, Any], key: str, low: int, high: int) -> int:
    """A whole number of a message, in range; likewise."""
    value = number(message, key, low, high)
    if not isinstance(value, int):
        raise Gone(f"{key} must be a whole number, got {value!r}")
    return value


def _text(message: Mapping[str, Any], key: str) -> str:
    value = message.get(key)
    if not isinstance(value, str) or len(value) > 128 or not value.isascii():
        raise Gone(f"{key} must be a short text, got {str(value)[:40]!r}")
    return value


def _proof(key: bytes, role: str, nonce: str, said: Any) -> str:
    text = json.dumps([role, nonce, said], sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
