"""One thread of a software switch: a socket, the state machine that adds, and its sessions."""

import contextlib
import logging
import os
import socket
import threading
import time

from trainkit.switchml import _control as control
from trainkit.switchml import _packet as packet
from trainkit.switchml._buffers import unfragmented
from trainkit.switchml._limits import Limits
from trainkit.switchml._membership import Address
from trainkit.switchml._native import Port, Switch
from trainkit.switchml._session import Sessions

_log = logging.getLogger(__name__)

_SWEEP = 5.0
_PROBE = b'{"op":"probe"'


class Shard:
    """Adds one channel of all sessions; runs from construction to `close`.

    Args:
        endpoint: a bound UDP socket, closed in the end.
        buffer: bytes of its receive buffer.
        token: secret that workers must share; empty without.
        limits: what is admitted.
        channel: which channel this is.
        ports: of all channels.
    """

    def __init__(
        self, endpoint: socket.socket, buffer: int, token: bytes, limits: Limits, channel: int, ports: tuple[int, ...]
    ) -> None:
        self._socket = endpoint
        self._socket.setblocking(False)
        self._switch = Switch()
        self._lock = threading.Lock()
        self._sessions = Sessions(self._switch, token, buffer, limits, channel=channel, ports=ports)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._port = Port(self._socket.fileno(), self._wake, self._switch)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"switchml-switch-{channel}", daemon=True)
        self._thread.start()

    def counters(self) -> dict[str, int]:
        """The names of `COUNTED`."""
        with self._lock:
            totals = {name: self._switch.total(name) for name in COUNTED}
            return {**totals, "forged": totals["forged"] + self._sessions.refused}

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

    def _hear(self, data: bytes, source: Address, now: float) -> None:
        try:
            answers = self._sessions.receive(data, source, now)
        except Exception:  # whatever a stranger found: it is his alone
            _log.exception("a control packet of %s was dropped", source)
            return
        # does the path carry it? then it must not be cut
        probed = data.startswith(_PROBE, packet.HEADER_BYTES)
        with unfragmented(self._socket) if probed else contextlib.nullcontext():
            for address, answer in answers:
                self._port.send(answer, address)


COUNTED = (
    "received_packets", "sent_packets", "received_bytes", "sent_bytes", "unsent",
    "chunks", "retransmissions", "sent_progress", "stale", "foreign", "malformed", "forged",
)  # fmt: skip
