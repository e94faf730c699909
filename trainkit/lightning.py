"""The strategies for the package `lightning` (`import lightning as L`).

`lightning` and `pytorch_lightning` hold the same code twice, and a Trainer of one takes no strategy of the other. What
`trainkit` itself offers is `pytorch_lightning`'s.

Example:
    >>> import lightning as L
    >>> from trainkit.lightning import ForestStrategy
    >>> L.Trainer(accelerator="cpu", devices=8, strategy=ForestStrategy(topology="network.json"))
"""

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from trainkit.integrations.lightning import _strategies as original
from trainkit.integrations.lightning._hooked import AlongSchedule, AutoNetwork, ThroughSwitch


class SwitchMLStrategy(ThroughSwitch, DDPStrategy):  # type: ignore[misc, unused-ignore]
    __doc__ = original.SwitchMLStrategy.__doc__
    package = "lightning"


class ForestStrategy(AlongSchedule, DDPStrategy):  # type: ignore[misc, unused-ignore]
    __doc__ = original.ForestStrategy.__doc__
    package = "lightning"


class AutoNetworkStrategy(AutoNetwork, DDPStrategy):  # type: ignore[misc, unused-ignore]
    __doc__ = original.AutoNetworkStrategy.__doc__
    package = "lightning"


StrategyRegistry.register("auto_network", AutoNetworkStrategy, description="DDP on the best all-reduce for the network")
