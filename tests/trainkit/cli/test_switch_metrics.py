"""The switch's counters over HTTP, beside callers that want nothing."""

import contextlib
import socket
import time
import urllib.request

import pytest

from trainkit.cli._switch_metrics import _SHY_S, served
from trainkit.switchml import SoftwareSwitch


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_hundred_strangers_delay_nobody(host: str) -> None:
    """Silent, stopping half-way, talking nonsense, and having closed their own direction."""
    kinds = [(b"", False), (b"GET /metr", False), (b"\0" * 4096, False), (b"GET /metr", True), (b"", True)]
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        port = one.getsockname()[1]
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(SoftwareSwitch())
        stack.enter_context(served(switch, (host, port)))
        begun = time.monotonic()
        for noise, half_open in kinds * 20:
            caller = stack.enter_context(socket.create_connection((host, port)))
            caller.sendall(noise)
            if half_open:
                caller.shutdown(socket.SHUT_WR)
        url = f"http://[{host}]:{port}/metrics" if ":" in host else f"http://{host}:{port}/metrics"
        assert b"switchml_" in urllib.request.urlopen(url, timeout=10).read()
        assert time.monotonic() - begun < 2.0 + _SHY_S  # it has room for 64 at a time
