"""Which worker of which job this process is: rank, world size and job id, agreed over torch.distributed."""

import secrets
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """One worker's place in a session."""

    rank: int
    """Of this worker, in the session."""
    world: int
    """Workers of the session."""
    job: str = ""
    """What tells two jobs with one session name apart; empty where nothing could be agreed."""
    group: Any = None
    """Process group whose ranks the workers are; None: torch.distributed's own, or none."""

    def global_ranks(self) -> list[int]:
        """The workers as ranks of the default group."""
        return list(dist.get_process_group_ranks(self.group or dist.group.WORLD))


def agreed(rank: int | None, world: int | None, group: "dist.ProcessGroup | None") -> Place:
    """This worker's place; collective over the group where rank and world size come from torch.distributed.

    Args:
        rank: as the user says; None: of the group.
        world: as the user says; None: of the group.
        group: process group; None: the default one.

    Raises:
        ValueError: neither the user nor torch.distributed knows, or this process is not of the group.
    """
    if rank is not None and world is not None and group is None:
        return Place(rank, world)
    if not dist.is_initialized():
        raise ValueError("give rank= and world_size=, or call torch.distributed.init_process_group first")
    own, size = dist.get_rank(group), dist.get_world_size(group)
    if own < 0:
        raise ValueError("process_group is one of which this process is a member: give the one that DDP was given")
    if (rank, world) not in ((None, None), (own, size)):
        raise ValueError(
            f"rank {rank} of {world} was said, process_group says {own} of {size}: leave both to the group"
        )
    drawn: list[Any] = [secrets.token_hex(8) if own == 0 else None]
    source = dist.get_process_group_ranks(group or dist.group.WORLD)[0]
    dist.broadcast_object_list(drawn, src=source, group=group)
    return Place(own, size, str(drawn[0]), group)
