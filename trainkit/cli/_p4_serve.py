"""`trainkit p4 serve`: answers the workers that join sessions on a deployed switch."""

import ipaddress
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainkit.cli._p4_switch import ControllerOptions
from trainkit.cli._subcommand import Subcommand

if TYPE_CHECKING:
    from trainkit.p4._plane import Plane
    from trainkit.switchml import FixedSwitch

_TURN, _SWEEP = 0.2, 5.0


@dataclass(frozen=True)
class Options(ControllerOptions):
    """Which switch."""

    token_file: str | None = None
    """file with the secret that workers must share to join; their data carry no tag"""


def run(options: Options) -> int:
    """Serve until SIGINT or SIGTERM."""
    from trainkit.p4._plane import Plane
    from trainkit.p4.deploy import deployed
    from trainkit.switchml import FixedSwitch, Preconfigured, read_token

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    token = read_token(options.token_file)
    with deployed(options.path, options.grpc, options.device, options.election) as (switch, description):
        plane = Plane(switch, description)
        sessions = {
            session.name: Preconfigured(
                session.number, tuple(worker.host for worker in session.workers), session.slots, session.elements
            )
            for session in description.sessions
        }
        # what was joined before is not known here: its workers see that it is lost
        for session in description.sessions:
            plane.remove(session.number)
        print(f"serving {', '.join(sessions)} on switch {options.grpc}", flush=True)
        serve(plane, FixedSwitch(plane, sessions, token), stop)
    return 0


def serve(plane: "Plane", control: "FixedSwitch", stop: threading.Event) -> None:
    """Answer workers' control messages until `stop` is set."""
    sweep = time.monotonic() + _SWEEP
    while not stop.is_set():
        heard = plane.receive(_TURN)
        now = time.monotonic()
        if heard is not None:
            source = str(ipaddress.IPv4Address(heard.ip)), heard.port
            for address, answer in control.receive(heard.data, source, now):
                assert isinstance(address, tuple)
                plane.send(address, answer)
        if now > sweep:
            sweep = now + _SWEEP
            control.sweep(now)


SUBCOMMAND = Subcommand(
    name="p4 serve",
    summary="Answer the workers that join sessions on a P4 switch.",
    options=Options,
    run=run,
    example="trainkit p4 serve workers.yaml --grpc 10.0.0.2:9559",
)
