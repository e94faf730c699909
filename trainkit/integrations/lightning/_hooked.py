"""What the strategies add to a DDPStrategy, whichever package that comes from."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from trainkit.collectives import ForestState, Schedule, Topology, forest_hook
from trainkit.collectives.execute import ForestOptions
from trainkit.integrations._network import NetworkOptions, NetworkState, auto_network_hook
from trainkit.integrations.lightning._report import attach
from trainkit.switchml import SwitchMLState, switchml_hook

if TYPE_CHECKING:
    from pytorch_lightning.strategies import DDPStrategy as _Base
else:
    _Base = object

_COUNTERS = "trainkit_counters"
"""Where a trainer's state, which a spawned or forked worker hands to the main process, holds the counters."""


class Hooked(_Base):
    """A DDPStrategy with a hook, on the CPU too; its state has `connect`, `close`, `counters` and `error`.

    Args:
        state: of the hook.
        hook: reduces a bucket.
        ddp: arguments of the DDPStrategy; `ddp_comm_wrapper` wraps the hook.
        report: whether a fit gets a report in its logger's folder (see `RunReport`), or the folder of the report.

    Raises:
        TypeError: a hook or state in `ddp`, whose place is taken.
    """

    hook_state: Any
    package: str

    def __init__(
        self, state: Any, hook: Callable[[Any, Any], Any], ddp: Mapping[str, Any], report: bool | str | Path
    ) -> None:
        for name in ("ddp_comm_state", "ddp_comm_hook"):
            if ddp.get(name) is not None:
                raise TypeError(f"{type(self).__name__} brings its own hook: leave {name}= out")
        wrapper = ddp.get("ddp_comm_wrapper")
        self.hook_state, self._hook = state, wrapper(hook) if wrapper is not None else hook
        self._fitted: Any = None
        self._report = report
        self._handed: dict[str, float] = {}
        taken = ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper")
        super().__init__(**{name: value for name, value in ddp.items() if name not in taken})

    def __repr__(self) -> str:
        """What Lightning shows when a Trainer of the other package is given it."""
        other = "trainkit.lightning" if self.package == "pytorch_lightning" else "trainkit"
        name = type(self).__name__
        return f"<{name} for {self.package}'s Trainer; for the other package's: from {other} import {name}>"

    @property
    def launcher(self) -> Any:
        """Lightning's own; what it brings back from other processes has the counters with it."""
        launcher = super().launcher
        return None if launcher is None else _Launcher(launcher, self._handed)

    def setup(self, trainer: Any) -> None:
        """Remember whose training this is."""
        super().setup(trainer)
        self._fitted = trainer
        if trainer.state.fn == "fit":
            attach(trainer, self._report)

    def configure_ddp(self) -> None:
        """Wrap the model, meet the other ranks, and register the hook; Lightning's own does so on GPUs alone."""
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self.hook_state.connect()
        self.model.register_comm_hook(self.hook_state, self._hook)

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Backward of the strategy; a failed bucket raises the state's own error, not C++'s rendering of it."""
        try:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        except RuntimeError as error:
            if self.hook_state.error is not None:
                raise self.hook_state.error from error
            raise

    def counters(self) -> dict[str, float]:
        """What this rank has exchanged so far; after training in spawned or forked processes, what rank 0 has."""
        own = dict(self.hook_state.counters())
        return own if any(own.values()) else self._handed or own

    def teardown(self) -> None:
        """Let the connections go, then what DDP does."""
        self.hook_state.close()
        if self._fitted is not None:
            setattr(self._fitted.state, _COUNTERS, dict(self.hook_state.counters()))
            self._fitted = None
        super().teardown()


class _Launcher:
    """A launcher that takes rank 0's counters from the trainer's state when its processes have ended."""

    def __init__(self, launcher: Any, handed: dict[str, float]) -> None:
        self._launcher, self._handed = launcher, handed

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # Lightning asks which kind it is
        return type(self._launcher)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Run `function` in the processes."""
        result = self._launcher.launch(function, *args, trainer=trainer, **kwargs)
        self._handed.update(getattr(getattr(trainer, "state", None), _COUNTERS, {}))
        return result


class ThroughSwitch(Hooked):
    """What SwitchMLStrategy adds."""

    def __init__(
        self,
        switch: str | SwitchMLState,
        session: str = "default",
        *,
        report: bool | str | Path = True,
        **arguments: Any,
    ) -> None:
        settings, ddp = parted(type(self), arguments)
        if isinstance(switch, SwitchMLState):
            if settings or session != "default":
                raise TypeError(
                    f"a SwitchMLState has its options already: leave {', '.join(settings) or 'session'} out"
                )
            self.switchml_state = switch
        else:
            self.switchml_state = SwitchMLState(switch, session=session, **settings)
        super().__init__(self.switchml_state, switchml_hook, ddp, report)


class AlongSchedule(Hooked):
    """What ForestStrategy adds."""

    def __init__(
        self,
        topology: str | Path | Topology | None = None,
        schedule: str | Path | Schedule | None = None,
        *,
        options: ForestOptions | None = None,
        report: bool | str | Path = True,
        **arguments: Any,
    ) -> None:
        settings, ddp = parted(type(self), arguments)
        self.forest_state = ForestState(
            Schedule.load(schedule) if isinstance(schedule, str | Path) else schedule,
            Topology.load(topology) if isinstance(topology, str | Path) else topology,
            options=options,
            **settings,
        )
        super().__init__(self.forest_state, forest_hook, ddp, report)


class AutoNetwork(Hooked):
    """What AutoNetworkStrategy adds."""

    def __init__(
        self,
        network: str | Path | Topology | None = None,
        *,
        options: NetworkOptions | None = None,
        report: bool | str | Path = True,
        **arguments: Any,
    ) -> None:
        settings, ddp = parted(type(self), arguments)
        self.network_state = NetworkState(network, options=options, **settings)
        super().__init__(self.network_state, auto_network_hook, ddp, report)


def parted(strategy: type, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is the engine's, what is DDP's): what neither DDPStrategy nor DistributedDataParallel names is the engine's.

    The engine refuses what it does not know, so that no misspelt option is lost among DDP's keywords.

    Args:
        strategy: a subclass of a DDPStrategy.
        arguments: by name.
    """
    base = next(kind for kind in strategy.__mro__ if kind.__name__ == "DDPStrategy")
    known = {*inspect.signature(base.__init__).parameters, *inspect.signature(DistributedDataParallel).parameters}  # type: ignore[misc]
    ddp = {name: value for name, value in arguments.items() if name in known - {"module", "process_group"}}
    return {name: value for name, value in arguments.items() if name not in ddp}, ddp
