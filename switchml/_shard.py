"""One thread of a software switch: a socket, the state machine that adds, and its sessions."""

import contextlib
import os
import socket
import threading
import time
from typing import Any

from trainkit.switchml import _control as control
from trainkit.switchml._buffers import unfragmented
from trainkit.switchml._native import Port, Switch
from trainkit.switchml._session import Limits, Sessions

_SWEEP = 5.0


class Shard:
    """Adds one lane of all sessions; runs from construction to `close`.

    Args:
        endpoint: a bound UDP socket, closed in the end.
        buffer: bytes of its receive buffer.
        token: secret that workers must share; empty without.
        limits: what is admitted.
        lane: which lane this is.
        ports: of all lanes.
    """

    def __init__(
        self, endpoint: socket.socket, buffer: int, token: bytes, limits: Limits, lane: int, ports: tuple[int, ...]
    ) -> None:
        self._socket = endpoint
        self._socket.setblocking(False)
        self._key = control.control_key(token)
        self._switch = Switch()
        self._lock = threading.Lock()
        self._sessions = Sessions(self._switch, token, buffer, limits, lane=lane, ports=ports)
        self._refused = 0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._port = Port(self._socket.fileno(), self._wake, self._switch)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"switchml-switch-{lane}", daemon=True)
        self._thread.start()

    def counters(self) -> dict[str, int]:
        """The names of `COUNTED`."""
        with self._lock:
            totals = {name: self._switch.total(name) for name in COUNTED}
            return {**totals, "forged": totals["forged"] + self._refused}

    def sessions(self) -> list[control.Message]:
        """As `SoftwareSwitch.sessions`."""
        with self._lock:
            return self._sessions.table(time.monotonic())

    def close(self) -> None:
        """End the thread."""
        if not self._stopping:
            self._stopping = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            os.close(self._wake)
            self._socket.close()

    def _run(self) -> None:
        sweep = time.monotonic() + _SWEEP
        while not self._stopping:
            heard = self._switch.drive(self._port, sweep)
            now = time.monotonic()
            with self._lock:
                for data, source in heard:
                    self._hear(data, source, now)
                if now > sweep:
                    sweep = now + _SWEEP
                    self._sessions.sweep(now)

    def _hear(self, data: bytes, source: tuple[str, int], now: float) -> None:
        message = control.decode(data, self._key)
        if message is None:
            self._refused += 1
            return
        if message["op"] == "probe":  # as long as the question, and not to be fragmented: does the path carry it?
            with unfragmented(self._socket):
                self._send(control.encode({"op": "probed", "bytes": len(data)}, self._key, len(data)), source)
            return
        for address, answer in self._sessions.receive(message, source, now):
            self._send(control.encode(answer, self._key), address)

    def _send(self, data: bytes, address: Any) -> None:
        with contextlib.suppress(OSError):  # lost like any other packet
            self._socket.sendto(data, address)


COUNTED = (
    "received_packets", "sent_packets", "received_bytes", "sent_bytes", "unsent",
    "chunks", "repeats", "sent_progress", "stale", "foreign", "malformed", "forged",
)  # fmt: skip
