"""The switch's counters over HTTP: in Prometheus' text format, and as a page that follows them."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit.switchml import KernelSwitch, SoftwareSwitch

_SHY_S = 2.0
"""Seconds that a caller may take to say what it wants."""
_MOST_CALLERS = 64
_MOST_PAGES = 16
"""Callers that stay: so many pages follow the counters at a time, and the others still get in."""
_HEADER = ("session", "job", "workers", "longest silence, s")


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


def event(switch: "SoftwareSwitch | KernelSwitch") -> str:
    """What the page shows, as JSON."""
    from trainkit.switchml import shown

    rows = [
        [shown(row["session"], 64), shown(row["job"], 64), row["world"], round(max(row["silent"]), 1)]
        for row in switch.sessions()
    ]
    return json.dumps({"time": time.monotonic(), "counters": switch.counters(), "rows": rows})


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
    """Within, `http://address/metrics` answers, and `http://address/` is a page that follows the counters.

    Raises:
        OSError: the address cannot be bound.
    """
    from trainkit.report import live_page

    ending, pages = threading.Event(), threading.BoundedSemaphore(_MOST_PAGES)
    page = live_page("trainkit switch", "what the switch has done since it started", _HEADER).encode()

    class Answer(BaseHTTPRequestHandler):
        timeout = _SHY_S

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._say(200, "text/plain; version=0.0.4", text(switch).encode())
            elif self.path == "/":
                self._say(200, "text/html; charset=utf-8", page)
            elif self.path == "/events" and pages.acquire(blocking=False):
                try:
                    self._follow()
                finally:
                    pages.release()
            else:
                self._say(503 if self.path == "/events" else 404, "text/plain", b"")

        def _say(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body)

        def _follow(self) -> None:
            self._say(200, "text/event-stream", b"")
            while not ending.is_set():
                self.wfile.write(f"data: {event(switch)}\n\n".encode())
                ending.wait(1.0)

        def log_message(self, *_: object) -> None:
            """Say nothing: the terminal shows the table."""

    with _Server(address, Answer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            server.shutdown()
            thread.join()
