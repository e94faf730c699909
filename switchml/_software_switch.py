"""The software switch: a socket, a thread, the switch's state machine and its sessions."""

import contextlib
import os
import socket
import threading
import time
from types import TracebackType
from typing import Any

from trainkit.switchml import _control as control
from trainkit.switchml._at_exit import close_at_exit
from trainkit.switchml._buffers import enlarge, parse_address, unfragmented
from trainkit.switchml._native import Port, Switch
from trainkit.switchml._options import read_token
from trainkit.switchml._session import Limits, Sessions

_SWEEP = 5.0


class SoftwareSwitch:
    """Adds the gradients of all sessions that join it. A context manager; runs from construction to `close`.

    Args:
        listen: "host:port"; port 0 takes a free one, see `address`.
        token_file: file with the secret that workers must share; needed beyond loopback.
        insecure: take workers without a token beyond loopback.
        limits: what is admitted.

    Raises:
        ValueError: no token beyond loopback, or a malformed address.
        OSError: the address cannot be bound.

    Example:
        >>> with SoftwareSwitch() as switch:
        ...     state = SwitchMLState(switch.address, rank=0, world_size=1)
    """

    def __init__(
        self,
        listen: str = "127.0.0.1:0",
        *,
        token_file: str | None = None,
        insecure: bool = False,
        limits: Limits | None = None,
    ) -> None:
        host, port = parse_address(listen, "listen")
        token = read_token(token_file)
        if not token and not insecure and not host.startswith("127.") and host != "localhost":
            raise ValueError(
                f"listening on {host} without a token would let anyone change gradients: give --token-file "
                "(`openssl rand -hex 32 > FILE`), or --insecure on a network that only you use"
            )
        self._key = control.control_key(token)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise OSError(
                f"cannot listen on {listen}: {error.strerror}: take another port, or 0 for a free one"
            ) from error
        buffer = enlarge(self._socket)
        self._socket.setblocking(False)
        self.address = "{}:{}".format(*self._socket.getsockname())
        self._switch = Switch()
        self._lock = threading.Lock()
        self._sessions = Sessions(self._switch, token, buffer, limits)
        self._refused = 0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._port = Port(self._socket.fileno(), self._wake, self._switch)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="switchml-switch", daemon=True)
        self._thread.start()
        close_at_exit(self)

    def counters(self) -> dict[str, int]:
        """Packets and bytes each way, finished chunks, and packets refused by their cause, all sessions together."""
        with self._lock:
            totals = {name: self._switch.total(name) for name in COUNTED}
            return {**totals, "forged": totals["forged"] + self._refused}

    def sessions(self) -> list[control.Message]:
        """A row a session: name, epoch, agreed sizes, seconds since each worker was heard."""
        with self._lock:
            return self._sessions.table(time.monotonic())

    def close(self) -> None:
        """Stop; workers see that the switch no longer answers."""
        if not self._stopping:
            self._stopping = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            os.close(self._wake)
            self._socket.close()

    def __enter__(self) -> "SoftwareSwitch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
