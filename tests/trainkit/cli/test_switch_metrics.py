"""The switch's counters over HTTP, beside callers that want nothing."""

import contextlib
import socket
import time
import urllib.request

import pytest

from trainkit.cli._switch_metrics import served
from trainkit.switchml import SoftwareSwitch


@pytest.mark.parametrize("noise", [b"", b"GET /metr", b"\0" * 4096])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_twenty_strangers_delay_nobody(host: str, noise: bytes) -> None:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        port = one.getsockname()[1]
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(SoftwareSwitch())
        stack.enter_context(served(switch, (host, port)))
        for _ in range(20):
            caller = stack.enter_context(socket.create_connection((host, port)))
            caller.sendall(noise)
        begun = time.monotonic()
        url = f"http://[{host}]:{port}/metrics" if ":" in host else f"http://{host}:{port}/metrics"
        assert b"switchml_" in urllib.request.urlopen(url, timeout=10).read()
        assert time.monotonic() - begun < 2.0
