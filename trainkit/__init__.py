"""Trainkit: a training-systems plug-in for PyTorch.

The names below are imported on first use, so that `import trainkit` loads neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainkit.integrations._network import NetworkOptions as NetworkOptions
    from trainkit.integrations._network import NetworkState as NetworkState
    from trainkit.integrations._network import auto_network_hook as auto_network_hook
    from trainkit.integrations.lightning._callback import AutoLRS as AutoLRS
    from trainkit.integrations.lightning._report import RunReport as RunReport
    from trainkit.integrations.lightning._strategies import AutoNetworkStrategy as AutoNetworkStrategy
    from trainkit.integrations.lightning._strategies import ForestStrategy as ForestStrategy
    from trainkit.integrations.lightning._strategies import SwitchMLStrategy as SwitchMLStrategy

__version__ = "0.1.0"
__all__ = [
    "AutoLRS",
    "AutoNetworkStrategy",
    "ForestStrategy",
    "NetworkOptions",
    "NetworkState",
    "RunReport",
    "SwitchMLStrategy",
    "auto_network_hook",
]

_HOMES = {
    "AutoLRS": "trainkit.integrations.lightning._callback",
    "AutoNetworkStrategy": "trainkit.integrations.lightning._strategies",
    "ForestStrategy": "trainkit.integrations.lightning._strategies",
    "NetworkOptions": "trainkit.integrations._network",
    "NetworkState": "trainkit.integrations._network",
    "RunReport": "trainkit.integrations.lightning._report",
    "SwitchMLStrategy": "trainkit.integrations.lightning._strategies",
    "auto_network_hook": "trainkit.integrations._network",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainkit' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
