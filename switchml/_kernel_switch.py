"""A switch whose adding is done in the kernel, and whose sessions are kept here."""

import contextlib
import dataclasses
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import cast

from trainkit.switchml import _control as control
from trainkit.switchml._at_exit import close_at_exit
from trainkit.switchml._buffers import parse_address
from trainkit.switchml._kernel import SESSIONS, SLOTS, KernelPlane
from trainkit.switchml._limits import Limits
from trainkit.switchml._session import Sessions
from trainkit.switchml._shard import COUNTED
from trainkit.switchml._software_switch import trusted

_log = logging.getLogger(__name__)

_SWEEP = 5.0
# slots are in the kernel: what a socket would hold is no limit
_UNBOUNDED = 1 << 40


class KernelSwitch:
    """Adds the gradients of sessions of profile `core` where the network driver hands packets over (XDP).

    Same face as `SoftwareSwitch`: at most 4 sessions of 32 workers and 64 slots. With a token joins are guarded; data
    have no tag in profile `core`.

    Args:
        listen: "host:port", an IPv4 address of this machine that workers send to.
        interfaces: network interfaces over which they arrive.
        token_file: file with the secret that workers must share; needed beyond loopback.
        insecure: take workers without a token beyond loopback.

    Raises:
        ValueError: no token beyond loopback, a malformed address, or an interface that does not exist.
        OSError: the address cannot be bound.
        KernelUnavailable: the program cannot be loaded.
    """

    def __init__(
        self, listen: str, interfaces: Sequence[str], *, token_file: str | None = None, insecure: bool = False
    ) -> None:
        token = trusted(listen, token_file, insecure)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        try:
            host, port = parse_address(listen, "listen")
            self._socket.bind((host, port))
            self._plane = KernelPlane(interfaces, self._socket.getsockname())
        except BaseException:
            self._socket.close()
            os.close(self._wake)
            raise
        self._socket.setblocking(False)
        self.address = "{}:{}".format(*self._socket.getsockname())
        # half: a quarter would be one session, and a job may have two models
        limits = dataclasses.replace(Limits(), sessions=SESSIONS, slots=SLOTS, share=0.5)
        self._sessions = Sessions(self._plane, token, _UNBOUNDED, limits, core=True)
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="switchml-kernel", daemon=True)
        self._thread.start()
        close_at_exit(self)

    def counters(self) -> dict[str, int]:
        """As `SoftwareSwitch.counters`; what the kernel does not count is 0."""
        with self._lock:
            return {**dict.fromkeys(COUNTED, 0), **self._plane.counters(), "forged": self._sessions.refused}

    def sessions(self) -> list[control.Message]:
        """As `SoftwareSwitch.sessions`."""
        with self._lock:
            return self._sessions.table(time.monotonic())

    def close(self) -> None:
        """Stop; workers see that the switch no longer answers."""
        if not self._stopping:
            self._stopping = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self._plane.close()
            os.close(self._wake)
            self._socket.close()

    def __enter__(self) -> "KernelSwitch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        sweep = time.monotonic() + _SWEEP
        while not self._stopping:
            select.select([self._socket.fileno(), self._wake], [], [], max(0.0, sweep - time.monotonic()))
            with self._lock:
                while (heard := self._heard()) is not None:
                    self._hear(*heard)
                if time.monotonic() > sweep:
                    sweep = time.monotonic() + _SWEEP
                    self._sessions.sweep(time.monotonic())

    def _heard(self) -> tuple[bytes, tuple[str, int]] | None:
        try:
            return self._socket.recvfrom(control.MAX_BYTES)
        except BlockingIOError:
            return None

    def _hear(self, data: bytes, source: tuple[str, int]) -> None:
        try:
            answers = self._sessions.receive(data, source, time.monotonic())
        except Exception:  # whatever a stranger found: it is his alone
            _log.exception("a control packet of %s was dropped", source)
            return
        for address, answer in answers:
            with contextlib.suppress(OSError):  # lost like any other packet
                self._socket.sendto(answer, cast(tuple[str, int], address))
