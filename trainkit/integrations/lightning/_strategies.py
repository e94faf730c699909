"""Lightning strategies that carry gradients over something better than a ring, for `pytorch_lightning`'s Trainer."""

from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry

from trainkit.integrations.lightning._hooked import AlongSchedule, AutoNetwork, ThroughSwitch


class SwitchMLStrategy(ThroughSwitch, DDPStrategy):
    """DDP whose gradients are summed by a switch: `Trainer(strategy=SwitchMLStrategy("10.0.0.1:48864"))`.

    Args:
        switch: "host:port" of `trainkit switch` or of a P4 switch's control; or a `SwitchMLState`.
        session: name under which the workers meet.
        report: whether a fit gets a report in its logger's folder (see `RunReport`), or the folder of the report.
        **arguments: options of `SwitchMLState`, such as `fallback="allreduce"`, and arguments of
            `pytorch_lightning.strategies.DDPStrategy`.

    Raises:
        ValueError: an argument is outside its range.
        TypeError: there is no such argument.

    Example:
        >>> Trainer(accelerator="cpu", devices=2, strategy=SwitchMLStrategy("127.0.0.1:48864"))
    """

    package = "pytorch_lightning"


class ForestStrategy(AlongSchedule, DDPStrategy):
    """DDP whose gradients follow the network: `Trainer(strategy=ForestStrategy(topology="network.json"))`.

    Args:
        topology: the network, or its file: the best all-reduce along trees is found for it.
        schedule: an all-reduce to run instead, or its file.
        options: see `ForestOptions`.
        report: whether a fit gets a report in its logger's folder (see `RunReport`), or the folder of the report.
        **arguments: single ones of these options, such as `timeout_s=60`, and arguments of
            `pytorch_lightning.strategies.DDPStrategy`.

    Raises:
        ValueError: an argument is outside its range.
        TypeError: there is no such argument.

    Example:
        >>> Trainer(accelerator="cpu", devices=8, strategy=ForestStrategy(topology="network.json"))
    """

    package = "pytorch_lightning"


class AutoNetworkStrategy(AutoNetwork, DDPStrategy):
    """DDP that finds out how to reduce its gradients: `Trainer(strategy=AutoNetworkStrategy())`.

    The first two steps run on the process group's ring. Then the network is probed (or read from `network`), the time
    of every all-reduce algorithm is predicted for the model's own buckets, and the best is taken: see
    `trainkit._planner`. After 50 steps the prediction is compared with what happened; when the network drifts, it is
    probed and planned anew.

    Args:
        network: file written by `trainkit probe`, or a Topology, with one compute node a rank (of the probe's, a rank
            finds its own by its host's address; otherwise the order is the ranks'); None probes.
        options: see `NetworkOptions`.
        report: whether a fit gets a report in its logger's folder (see `RunReport`), or the folder of the report.
        **arguments: single ones of these options, such as `window=100`, and arguments of
            `pytorch_lightning.strategies.DDPStrategy`.

    Raises:
        ValueError: an argument is outside its range, or the network's file breaks a rule.
        TypeError: there is no such argument.
    """

    package = "pytorch_lightning"


StrategyRegistry.register("auto_network", AutoNetworkStrategy, description="DDP on the best all-reduce for the network")
