"""The switch's counters in Prometheus' text format, over HTTP."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit.switchml import KernelSwitch, SoftwareSwitch

_SHY_S = 2.0
"""Seconds that a caller may take to say what it wants."""
_MOST_CALLERS = 64


def text(switch: "SoftwareSwitch | KernelSwitch") -> str:
    """All counters, and for each session its workers and the longest silence of one."""
    lines = []
    for name, value in switch.counters().items():
        lines += [f"# TYPE switchml_{name}_total counter", f"switchml_{name}_total {value}"]
    rows = switch.sessions()
    for gauge, of in (("workers", "world"), ("silent_seconds", "silent")):
        lines.append(f"# TYPE switchml_session_{gauge} gauge")
        for row in rows:
            labels = f'session="{_label(row["session"])}",job="{_label(row["job"])}"'
            value = max(row[of]) if of == "silent" else row[of]
            lines.append(f"switchml_session_{gauge}{{{labels}}} {value}")
    return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    from trainkit.switchml import shown

    return shown(text, 64).replace("\\", r"\\").replace('"', r"\"")


class _Server(ThreadingHTTPServer):
    """One thread a caller, as many as there is room for; who says nothing goes."""

    request_queue_size = 128  # of those that the system has let in: more than 5 silent ones must not keep others out

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._room = threading.BoundedSemaphore(_MOST_CALLERS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, once there is room."""
        if self._room.acquire(timeout=_SHY_S):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a caller that went is no news."""


@contextlib.contextmanager
def served(switch: "SoftwareSwitch | KernelSwitch", address: tuple[str, int]) -> Iterator[None]:
    """Within, `http://address/metrics` answers.

    Raises:
        OSError: the address cannot be bound.
    """

    class Answer(BaseHTTPRequestHandler):
        timeout = _SHY_S

        def do_GET(self) -> None:
            body = text(switch).encode()
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            if self.path == "/metrics":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing: the terminal shows the table."""

    with _Server(address, Answer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
