"""`Accelerator` and `transformers.TrainingArguments(ddp_backend="trainkit")` on CPUs.

On GPUs Accelerate takes the backend that it is asked for; on CPUs it answers that only gloo and MPI are available.
"""

from functools import wraps
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from trainkit.collectives import ForestOptions, Topology
from trainkit.collectives import register_backend as register
from trainkit.collectives.execute import BACKEND


def register_backend(topology: Topology, *, options: ForestOptions | None = None, **settings: Any) -> None:
    """`trainkit.collectives.register_backend`, for Accelerate as well.

    Args:
        topology: the network; rank r is its r-th compute node.
        options: see `ForestOptions`.
        **settings: single options.

    Raises:
        ValueError: an argument is outside its range.
        TypeError: there is no such option.

    Example:
        >>> register_backend(Topology.load("network.json"))
        >>> Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="trainkit")])
        >>> TrainingArguments(use_cpu=True, ddp_backend="trainkit")
    """
    register(topology, options=options, **settings)
    choose = PartialState._prepare_backend
    if not hasattr(choose, "__wrapped__"):
        PartialState._prepare_backend = _kept(choose)  # type: ignore[method-assign]


def _kept(choose: Any) -> Any:
    """Accelerate's choice, but for one that is ours."""

    @wraps(choose)
    def chosen(
        self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None
    ) -> tuple[str | None, Any]:
        taken, kind = choose(self, cpu, sagemaker_dp, backend)
        return (BACKEND if backend == BACKEND and kind != DistributedType.NO else taken), kind

    return chosen
