"""`trainkit p4 compile`: the P4 programs, by whoever has p4c."""

from dataclasses import dataclass
from typing import Literal

from trainkit.cli._subcommand import Subcommand


@dataclass(frozen=True)
class Options:
    """Which program, and where to."""

    target: Literal["bmv2", "tofino"] = "bmv2"
    """bmv2 by p4c-bm2-ss, or tofino by p4c-barefoot and bfas"""
    out: str | None = None
    """folder to write; bmv2 by default where `p4 deploy` takes it from"""
    seconds: float = 600
    """longest a Tofino compile may take"""


def run(options: Options) -> int:
    """Compile, say where it is and, of a Tofino program, what it takes of the chip."""
    from pathlib import Path

    from trainkit.p4 import _pipeline, _resources

    if options.target == "tofino":
        made = _pipeline.compile_tofino(Path(options.out or "p4-tofino"), options.seconds)
    else:
        made = _pipeline.compile_bmv2(Path(options.out) if options.out else _pipeline.BUILD)
    print(f"{options.target}: {made}")
    if options.target == "tofino":
        for name, (used, there) in _resources.resources(made).items():
            print(f"{name}: {used} of {there}")
    return 0


SUBCOMMAND = Subcommand(
    name="p4 compile",
    summary="Compile the P4 program of a switch.",
    options=Options,
    run=run,
    example="trainkit p4 compile --target bmv2 --out build",
)
