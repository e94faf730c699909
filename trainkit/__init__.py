"""Trainkit: a training-systems plug-in for PyTorch.

The names below are imported on first use, so that `import trainkit` loads neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainkit._callback import AutoLRS as AutoLRS
    from trainkit._network import AutoNetworkStrategy as AutoNetworkStrategy
    from trainkit._network import NetworkState as NetworkState
    from trainkit._network import auto_network_hook as auto_network_hook
    from trainkit._strategies import ForestStrategy as ForestStrategy
    from trainkit._strategies import SwitchMLStrategy as SwitchMLStrategy

__version__ = "0.1.0"
__all__ = ["AutoLRS", "AutoNetworkStrategy", "ForestStrategy", "NetworkState", "SwitchMLStrategy", "auto_network_hook"]

_HOMES = {
    "AutoLRS": "trainkit._callback",
    "AutoNetworkStrategy": "trainkit._network",
    "ForestStrategy": "trainkit._strategies",
    "NetworkState": "trainkit._network",
    "SwitchMLStrategy": "trainkit._strategies",
    "auto_network_hook": "trainkit._network",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainkit' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
