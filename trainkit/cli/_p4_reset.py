"""`trainkit p4 reset`: end what workers have begun on a switch."""

import dataclasses
from dataclasses import dataclass

from trainkit.cli._p4_switch import ControllerOptions
from trainkit.cli._subcommand import Subcommand


@dataclass(frozen=True)
class Options(ControllerOptions):
    """Which switch and session."""

    session: str | None = None
    """name of one session; default: all"""


def run(options: Options) -> int:
    """Reset and say what."""
    from trainkit.p4.deploy import reset

    for name in reset(**dataclasses.asdict(options)):
        print(f"session {name}: ended, its slots are empty")
    return 0


SUBCOMMAND = Subcommand(
    name="p4 reset",
    summary="End sessions on a P4 switch and empty their slots.",
    options=Options,
    run=run,
    example="trainkit p4 reset workers.yaml --session default",
)
