"""The switch's counters in Prometheus' text format, over HTTP."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainkit.switchml import KernelSwitch, SoftwareSwitch


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
    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)


@contextlib.contextmanager
def served(switch: "SoftwareSwitch | KernelSwitch", address: tuple[str, int]) -> Iterator[None]:
    """Within, `http://address/metrics` answers.

    Raises:
        OSError: the address cannot be bound.
    """

    class Answer(BaseHTTPRequestHandler):
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
