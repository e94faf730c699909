"""Which model a bucket is of, and that its DistributedDataParallel averages over the same workers.

A bucket does not say either. The wrapper is found among the living objects, once for each model, by the bucket's first
parameter.
"""

import gc
import weakref

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainkit.switchml._bounded import Bounded
from trainkit.switchml._place import Place

_PARAMETERS = 1 << 20


class Models:
    """The models whose buckets one state has averaged, numbered in the order of their first bucket."""

    def __init__(self) -> None:
        # by id, with what it was the id of: one that is gone may have left its id to another
        self._numbers: Bounded[int, tuple[weakref.ref[torch.Tensor], int]] = Bounded(_PARAMETERS)
        self._known = 0

    def number(self, bucket: dist.GradBucket, place: Place) -> int:  # type: ignore[name-defined]
        """The model's number: the same on all ranks, whose buckets come in the same order.

        Args:
            bucket: of DDP.
            place: of the state whose hook this is.

        Raises:
            ValueError: DDP averages over other workers than the state.
        """
        parameters = bucket.parameters()
        first = parameters[0]
        known, number = self._numbers.get(id(first), (None, 0))
        if known is not None and known() is first:
            return number
        self._register(parameters, place)
        return self._known - 1

    def _register(self, parameters: list[torch.Tensor], place: Place) -> None:
        wrapper = _wrapper(id(parameters[0]))
        if wrapper is not None:
            _check(wrapper, place)
            parameters = list(wrapper.parameters())
        for parameter in parameters:
            self._numbers[id(parameter)] = weakref.ref(parameter), self._known
        self._known += 1


def _wrapper(parameter: int) -> DistributedDataParallel | None:
    # by type: isinstance() would ask every object of the program for its class
    wrappers = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    return next((one for one in wrappers if any(id(own) == parameter for own in one.parameters())), None)


def _check(wrapper: DistributedDataParallel, place: Place) -> None:
    ranks = dist.get_process_group_ranks(wrapper.process_group)
    own, size = dist.get_rank(wrapper.process_group), dist.get_world_size(wrapper.process_group)
    ours = place.global_ranks() if place.job else None
    if (own, size) != (place.rank, place.world) or (ours is not None and ours != ranks):
        over = f"ranks {ours}" if ours is not None else f"{place.world} workers, as rank {place.rank}"
        raise ValueError(
            f"DistributedDataParallel averages over ranks {ranks}, this SwitchMLState over {over}: give both the same "
            "process_group"
        )
