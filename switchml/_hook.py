"""The communication hooks for `DistributedDataParallel.register_comm_hook`."""

import torch
import torch.distributed as dist

from trainkit.switchml._state import SwitchMLState


def switchml_hook(
    state: SwitchMLState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket's gradients through the switch.

    Up to rounding to `n * 2**-27` of each chunk's largest magnitude, the result is the same as with no hook, and it
    is the same bits on all ranks.

    Args:
        state: the session.
        bucket: gradients of fp32, fp16 or bf16; those of fp64 go by torch.distributed, which does not round them.

    Raises:
        ValueError: DDP averages over other workers than `state`, or the gradients are sparse.

    Example:
        >>> ddp.register_comm_hook(SwitchMLState("10.0.0.1:48864"), switchml_hook)
    """
    return state.bucket(bucket)


def noop_hook(
    state: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Leave the gradients as they are: a step's time with it is what no network could beat.

    Args:
        state: not used.
        bucket: gradients; each rank keeps its own, so that the model trained is worthless.

    Example:
        >>> ddp.register_comm_hook(None, noop_hook)
    """
    buffer = bucket.buffer()
    future = torch.futures.Future[torch.Tensor](devices=[buffer.device] if buffer.is_cuda else None)
    future.set_result(buffer)
    return future
