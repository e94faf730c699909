"""Lightning strategies that carry gradients over something better than a ring."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trainkit.switchml import SwitchMLState, switchml_hook

if TYPE_CHECKING:
    _Base = DDPStrategy
else:
    _Base = object


class _ThroughSwitch(_Base):
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
        deadline_s: float = 30.0,
        fallback: Literal["allreduce"] | None = None,
        wire: Literal["int32", "int16", "int8"] = "int32",
        profile: Literal["core", "full"] = "full",
        **ddp: Any,
    ) -> None:
        self.switchml_state = SwitchMLState(
            switch, session=session, token_file=token_file, interface=interface, elements=elements, slots=slots,
            deadline_s=deadline_s, fallback=fallback, wire=wire, profile=profile,
        )  # fmt: skip
        super().__init__(ddp_comm_state=self.switchml_state, ddp_comm_hook=switchml_hook, **ddp)

    def counters(self) -> dict[str, float]:
        """What this rank has exchanged with the switch so far: `SwitchMLState.counters`."""
        return self.switchml_state.counters()

    def _register_ddp_hooks(self) -> None:
        # Lightning's own method does nothing unless the device is a GPU
        assert isinstance(self.model, DistributedDataParallel)
        self.switchml_state.connect()
        wrapper = self._ddp_comm_wrapper
        self.model.register_comm_hook(self.switchml_state, wrapper(switchml_hook) if wrapper else switchml_hook)

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Backward of the strategy; a failed bucket raises the session's own error, not C++'s rendering of it."""
        try:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        except RuntimeError as error:
            if self.switchml_state.error is not None:
                raise self.switchml_state.error from error
            raise

    def teardown(self) -> None:
        """Leave the session, then what DDP does."""
        self.switchml_state.close()
        super().teardown()


class SwitchMLStrategy(_ThroughSwitch, DDPStrategy):
    """DDP whose gradients are summed by a switch: `Trainer(strategy=SwitchMLStrategy("10.0.0.1:48864"))`.

    Args:
        switch: "host:port" of `trainkit switch` or of a P4 switch's control.
        session: name under which the workers meet; the same on all.
        token_file: file with the secret shared with the switch.
        interface: network interface to send from.
        elements: values a packet; None finds the most that the path carries.
        slots: packets in flight; None: as many as the receive buffers hold.
        deadline_s: seconds without progress after which training ends with a named error.
        fallback: "allreduce" goes on with torch.distributed when the switch fails.
        wire: integers from worker to switch: "int32", or "int16" or "int8" with error feedback.
        profile: "full", or "core" for a P4 or XDP switch.
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
