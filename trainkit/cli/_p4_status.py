"""`trainkit p4 status`: what a switch runs, holds and has counted."""

import dataclasses
import json
from dataclasses import dataclass

from trainkit.cli._p4_switch import SwitchOptions
from trainkit.cli._subcommand import Subcommand


@dataclass(frozen=True)
class Options(SwitchOptions):
    """Which switch, and what it should hold."""

    json: bool = False
    """print JSON"""


def run(options: Options) -> int:
    """Print; 1 where the switch does not hold what the file describes."""
    from trainkit.p4.deploy import status

    found = status(options.path, grpc=options.grpc, device=options.device)
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        print("as described" if found.as_described else "not as described: see `trainkit p4 deploy --dry-run`")
        for name, session in found.sessions.items():
            print(f"session {name}: " + ", ".join(f"{key} {value}" for key, value in session.items()))
        print(", ".join(f"{key} {value}" for key, value in found.packets.items()))
    return 0 if found.as_described else 1


SUBCOMMAND = Subcommand(
    name="p4 status",
    summary="Show what a P4 switch holds and what it has counted.",
    options=Options,
    run=run,
    example="trainkit p4 status workers.yaml --grpc 10.0.0.2:9559 --json",
)
