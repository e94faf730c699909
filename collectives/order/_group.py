"""In process: a group whose ranks follow an order."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainkit.collectives.order._check import checked_order

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def ordered_group(order: Sequence[int], **options: Any) -> "ProcessGroup":
    """A new process group over all ranks in which rank r is today's rank `order[r]`.

    All ranks must call it. Collectives on it go round in the new order; `dist.get_rank(group)` tells the new rank.

    Args:
        order: new rank -> today's rank, such as `Ordering.order` with one process a host.
        options: for `torch.distributed.new_group`: timeout, backend, ...

    Raises:
        OrderError: not every rank exactly once.
        RuntimeError: this torch sorts the ranks of new groups.
    """
    import torch.distributed as dist

    ranks = checked_order(order, dist.get_world_size())
    if "sort_ranks" not in inspect.signature(dist.new_group).parameters:
        raise RuntimeError(
            "an ordered group needs a torch whose new_group takes sort_ranks: update torch, or order the hosts"
        )
    group: ProcessGroup = dist.new_group(list(ranks), sort_ranks=False, **options)
    return group
