"""Whether a hook's state and its DistributedDataParallel mean the same ranks.

A bucket does not say which model it is of. The wrapper is found among the living objects, once, by a parameter.
"""

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def check_group(bucket: Any, process_group: "dist.ProcessGroup | None", who: str) -> None:
    """Refuse a state of another group than the model's.

    Args:
        bucket: of the model; one that has none of DDP's is let through.
        process_group: the state's; None is the default group.
        who: the state, for the error.

    Raises:
        ValueError: DDP averages over other ranks than the state.
    """
    parameters = bucket.parameters() if hasattr(bucket, "parameters") else []
    wrapper = ddp_of(parameters[0]) if parameters else None
    if wrapper is None:
        return
    theirs = dist.get_process_group_ranks(wrapper.process_group)
    ours = dist.get_process_group_ranks(process_group or dist.group.WORLD)  # type: ignore[arg-type]
    if theirs != ours:
        raise ValueError(
            f"DistributedDataParallel averages over ranks {theirs}, this {who} over {ours}: give both the same "
            "process_group="
        )


def ddp_of(parameter: torch.Tensor) -> DistributedDataParallel | None:
    """The wrapper of the model that a parameter is of; None where there is none."""
    # by type: isinstance() would ask every object of the program for its class
    wrappers = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    return next((one for one in wrappers if any(own is parameter for own in one.parameters())), None)
