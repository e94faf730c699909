"""What every subcommand that speaks to a P4 switch is told: the description, and where the switch is."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class SwitchOptions:
    """Which switch, and what it should hold."""

    path: str = dataclasses.field(metadata={"positional": True})
    """YAML of the switch's address, the workers and the sessions"""
    grpc: str = "127.0.0.1:9559"
    """HOST:PORT of the switch's P4Runtime server"""
    device: int = 0
    """its device id"""


@dataclass(frozen=True)
class ControllerOptions(SwitchOptions):
    """Which switch, and as whom to write to it."""

    election: int = 1
    """election id; the greatest is primary"""
