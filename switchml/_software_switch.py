"""The software switch: a socket, a thread, the switch's state machine and its sessions."""

import os
import socket
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any

from trainkit.switchml import _control as control
from trainkit.switchml._buffers import enlarge, parse_address, readable
from trainkit.switchml._options import read_token
from trainkit.switchml._session import Limits, Sessions
from trainkit.switchml._switch import Switch

_BATCH = 64
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
        self._traffic: Counter[str] = Counter()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="switchml-switch", daemon=True)
        self._thread.start()

    def counters(self) -> dict[str, int]:
        """Packets and bytes each way, finished chunks, and packets refused by their cause, all sessions together."""
        with self._lock:
            return {name: self._traffic[name] + self._switch.total(name) for name in COUNTED}

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
            ready = readable(self._socket, self._wake, 1.0)
            with self._lock:
                now = time.monotonic()
                if ready:
                    self._drain(now)
                if now > sweep:
                    sweep = now + _SWEEP
                    self._sessions.sweep(now)

    def _drain(self, now: float) -> None:
        for _ in range(_BATCH):
            try:
                data, source = self._socket.recvfrom(65535)
            except BlockingIOError:
                return
            except OSError:  # a worker's port is closed: its packets are lost like any other
                continue
            if control.is_control(data):
                self._hear(data, source, now)
                continue
            self._count("received", data)
            for address, answer in self._switch.receive(data, source):
                self._count("sent", answer)
                self._send(answer, address)

    def _hear(self, data: bytes, source: tuple[str, int], now: float) -> None:
        message = control.decode(data, self._key)
        if message is None:
            self._traffic["forged"] += 1
            return
        for address, answer in self._sessions.receive(message, source, now):
            self._send(control.encode(answer, self._key), address)

    def _count(self, way: str, data: bytes) -> None:
        self._traffic[f"{way}_packets"] += 1
        self._traffic[f"{way}_bytes"] += len(data)

    def _send(self, data: bytes, address: Any) -> None:
        try:
            self._socket.sendto(data, address)
        except OSError:  # lost like any other packet
            self._traffic["unsent"] += 1


COUNTED = (
    "received_packets", "sent_packets", "received_bytes", "sent_bytes", "unsent",
    "chunks", "repeats", "sent_progress", "stale", "foreign", "malformed", "forged",
)  # fmt: skip
