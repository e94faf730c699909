"""`trainkit switch`: the software switch as a program."""

import contextlib
import json
import signal
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainkit.cli._subcommand import Subcommand

if TYPE_CHECKING:
    from trainkit.switchml import KernelSwitch, SoftwareSwitch


@dataclass(frozen=True)
class Options:
    """Where to listen and whom to take."""

    listen: str = "127.0.0.1:48864"
    """HOST:PORT of the UDP socket, [ADDRESS]:PORT for IPv6; 0.0.0.0 or [::] for all addresses; port 0 takes a free one"""
    token_file: str | None = None
    """file with the secret that the workers share; needed beyond loopback"""
    insecure: bool = False
    """listen beyond loopback without a token"""
    threads: int = 1
    """channels, each with a thread and a UDP port, the ones after that of `listen`; a session's workers use them all"""
    xdp: str | None = None
    """network interfaces, separated by commas, at which to add inside the kernel: profile "core"; root, clang, libbpf"""
    metrics: str | None = None
    """HOST:PORT of Prometheus' metrics, at /metrics, and of a page that follows them, at /; default: none"""
    json: bool = False
    """one JSON object a line: the bound address first, then counters every `interval` seconds"""
    interval: float = 2.0
    """seconds between two readings of the counters"""


def run(options: Options) -> int:
    """Run until SIGINT or SIGTERM."""
    from trainkit.cli._switch_metrics import served
    from trainkit.switchml import KernelSwitch, SoftwareSwitch, parse_address

    metrics = parse_address(options.metrics, "metrics") if options.metrics else None
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with contextlib.ExitStack() as stack:
        switch: SoftwareSwitch | KernelSwitch
        if options.xdp is None:
            switch = SoftwareSwitch(
                options.listen, token_file=options.token_file, insecure=options.insecure, threads=options.threads
            )
        else:
            switch = KernelSwitch(
                options.listen, options.xdp.split(","), token_file=options.token_file, insecure=options.insecure
            )
        stack.enter_context(switch)
        if metrics:
            stack.enter_context(served(switch, metrics))
        if options.json:
            _say({"address": switch.address})
            while not stop.wait(options.interval):
                _say(_reading(switch))
            _say(_reading(switch))
        else:
            _watch(switch, stop, options.interval)
    return 0


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def _reading(switch: "SoftwareSwitch | KernelSwitch") -> dict[str, Any]:
    return {"counters": switch.counters(), "sessions": switch.sessions()}


def _watch(switch: "SoftwareSwitch | KernelSwitch", stop: threading.Event, interval: float) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    from trainkit.switchml import shown

    def picture(before: dict[str, int], now: dict[str, int]) -> Group:
        rates = Table("", "total", "a second", title=f"switch on {switch.address}", title_justify="left")
        for name, value in now.items():
            rates.add_row(name, f"{value:,}", f"{(value - before[name]) / interval:,.0f}")
        joined = Table("session", "job", "workers", "slots", "elements", "wire", "last heard, s")
        for row in switch.sessions():
            silent = " ".join(f"{seconds:.1f}" for seconds in row["silent"])
            cells = (row["session"], row["job"], row["world"], row["slots"], row["elements"], row["wire"], silent)
            # a worker chose its session's name: as text, it is no markup and no control sequence
            joined.add_row(*(Text(shown(cell, 64)) for cell in cells))
        return Group(rates, joined)

    before = switch.counters()
    with Live(picture(before, before), auto_refresh=False) as live:
        while not stop.wait(interval):
            now = switch.counters()
            live.update(picture(before, now), refresh=True)
            before = now


SUBCOMMAND = Subcommand(
    name="switch",
    summary="Run the software switch that adds the gradients of SwitchML workers.",
    options=Options,
    run=run,
    example="trainkit switch --listen 10.0.0.1:48864 --token-file token.txt",
)
