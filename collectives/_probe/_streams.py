"""Bytes from one host to another: sending without pause, and reading off the kernel's own count of what arrived."""

import contextlib
import socket
import struct
import sys
import threading
import time

_BLOCK = bytes(1 << 18)
_TCP_INFO = 11
_BYTES_RECEIVED = 128  # offset of tcpi_bytes_received, Linux 4.1 and later
_STEP_S = 0.05


def send_until(connection: socket.socket, end: float) -> None:
    """Send until `end` (time.monotonic), then throw away what is still queued."""
    connection.settimeout(_STEP_S)
    with contextlib.suppress(OSError):
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                connection.send(_BLOCK)
    abandon(connection)


def abandon(connection: socket.socket) -> None:
    """Close without sending the rest: the next round must find an empty network."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def receive_rate(connection: socket.socket, start: float, end: float) -> float:
    """Bits/s that arrived between `start` and `end` (time.monotonic).

    Count and time are read together, so that a process that is woken late measures a longer window, not a wrong rate.
    """
    connection.settimeout(_STEP_S)
    buffer = bytearray(1 << 18)
    read = 0
    first: tuple[float, int] | None = None
    last = (start, 0)
    with contextlib.suppress(OSError):  # a sender that ended early: what it sent counts
        while (now := time.monotonic()) < end or first is None or last[0] <= first[0]:
            with contextlib.suppress(TimeoutError):
                size = connection.recv_into(buffer)
                read += size
                if not size:
                    break
            if now >= start:
                last = (time.monotonic(), _arrived(connection, read))
                first = first or last
    abandon(connection)
    if first is None or last[0] <= first[0]:
        return 0.0
    return 8 * (last[1] - first[1]) / (max(last[0], end) - first[0])


def _arrived(connection: socket.socket, read: int) -> int:
    if not sys.platform.startswith("linux"):
        return read
    info = connection.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _BYTES_RECEIVED + 8)
    return int(struct.unpack_from("Q", info, _BYTES_RECEIVED)[0]) if len(info) >= _BYTES_RECEIVED + 8 else read


def round_trips(connection: socket.socket, count: int, timeout_s: float) -> list[float]:
    """Seconds of `count` round trips of one byte."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(timeout_s)
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        connection.sendall(b"?")
        if not connection.recv(1):
            raise ConnectionResetError("the other host closed the connection")
        times.append(time.perf_counter() - begin)
    return times


def echo(connection: socket.socket, timeout_s: float) -> None:
    """The other side of `round_trips`, until it closes."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(timeout_s)
    with contextlib.suppress(OSError), connection:
        while data := connection.recv(64):
            connection.sendall(data)


def hops(connection: socket.socket) -> int | None:
    """Routers between here and who opened this accepted connection, from the TTL that its SYN came with.

    Senders start at 64, 128 or 255. None where the system does not tell; overlays tell 0 for every pair.
    """
    with contextlib.suppress(OSError, struct.error):
        if sys.platform.startswith("linux") and connection.family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_IP, 12, 1)  # IP_RECVTTL
            ancillary = connection.getsockopt(socket.IPPROTO_IP, 9, 256)  # IP_PKTOPTIONS
            at = 0
            while at + 20 <= len(ancillary):
                length, level, kind, value = struct.unpack_from("QIIi", ancillary, at)
                if level == socket.IPPROTO_IP and kind == socket.IP_TTL:
                    return int(min(first - value for first in (64, 128, 255) if first >= value))
                at += (length + 7) & ~7
    return None


class Together:
    """Functions run at the same time, one thread each; results in order."""

    def __init__(self) -> None:
        """None yet."""
        self._threads: list[threading.Thread] = []
        self.results: dict[int, float] = {}

    def start(self, function: object, *arguments: object) -> None:
        """Start one more."""
        place = len(self._threads)

        def call() -> None:
            self.results[place] = function(*arguments)  # type: ignore[operator]

        thread = threading.Thread(target=call, daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self, timeout_s: float) -> list[float]:
        """Wait for all; 0 for one that has not ended."""
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return [self.results.get(place) or 0.0 for place in range(len(self._threads))]
