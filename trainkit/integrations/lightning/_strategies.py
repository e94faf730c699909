"""Lightning strategies that carry gradients over something better than a ring."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trainkit.collectives import ForestState, Schedule, Topology, forest_hook
from trainkit.switchml import SwitchMLState, switchml_hook

if TYPE_CHECKING:
    _Base = DDPStrategy
else:
    _Base = object


class _Hooked(_Base):
    """A DDPStrategy whose hook works on the CPU too and whose state has `connect`, `close` and `error`."""

    def _register_ddp_hooks(self) -> None:
        # Lightning's own method does nothing unless the device is a GPU
        assert isinstance(self.model, DistributedDataParallel)
        state: Any = self._ddp_comm_state
        hook: Any = self._ddp_comm_hook
        state.connect()
        self.model.register_comm_hook(state, self._ddp_comm_wrapper(hook) if self._ddp_comm_wrapper else hook)

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Backward of the strategy; a failed bucket raises the state's own error, not C++'s rendering of it."""
        state: Any = self._ddp_comm_state
        try:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        except RuntimeError as error:
            if state.error is not None:
                raise state.error from error
            raise

    def teardown(self) -> None:
        """Let the connections go, then what DDP does."""
        state: Any = self._ddp_comm_state
        state.close()
        super().teardown()


class _ThroughSwitch(_Hooked):
    """What SwitchMLStrategy adds to a DDPStrategy, whichever package that comes from."""

    def __init__(
        self,
        switch: str,
        session: str = "default",
        *,
        token_file: str | None = None,
        interface: str | None = None,
        elements: int | None = None,
        slots: int | None = None,
        timeout_s: float = 30.0,
        fallback: Literal["error", "allreduce"] = "error",
        wire: Literal["int32", "int16", "int8"] = "int32",
        profile: Literal["core", "full"] = "full",
        channels: int | None = None,
        **ddp: Any,
    ) -> None:
        renamed = {name: ddp.pop(name) for name in ("deadline_s", "lanes") if name in ddp}
        self.switchml_state = SwitchMLState(
            switch, session=session, token_file=token_file, interface=interface, elements=elements, slots=slots,
            timeout_s=timeout_s, fallback=fallback, wire=wire, profile=profile, channels=channels,
            process_group=ddp.get("process_group"), **renamed,
        )  # fmt: skip
        super().__init__(ddp_comm_state=self.switchml_state, ddp_comm_hook=switchml_hook, **ddp)

    def counters(self) -> dict[str, int | float]:
        """What this rank has exchanged with the switch so far: `SwitchMLState.counters`."""
        return self.switchml_state.counters()


class SwitchMLStrategy(_ThroughSwitch, DDPStrategy):
    """DDP whose gradients are summed by a switch: `Trainer(strategy=SwitchMLStrategy("10.0.0.1:48864"))`.

    Args:
        switch: "host:port" of `trainkit switch` or of a P4 switch's control.
        session: name under which the workers meet; the same on all.
        token_file: file with the secret shared with the switch.
        interface: network interface to send from.
        elements: values a packet; None finds the most that the path carries.
        slots: packets in flight; None: as many as the receive buffers hold.
        timeout_s: seconds without progress after which training ends with a named error.
        fallback: what to do when the switch fails: raise, or go on with torch.distributed.
        wire: integers from worker to switch: "int32", or "int16" or "int8" with error feedback.
        profile: what the switch can do: "core" for P4 and XDP.
        channels: independent streams, each with a thread here and one on the switch; None: as many as the switch has.
        **ddp: arguments of `pytorch_lightning.strategies.DDPStrategy`.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> Trainer(accelerator="cpu", devices=2, strategy=SwitchMLStrategy("127.0.0.1:48864"))
    """


def strategy_for(ddp_strategy: type) -> type:
    """`SwitchMLStrategy` over another package's DDPStrategy.

    Args:
        ddp_strategy: for example `lightning.pytorch.strategies.DDPStrategy`, whose classes are not those of
            `pytorch_lightning`.

    Returns:
        A subclass with the same arguments.

    Example:
        >>> from lightning.pytorch.strategies import DDPStrategy
        >>> Trainer(strategy=strategy_for(DDPStrategy)("10.0.0.1:48864"))
    """
    return type("SwitchMLStrategy", (_ThroughSwitch, ddp_strategy), {"__doc__": SwitchMLStrategy.__doc__})


class _AlongSchedule(_Hooked):
    """What ForestStrategy adds to a DDPStrategy, whichever package that comes from."""

    def __init__(
        self,
        topology: str | Path | Topology | None = None,
        schedule: str | Path | Schedule | None = None,
        *,
        ranks: Mapping[str, int] | None = None,
        deadline_s: float = 30.0,
        fallback: Literal["error", "allreduce"] = "error",
        transport: Literal["auto", "tcp", "gloo", "nccl"] = "auto",
        interface: str | None = None,
        **ddp: Any,
    ) -> None:
        self.forest_state = ForestState(
            Schedule.load(schedule) if isinstance(schedule, str | Path) else schedule,
            Topology.load(topology) if isinstance(topology, str | Path) else topology,
            ranks=ranks, timeout_s=deadline_s, fallback=fallback, transport=transport, interface=interface,
        )  # fmt: skip
        super().__init__(ddp_comm_state=self.forest_state, ddp_comm_hook=forest_hook, **ddp)


class ForestStrategy(_AlongSchedule, DDPStrategy):
    """DDP whose gradients follow the network: `Trainer(strategy=ForestStrategy(topology="network.json"))`.

    Args:
        topology: the network, or its file: the best all-reduce along trees is found for it.
        schedule: an all-reduce to run instead, or its file.
        ranks: compute node -> rank; None takes the order of the compute nodes.
        deadline_s: seconds without progress after which training ends with a named error on every rank.
        fallback: "allreduce" goes on with the process group's all-reduce when the schedule's connections fail.
        transport: "tcp", "gloo" or "nccl"; "auto" takes "nccl" for gradients on GPUs and "tcp" for others.
        interface: network interface to be reached at; None takes the one that leads to MASTER_ADDR.
        **ddp: arguments of `pytorch_lightning.strategies.DDPStrategy`.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> Trainer(accelerator="cpu", devices=8, strategy=ForestStrategy(topology="network.json"))
    """
