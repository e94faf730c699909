"""SwitchML: gradients summed inside the network, by a P4 switch or a software switch.

After "Scaling Distributed Machine Learning with In-Network Aggregation" (Sapio et al., NSDI 2021).

What a training process needs is imported on first use: a host that only runs a switch needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from trainkit.switchml._buffers import parse_address as parse_address
from trainkit.switchml._errors import SessionLost as SessionLost
from trainkit.switchml._errors import SessionRefused as SessionRefused
from trainkit.switchml._errors import SwitchMLError as SwitchMLError
from trainkit.switchml._errors import SwitchUnreachable as SwitchUnreachable
from trainkit.switchml._errors import WorkerMissing as WorkerMissing
from trainkit.switchml._fixed_switch import FixedSwitch as FixedSwitch
from trainkit.switchml._kernel import KernelUnavailable as KernelUnavailable
from trainkit.switchml._kernel_switch import KernelSwitch as KernelSwitch
from trainkit.switchml._limits import Limits as Limits
from trainkit.switchml._limits import Preconfigured as Preconfigured
from trainkit.switchml._options import Options as Options
from trainkit.switchml._options import read_token as read_token
from trainkit.switchml._software_switch import SoftwareSwitch as SoftwareSwitch
from trainkit.switchml._text import shown as shown

if TYPE_CHECKING:
    from trainkit.switchml._hook import noop_hook as noop_hook
    from trainkit.switchml._hook import switchml_hook as switchml_hook
    from trainkit.switchml._state import SwitchMLState as SwitchMLState

_HOMES = {"SwitchMLState": "_state", "noop_hook": "_hook", "switchml_hook": "_hook"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
