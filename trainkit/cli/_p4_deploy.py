"""`trainkit p4 deploy`: bring a switch to what a file describes."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from trainkit.cli._p4_switch import ControllerOptions
from trainkit.cli._subcommand import Subcommand


@dataclass(frozen=True)
class Options(ControllerOptions):
    """What to deploy, and where."""

    target: Literal["bmv2", "tofino"] = "bmv2"
    """kind of switch"""
    artefacts: str | None = None
    """folder of the compiled program; default: the one that is shipped, for bmv2"""
    dry_run: bool = False
    """show the difference and change nothing"""
    replace: bool = False
    """overwrite another program that the switch runs"""
    no_probe: bool = False
    """do not ask the workers for their addresses afterwards"""


def run(options: Options) -> int:
    """Deploy; 1 where a worker does not answer."""
    from trainkit.p4.deploy import deploy

    asked = dataclasses.asdict(options)
    outcome = deploy(asked.pop("path"), probe=not asked.pop("no_probe"), **asked)
    return 1 if outcome.unseen else 0


SUBCOMMAND = Subcommand(
    name="p4 deploy",
    summary="Program a P4 switch from a file of workers and sessions; again changes nothing.",
    options=Options,
    run=run,
    example="trainkit p4 deploy workers.yaml --grpc 10.0.0.2:9559 --dry-run",
)
